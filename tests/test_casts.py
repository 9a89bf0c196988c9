"""Weights that autocast converts are converted once in a step, and once in a scoring pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.engine import WHOLE, engine, frozen, other_model, step
from trimtab.feedback.records import Comparison
from trimtab.logprobs.layout import cost
from trimtab.logprobs.score import Scorer, casts_kept, install
from trimtab.objectives import objective_class


class Casts(TorchDispatchMode):
    """How often weights of this shape were converted: any, or those of a model."""

    def __init__(self, shape: tuple[int, int], model: nn.Module | None = None) -> None:
        super().__init__()
        self.count, self.shape = 0, shape
        self.weights = None if model is None else {p.data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += self.weights is None or args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_once_and_learn_from_every_pass() -> None:
    weight, x = nn.Parameter(torch.eye(7)), torch.ones(2, 7)

    def gradient() -> torch.Tensor:
        weight.grad = None
        for scale in (1.0, 2.0):
            with torch.autocast("cpu", torch.bfloat16):
                found = nn.functional.linear(scale * x, weight)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                nn.functional.linear(x, weight)
            found.float().sum().backward()
        assert weight.grad is not None
        return weight.grad

    with Casts((7, 7)) as apart:
        wanted = gradient()
    with Casts((7, 7)) as together, casts_kept():
        found = gradient()
    assert torch.equal(found, wanted) and found[0, 0] == 6
    assert (apart.count, together.count) == (4 + 2, 1 + 2)  # and the way back, of each pass that learns
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weight.zero_()
        assert nn.functional.linear(x, weight).abs().sum() == 0  # nothing is kept afterwards


@pytest.mark.parametrize(("name", "passes"), [("kto", 2), ("dpo", 3)])
def test_a_step_converts_a_weight_once(name: str, passes: int, tmp_path: Path) -> None:
    model, objective = tiny.model(torch.float32), objective_class(name)()
    examples = tiny.examples(objective.feedback.record, 6, seed=5)
    reference = frozen(other_model(torch.float32), "shared", torch.bfloat16)
    budget = WHOLE if name == "kto" else max(cost(e, "shared") for e in examples)
    trainer = engine(model, objective, examples, tmp_path, budget=budget, reference=reference, dtype=torch.bfloat16)
    found = []
    plain = model.forward
    model.forward = lambda *a, **k: found.append(1) or plain(*a, **k)  # type: ignore[func-returns-value]
    with Casts((48, 32), model) as casts:
        step(trainer, examples)
    assert len(found) >= passes
    assert casts.count == 2 * 2  # gate and up, in two layers


def test_scoring_converts_a_weight_once() -> None:
    model, examples = tiny.model(torch.float32), tiny.examples(Comparison, 6, seed=5)
    install(model, torch.bfloat16, "shared")
    scorer = Scorer(model, "shared", max(cost(e, "shared") for e in examples))
    assert len(scorer.microbatches(examples)) > 2
    with Casts((48, 32), model) as casts:
        scorer.score_all(examples)
    assert casts.count == 2 * 2
