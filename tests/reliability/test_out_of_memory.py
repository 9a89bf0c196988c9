"""Out of memory inside a step: the token budget is halved, the step is made again, and no number tells."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engine import WHOLE, engine, losses, weights, worst
from tests.reliability.launch import launch
from trimtab import run
from trimtab.config import resolve
from trimtab.errors import ModelError
from trimtab.logprobs.layout import cost
from trimtab.objectives import objective_class
from trimtab.tokens.batch import Example
from trimtab.update.beside import Beside
from trimtab.update.trainer import Update, out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
METHODS = ("dpo", "kto", "bco", "rloo", "tdpo2")
ERRORS = {"cuda": torch.OutOfMemoryError("CUDA out of memory."), "cpu": RuntimeError(CPU)}


def examples(method: str, n: int = 8) -> list[Example]:
    objective = objective_class(method)()
    found = tiny.examples(objective.feedback.record, n, k=3, seed=5)
    return tiny.sampled(objective, found) if method == "rloo" else found


class Small:
    """Memory for a token budget: with a larger one a step fails in its last backward pass, when most of the gradient is there.

    Args:
        early: it fails in the last forward pass instead.
    """

    def __init__(self, trainer: Update, tokens: int, error: Exception, early: bool = False) -> None:
        self.trainer, self.tokens, self.error, self.early = trainer, tokens, error, early
        self.last, self.half_done, self.calls = False, 0, 0
        self.backward = trainer.accelerator.backward
        trainer._columns = self.watched(trainer._columns)  # type: ignore[method-assign]
        trainer.scorer.score_with = self.watched(trainer.scorer.score_with)  # type: ignore[method-assign]
        trainer.accelerator.backward = self.differentiate  # type: ignore[method-assign]

    def watched(self, score: Callable[..., Any]) -> Callable[..., Any]:
        """A pass that learns, which may be the step's last."""

        def scored(examples: Sequence[Example], *more: Any, **named: Any) -> Any:
            batch = self.trainer.current
            share = [batch[i] for i in self.trainer.share(len(batch))]
            self.last = bool(share) and examples[-1] is share[-1]
            found = score(examples, *more, **named)
            if self.early and self.last and self.trainer.scorer.budget > self.tokens:
                self.calls += 1
                raise self.error
            return found

        return scored

    def differentiate(self, loss: Tensor, **more: Any) -> None:
        if not self.early and self.last and self.trainer.scorer.budget > self.tokens:
            self.calls += 1
            self.half_done += any(p.grad is not None for p in self.trainer.model.parameters())
            loss.backward()
            raise self.error
        self.backward(loss, **more)


