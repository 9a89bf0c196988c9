"""PPO-ptx: text beside the batch, in the same step; its gradient is added, whatever the method and however it is cut."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.command import done, trimtab
from tests.engine import engine, gradients, other_model, step, worst
from tests.test_invariance import data
from tests.tiny_folder import feedback_file, tiny_folder
from tests.twins.thumbs import sft
from trimtab.feedback.records import Demonstration
from trimtab.logprobs.score import uninstalled
from trimtab.objectives import methods
from trimtab.objectives.dpo import DPO
from trimtab.update.beside import Beside

TEXT = tiny.examples(Demonstration, 5, seed=8)


@pytest.mark.parametrize("method", ["dpo", "rloo", "ppo", "bco"])
@pytest.mark.parametrize("budget", [30, 10**6])
def test_the_gradient_is_the_sum(method: str, budget: int, tmp_path: Path) -> None:
    """Of the method alone, and of 0.7 times the mean NLL over the text's tokens by the flat script."""
    objective = methods()[method]()
    model, examples = tiny.model_for(objective), data(objective, 4)
    flat = copy.deepcopy(model)
    sft(flat, TEXT, "token").backward()
    text = gradients(flat)
    loss, alone = step(engine(model, objective, examples, tmp_path, budget=budget))
    trainer = engine(model, objective, examples, tmp_path, budget=budget)
    trainer.beside = Beside(TEXT, 0.7, 5, 0)
    found = step(trainer)
    assert found[0] == loss  # the method's own loss is what is logged
    wanted = {n: alone.get(n, torch.zeros_like(g)) + 0.7 * g for n, g in text.items()} | {
        n: g for n, g in alone.items() if n not in text
    }
    assert worst(found[1], wanted) < 1e-10
    assert trainer.tally.means()["ptx/nll"] == pytest.approx(sft(flat, TEXT, "token").item(), rel=1e-10)


def test_every_text_comes_once_an_epoch() -> None:
    beside = Beside(TEXT, 1.0, 2, seed=3)
    seen = [e for s in range(3) for e in beside.batch(s)]
    assert len(seen) == 5 and {id(e) for e in seen} == {id(e) for e in TEXT}
    assert [beside.batch(s) for s in range(3)] != [beside.batch(s) for s in range(3, 6)]  # another order
    assert beside.batch(4) == Beside(TEXT, 1.0, 2, seed=3).batch(4)


def test_text_beside_keeps_its_likelihood(tmp_path: Path) -> None:
    """DPO on random pairs makes the text less likely; with it beside, more."""
    found = {}
    for weight in (0.0, 1.0):
        model = other_model()
        before = sft(model, TEXT, "token").item()
        trainer = engine(model, DPO(), data(DPO(), 8), tmp_path, batch_size=4, max_steps=12, learning_rate=0.01)
        trainer.beside = Beside(TEXT, weight, 5, 0) if weight else None
        trainer.train()
        with uninstalled(model):
            found[weight] = sft(model, TEXT, "token").item() - before
    assert found[1.0] < 0 and found[1.0] < found[0.0]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny")
    feedback_file(tmp_path / "prefs.jsonl", "comparison", 12)
    feedback_file(tmp_path / "demos.jsonl", "demonstration", 6)
    common = ("train", "prefs.jsonl", "--model", "./tiny", "--max_steps", 2, "--batch_size", 4, "--samples", 0)
    told = done(*common, "--ptx_data", "demos.jsonl", "--ptx_weight", 0.5, "--ptx_batch_size", 3, "--output", "run")
    assert "beside: 6 demonstrations of demos.jsonl, weight 0.5" in told
    rows: list[dict[str, Any]] = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(r["ptx/nll"] > 0 for r in rows if "loss" in r)
    assert json.loads(Path("run/run.json").read_text())["beside"]["examples"] == 6
    wrong = trimtab(*common, "--ptx_data", "prefs.jsonl", "--output", "x")
    assert wrong.error.startswith("ptx_data: prefs.jsonl holds comparison records; expected demonstrations")
