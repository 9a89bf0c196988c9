"""The engine around a tiny model: what tests of the engine share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from tests import tiny
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.reference import FrozenCopy, Reference
from trimtab.logprobs.score import Scorer, install
from trimtab.objectives.base import Objective
from trimtab.tokens.batch import Example
from trimtab.update.trainer import Update

WHOLE = 10**6  # a token budget that nothing exceeds


def other_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Not the policy: log-ratios are far from 0."""
    return tiny.model(dtype, seed=1)


def frozen(model: nn.Module, mode: Mode = "padded", dtype: torch.dtype = torch.float64) -> FrozenCopy:
    """A reference out of a model that no one else uses."""
    model = copy.deepcopy(model)
    install(model, dtype, mode)
    return FrozenCopy(model, Scorer(model, mode, WHOLE), dtype, "a test")


def engine(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    folder: Path,
    *,
    mode: Mode = "shared",
    budget: int = WHOLE,
    batch_size: int | None = None,
    reference: Reference | None = None,
    dtype: torch.dtype = torch.float64,
    held_out: Sequence[Example] = (),
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> Update:
    """An :class:`Update` on ``model`` itself; the reference is another random model where none is given."""
    install(model, dtype, mode)
    if reference is None and "reference" in objective.needs:
        reference = frozen(other_model(dtype), mode, dtype)
    plain = {
        "output_dir": str(folder / "checkpoints"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = TrainingArguments(**{**plain, **arguments})
    size = batch_size or len(examples)
    return Update(model, objective, Scorer(model, mode, budget), reference, examples, size, args, held_out, callbacks)


def step(trainer: Update, examples: Sequence[Example] | None = None) -> tuple[float, dict[str, Tensor]]:
    """(loss, name -> gradient) of one training step, weights untouched."""
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, list(trainer.examples if examples is None else examples)).item()
    return loss, gradients(trainer.model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses(trainer: Update) -> list[float]:
    """The logged loss of every step so far."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two sets of named tensors, relative to the largest entry; the names must agree."""
    assert a.keys() == b.keys() and a
    return max(_apart(a[n], b[n]) for n in a)


def _apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]], tolerance: float = 1e-10) -> None:  # fmt: skip  # noqa: E501
    """Loss and every parameter's gradient agree, and the gradient is not simply zero."""
    assert abs(found[0] - wanted[0]) <= tolerance * max(1, abs(wanted[0])), (found[0], wanted[0])
    assert worst(found[1], wanted[1]) <= tolerance
    assert all(g.abs().max() > 1e-8 for g in wanted[1].values())


def lengths(examples: Iterable[Example]) -> set[int]:
    return {len(c) for e in examples for c in e.completions}