def trained(
    method: str, folder: Path, small: int | None = None, error: str = "cuda", **more: Any
) -> tuple[Update, Any]:
    """(trainer after two epochs, the memory that failed)."""
    objective = objective_class(method)()
    data = examples(method)
    trainer = engine(tiny.model(), objective, data, folder, batch_size=8, num_train_epochs=2, **more)
    failing = None if small is None else Small(trainer, small, ERRORS[error])
    trainer.train()
    return trainer, failing


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_an_undisturbed_run(method: str, error: str, tmp_path: Path) -> None:
    plain, _ = trained(method, tmp_path / "plain")
    longest = max(cost(e, "shared") for e in plain.examples)
    disturbed, small = trained(method, tmp_path / "disturbed", small=2 * longest, error=error)
    assert small.half_done, "the failure must come when half of the gradient is there"
    assert worst(weights(disturbed.model), weights(plain.model)) < 1e-10
    assert losses(disturbed) == pytest.approx(losses(plain), abs=1e-10)
    assert disturbed.memory.keys() == plain.memory.keys()
    for name, value in plain.memory.items():
        assert torch.allclose(disturbed.memory[name], value, atol=1e-10)
    assert disturbed.tokens_seen == plain.tokens_seen > 0
    assert small.calls == len(disturbed.halvings) > 1
    for halving in disturbed.halvings:
        assert halving["step"] == 1 and halving["to"] == max(halving["from"] // 2, longest)
    assert disturbed.scorer.budget == disturbed.halvings[-1]["to"] <= 2 * longest


def test_rows_that_are_counted_twice_would_show(tmp_path: Path) -> None:
    """Metrics of the half-done step are not in the tally."""
    plain, _ = trained("dpo", tmp_path / "plain")
    disturbed, _ = trained("dpo", tmp_path / "disturbed", small=30)
    for a, b in zip(plain.state.log_history, disturbed.state.log_history, strict=True):
        skip = ("runtime", "per_second", "flos", "epoch")
        assert {k: v for k, v in a.items() if not any(s in k for s in skip)} == pytest.approx(
            {k: v for k, v in b.items() if not any(s in k for s in skip)}, abs=1e-10
        )


def test_text_beside_is_learned_once(tmp_path: Path) -> None:
    def step(small: int | None) -> Update:
        trainer = engine(tiny.model(), objective_class("dpo")(), examples("dpo"), tmp_path, batch_size=8, max_steps=2)
        text = tiny.examples(objective_class("sft").feedback.record, 5, seed=9)
        trainer.beside = Beside(text, 0.7, 3, 0)
        if small:
            Small(trainer, small, ERRORS["cuda"])
        trainer.train()
        return trainer

    disturbed, plain = step(40), step(None)
    assert disturbed.halvings and worst(weights(disturbed.model), weights(plain.model)) < 1e-10


def test_a_frozen_reference_gets_the_smaller_budget_too(tmp_path: Path) -> None:
    trainer, _ = trained("dpo", tmp_path, small=40)
    assert trainer.reference.scorer.budget == trainer.scorer.budget < WHOLE  # type: ignore[union-attr]


def test_one_example_that_does_not_fit_stops_the_run(tmp_path: Path) -> None:
    longest = max(cost(e, "shared") for e in examples("dpo"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        trained("dpo", tmp_path, small=longest - 1)


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    trainer = engine(tiny.model(), objective_class("dpo")(), examples("dpo"), tmp_path, max_steps=1)
    Small(trainer, 1, ValueError("something else"))
    with pytest.raises(ValueError, match="something else"):
        trainer.train()
    assert not trainer.halvings


def test_what_torch_raises_here_is_recognised() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(found.value), str(found.value)


SEVERAL = [(method, early) for method in ("dpo", "kto", "bco", "aot") for early in (False, True)]


def several(folder: Path, alone: bool) -> dict[str, dict[str, Any]]:
    """What each case ends with; of several processes the second one runs out of memory."""
    found = {}
    for method, early in SEVERAL:
        objective = objective_class(method)()
        data = tiny.examples(objective.feedback.record, 7, seed=5)
        trainer = engine(tiny.model(), objective, data, folder, batch_size=4, num_train_epochs=2, max_grad_norm=1.0)
        small = None if alone or trainer.main else Small(trainer, 30, ERRORS["cuda"], early)
        trainer.train()
        found[f"{method} {early}"] = {
            "weights": weights(trainer.model), "memory": dict(trainer.memory), "losses": losses(trainer),
            "halvings": trainer.halvings, "calls": small.calls if small else 0,
        }  # fmt: skip
    return found


def test_where_one_process_runs_out_all_of_them_make_the_step_again(tmp_path: Path) -> None:
    launch(2, "test_out_of_memory.py", str(tmp_path), cwd=tmp_path)
    alone = several(tmp_path, alone=True)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    for name, wanted in alone.items():
        assert second[name]["calls"] and not first[name]["calls"]
        assert (
            first[name]["halvings"] == second[name]["halvings"]
            and len(first[name]["halvings"]) == second[name]["calls"]
        )
        assert worst(first[name]["weights"], second[name]["weights"]) == 0
        assert worst(first[name]["weights"], wanted["weights"]) < 1e-9
        assert first[name]["losses"] == pytest.approx(wanted["losses"], abs=1e-10)
        for key, value in wanted["memory"].items():
            assert torch.allclose(first[name]["memory"][key], value, atol=1e-10)


def test_the_run_tells_and_records_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from tests.tiny_folder import feedback_file, tiny_folder

    said = Console(record=True, width=200)
    model, data = tiny_folder(tmp_path / "tiny"), feedback_file(tmp_path / "pairs.jsonl", "comparison", 12)
    flags = {
        "data": str(data), "model": str(model), "max_steps": 2, "batch_size": 4, "samples": 0, "finetune": "full",
        "precision": "float32", "holdout": 0, "seed": 3,
    }  # fmt: skip
    trainers: list[Update] = []
    made = run._Run._trainer
    limit = [130]

    def watched(self: Any, *args: Any) -> Update:
        trainer = made(self, *args)
        trainers.append(trainer)
        Small(trainer, limit[0], ERRORS["cpu"])
        return trainer

    monkeypatch.setattr(run._Run, "_trainer", watched)
    folder = run.train(resolve({**flags, "output": str(tmp_path / "run")}), console=said)
    engine_card = json.loads((folder / "run.json").read_text())["engine"]
    assert engine_card["out_of_memory"] == trainers[0].halvings and engine_card["out_of_memory"]
    assert engine_card["token_budget"] == trainers[0].halvings[-1]["to"]
    assert f"step 1: out of memory ({CPU}). token_budget is" in said.export_text()
    limit[0] = 10
    with pytest.raises(ModelError, match="`trimtab plan` with the same options says what fits"):
        run.train(resolve({**flags, "output": str(tmp_path / "other")}))
    assert json.loads((tmp_path / "other" / "run.json").read_text())["engine"]["out_of_memory"]


if __name__ == "__main__":
    from accelerate import PartialState

    with tempfile.TemporaryDirectory() as temporary:
        result = several(Path(temporary), alone=False)
    torch.save(result, Path(sys.argv[1]) / f"rank-{PartialState().process_index}.pt")
    PartialState().destroy_process_group()
    gc.collect()  # joins gloo's threads
