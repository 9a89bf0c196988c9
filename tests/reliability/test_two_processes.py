"""One process = two (gloo, through ``accelerate launch``): losses, metrics, weights and memory, for every method."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import worst
from tests.reliability import every_method
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.config import resolve
from trimtab.run import train

ROOT = Path(__file__).parents[2]
# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(processes: int, script: str, *words: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"]  # torchrun; --cpu would start one process
    command += ["--num_machines", "1", "--machine_rank", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    ours = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(cwd / "hf"),
        "TRIMTAB_HOME": str(cwd / "home"),
    }
    file = str(ROOT / "tests" / "reliability" / script)
    started = subprocess.Popen(
        [*command, file, *words], env={**os.environ, **ours}, cwd=cwd, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _, told = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # the launcher and its workers: one of them waits for ever
        raise
    assert started.returncode == 0, told[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    launch(2, "every_method.py", str(folder), cwd=folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return every_method.run(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", [name for name, *_ in every_method.cases()])
def test_one_process_is_two(name: str, one: dict[str, dict[str, Any]], two: list[dict[str, dict[str, Any]]]) -> None:
    alone = one[name]
    assert alone["world"] == 1 and all(found[name]["world"] == 2 for found in two)
    assert worst(two[0][name]["weights"], two[1][name]["weights"]) == 0  # both processes hold the same model
    assert worst(two[0][name]["weights"], alone["weights"]) < 1e-9
    for key, value in alone["memory"].items():
        assert two[0][name]["memory"][key].item() == pytest.approx(value.item(), rel=1e-10)
    logged = two[0][name]["logged"]
    assert len(logged) == len(alone["logged"]) and [r["step"] for r in logged[:3]] == [1, 2, 3]
    for ours, wanted in zip(logged, alone["logged"], strict=True):
        single = {"train_loss"}  # the Trainer's own, added up in float32
        assert ours.keys() == wanted.keys()
        assert {k: v for k, v in ours.items() if k not in single} == pytest.approx(
            {k: v for k, v in wanted.items() if k not in single}, rel=1e-9, abs=1e-10
        )
    assert any("eval/loss" in row for row in logged)


OPTIONS = {
    "data": "thumbs.jsonl", "method": "kto", "model": "./model", "precision": "float64", "finetune": "full",
    "batch_size": 4, "max_steps": 4, "samples": 0, "save_every": 2, "learning_rate": 0.01, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize("output", [None, "here"])
def test_command_line_with_processes_that_start_at_different_times(
    output: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take one run folder, and it holds what one process would have written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "other home"))  # the two fill their reference cache themselves
    tiny_folder(tmp_path / "model")
    feedback_file(tmp_path / "thumbs.jsonl", "thumb", 11)
    alone = train(resolve({**OPTIONS, "output": "alone"}))
    flags = [w for k, v in OPTIONS.items() if k != "data" for w in (f"--{k}", str(v))]
    launch(2, "late.py", "train", "thumbs.jsonl", *flags, *(["--output", output] if output else []), cwd=tmp_path)
    if output is None:
        assert [p.name for p in (tmp_path / "runs").iterdir()] == ["kto-thumbs-1"]
    folder = tmp_path / (output or "runs/kto-thumbs-1")
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    state = {p.name for p in (folder / "checkpoints" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} < state
    ours, wanted = (load_file(f / "model.safetensors") for f in (folder, alone))
    assert worst(ours, wanted) < 1e-9


ROUNDS = {
    "data": "prompts.jsonl", "judge": "rule:judge.py:odd", "model": "./model", "precision": "float64",
    "batch_size": 2, "rounds": 2, "prompts_per_round": 5, "answers": 3, "samples": 0, "sample_tokens": 6, "learning_rate": 0.01,
    "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("rloo", {"finetune": "full"}),
        ("ppo", {"passes": 2, "ptx_data": "demos.jsonl"}),
        ("dpo", {"pairs": "all", "finetune": "full"}),
        ("remax", {}),
        (
            "rso",
            {
                "pairs": "tournament", "answers": 5, "keep_answers": 3, "keep_beta": 0.2, "samples": 3, "holdout": 0.3,
                "watch_every": 1, "test_judge": "rule:judge.py:even",
            },
        ),
    ],
)  # fmt: skip
def test_rounds_of_two_processes_are_those_of_one(
    method: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each samples its share of 5 prompts: the same answers, judgements, records and updates, and the judges are asked once."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    feedback_file(tmp_path / "prompts.jsonl", "prompt", 11)
    feedback_file(tmp_path / "demos.jsonl", "demonstration", 5)
    Path("judge.py").write_text(
        "def odd(prompt, answer):\n"
        "    with open('asked', 'a') as f:\n        f.write('x')\n"
        "    return sum(map(ord, answer)) % 11 / 10\n"
        "def even(prompt, answer):\n"
        "    return 1 - odd(prompt, answer) ** 2\n"
    )
    options = {**ROUNDS, "method": method, **more}
    alone = train(resolve({**options, "output": "alone"}))
    asked = len(Path("asked").read_text())
    Path("asked").unlink()
    flags = [w for k, v in options.items() if k != "data" for w in (f"--{k}", str(v))]
    launch(2, "late.py", "train", "prompts.jsonl", *flags, "--output", "both", cwd=tmp_path)
    assert len(Path("asked").read_text()) == asked
    for number in ("0001", "0002"):
        ours, wanted = (folder / "rounds" / number for folder in (Path("both"), alone))
        assert {p.name for p in ours.iterdir()} == {p.name for p in wanted.iterdir()}
        assert (ours / "records.jsonl").read_bytes() == (wanted / "records.jsonl").read_bytes()
        assert (ours / "judgements.jsonl").read_bytes() == (wanted / "judgements.jsonl").read_bytes()
        if "keep_answers" in more:
            assert json.loads((ours / "round.json").read_text())["kept/reward"] > 0
    if "test_judge" in more:
        for look in ("rounds/0001/watch.json", "rounds/0002/watch.json", "rounds/watch.json"):
            seen, known = (json.loads((folder / look).read_text()) for folder in (Path("both"), alone))
            assert seen.pop("kl") == pytest.approx(known.pop("kl"), rel=1e-6, abs=1e-9) and seen == known
    name = "model.safetensors"
    assert worst(load_file(f"both/{name}"), load_file(alone / name)) < 1e-9
    assert worst(load_file(alone / name), load_file(f"model/{name}")) > 1e-4  # something was learned
