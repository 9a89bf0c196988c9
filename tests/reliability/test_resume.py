"""kill -9 and resume: the same losses and the same weights, bit for bit, as the run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_folder import feedback_file, workplace
from trimtab.config import resolve
from trimtab.errors import CheckpointError
from trimtab.run import train

ROOT = Path(__file__).parents[2]
STEPS, SAVE = 9, 3  # five steps per epoch
SPEED = {"peak_memory_gb", "tokens_per_second"}
# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and feedback; what trimtab caches goes there too."""
    workplace(tmp_path, monkeypatch)
    feedback_file(tmp_path / "comparison.jsonl", "comparison", 20)
    feedback_file(tmp_path / "thumb.jsonl", "thumb", 20)
    return tmp_path


def options(method: str, finetune: str, **more: Any) -> dict[str, Any]:
    return {
        "data": "thumb.jsonl" if method in ("kto", "bco") else "comparison.jsonl",
        "method": method,
        "model": "./model",
        "finetune": finetune,
        "precision": "float32",
        "batch_size": 4,
        "max_steps": STEPS,
        "save_every": SAVE,
        "eval_every": 4,
        "learning_rate": 0.003,
        "samples": 2,
        "sample_tokens": 6,
        "threads": 1,
        **more,
    }


def kill(values: dict[str, Any], moment: str, step: int) -> None:
    """Run the command line until it dies."""
    flags = [w for k, v in values.items() if k != "data" for w in (f"--{k}", str(v))]
    script = ROOT / "tests" / "reliability" / "killed.py"
    command = [sys.executable, str(script), moment, str(step), "train", values["data"], *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def rows(folder: Path) -> list[dict[str, float]]:
    """What was logged, speed and memory apart."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in SPEED} for row in read]


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def same(a: Path, b: Path) -> None:
    """Two run folders hold the same run: every logged number, every weight, every sample."""
    assert rows(a) == rows(b) and [r["step"] for r in rows(a) if "loss" in r] == list(range(1, STEPS + 1))
    weights = sorted(p.relative_to(a) for p in [*a.glob("*.safetensors"), *a.glob("adapter/*.safetensors")])
    assert weights
    for file in (*weights, "samples.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert card(a)["evaluation"] == card(b)["evaluation"] and card(a)["status"] == card(b)["status"] == "finished"


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("method", ["dpo", "kto", "bco"])  # bco: with a memory, both classes' moving means
def test_killed_and_resumed_is_uninterrupted(method: str, finetune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = [s for s in range(SAVE + 1, STEPS + 1) if (s - 1) % SAVE]  # steps that the last checkpoint does not hold
    step = random.Random(f"{method} {finetune}").choice(lost)
    whole = train(resolve(options(method, finetune, output="whole")))
    monkeypatch.setenv("TRIMTAB_HOME", "other home")  # the reference cache, too, is the killed run's own
    kill(options(method, finetune, output="killed"), "learning", step)
    assert (
        len([r for r in rows(Path("killed")) if "loss" in r]) == step - 1
        and card(Path("killed"))["status"] == "running"
    )
    resumed = train(resolve(options(method, finetune, output="killed", resume=True)))
    assert card(resumed)["resumed"] and not card(whole)["resumed"]
    same(whole, resumed)


def test_killed_while_writing_a_checkpoint() -> None:
    """Half a checkpoint is passed over for the one before; with one kept, an older one is deleted only afterwards."""
    whole = train(resolve(options("dpo", "full", output="whole")))
    kill(options("dpo", "full", output="saving"), "saving", 6)
    half, good = Path("saving/checkpoints/checkpoint-6"), Path("saving/checkpoints/checkpoint-3")
    assert half.is_dir() and not (half / "complete.json").exists() and (good / "complete.json").exists()
    same(whole, train(resolve(options("dpo", "full", output="saving", resume=True))))

    kill(options("dpo", "full", output="deleting", keep_checkpoints=1), "deleting", 6)
    assert (Path("deleting/checkpoints/checkpoint-6") / "complete.json").exists()
    left = {p.name for p in Path("deleting/checkpoints/checkpoint-3").iterdir()}
    assert "model.safetensors" in left and not left & {"trainer_state.json", "complete.json"}
    same(whole, train(resolve(options("dpo", "full", output="deleting", keep_checkpoints=1, resume=True))))
    assert [p.name for p in Path("deleting/checkpoints").iterdir()] == ["checkpoint-9"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_damaged_checkpoints() -> None:
    """One clear error that says what to delete; after that the one before is used."""
    values = options("dpo", "full", output="run", samples=0)
    del values["sample_tokens"]
    again = resolve({**values, "resume": True})
    first = train(resolve(values))
    wanted = (first / "model.safetensors").read_bytes()

    # resuming a finished run changes nothing
    train(again)
    assert (first / "model.safetensors").read_bytes() == wanted and card(first)["steps"] == STEPS

    last, before = (first / "checkpoints" / f"checkpoint-{n}" for n in (9, 6))
    shutil.rmtree(last)
    shutil.copytree(before, "good")
    damages: list[tuple[str, Callable[[Path], None]]] = [
        ("model.safetensors", cut),
        ("optimizer.pt", cut),
        ("trainer_state.json", cut),
        ("complete.json", lambda f: f.write_text("")),
        ("trainer_state.json", Path.unlink),
        ("model.safetensors", Path.unlink),
    ]
    for name, damage in damages:
        damage(before / name)
        message = r"checkpoint-6 is damaged \(.*\)\. Delete that folder to resume from an earlier checkpoint"
        with pytest.raises(CheckpointError, match=message):
            train(again)
        shutil.rmtree(before)
        shutil.copytree("good", before)
    train(again)
    assert (first / "model.safetensors").read_bytes() == wanted

    for checkpoint in (last, before):
        (checkpoint / "complete.json").unlink()
    message = r"no complete checkpoint to resume from\. 2 incomplete one\(s\) there: checkpoint-6, checkpoint-9\."
    with pytest.raises(CheckpointError, match=message):
        train(again)


def test_another_run_is_not_continued() -> None:
    values = options("dpo", "full", output="run", samples=0, max_steps=3)
    del values["sample_tokens"]
    train(resolve(values))
    with pytest.raises(CheckpointError, match="run already holds a run. Choose another output, or pass resume"):
        train(resolve(values))
    changed = {**values, "beta": 0.2, "batch_size": 5, "resume": True}
    with pytest.raises(CheckpointError, match=r"changed since it started: batch_size: 4 -> 5; beta: 0\.1 -> 0\.2\."):
        train(resolve(changed))
    feedback_file(Path("comparison.jsonl"), "comparison", 20, seed=1)
    with pytest.raises(CheckpointError, match="changed since it started: the content of the data file"):
        train(resolve({**values, "resume": True}))
    with pytest.raises(CheckpointError, match="elsewhere.checkpoints has no complete checkpoint to resume from"):
        train(resolve({**values, "output": "elsewhere", "resume": True}))
