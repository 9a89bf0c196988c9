"""The losses of RSO against arithmetic and against DPO."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, same_gradient, shifted
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.rso import RSO


def test_golden_hinge() -> None:
    """The pair of test_dpo, gamma 0.5: z = 0.35,  L = 1 - 0.35,  -+0.5 by every token; h = 2.1 satisfies it."""
    batch, method = pair(), RSO(gamma=0.5)
    assert method.loss(batch).item() == exactly(0.65) and method.reward(batch.chosen).item() == exactly(0.25)
    assert gradient(method, batch, batch.chosen, batch.rejected) == [exactly([-0.5] * 2), exactly([0.5] * 3)]
    won = pairs_of([2.1])
    assert method.loss(won).tolist() == [0.0] and gradient(method, won, won.chosen, won.rejected) == [[0.0], [0.0]]


def test_golden_sigmoid() -> None:
    """L = log(1 + e^-0.35) = 0.533382155418777; by a chosen token -0.5 sigma(-0.35) = -0.206691210541335."""
    batch, method = pair(), RSO(gamma=0.5, function="sigmoid_norm")
    assert method.loss(batch).item() == exactly(0.533382155418777)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.206691210541335] * 2) and rejected == exactly([0.206691210541335] * 3)


def test_at_the_reference() -> None:
    assert RSO().loss(pairs_of([0.0])).item() == exactly(1.0)


def test_sigmoid_norm_is_dpo_and_hinge_norm_is_not() -> None:
    batch, sigmoid = random_pairs(), RSO(gamma=0.3, function="sigmoid_norm")
    assert close(sigmoid.loss(batch), DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (sigmoid, DPO(beta=0.3)))
    assert same_gradient(a, b) and not close(RSO(gamma=0.3).loss(batch), sigmoid.loss(batch), 1e-3)


@pytest.mark.parametrize("function", ["hinge_norm", "sigmoid_norm"])
def test_a_constant_per_prompt_on_both_references_changes_nothing(function: str) -> None:
    batch, by, method = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64), RSO(function=function)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert close(method.loss(moved), method.loss(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("function", "lost"), [("hinge_norm", 1001.0), ("sigmoid_norm", 1000.0)])
def test_log_ratios_of_1000(function: str, lost: float, dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), RSO(gamma=1.0, function=function)
    assert method.loss(batch).tolist() == [0.0, lost]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^rso: gamma is 0\.0; expected a number above 0\.$"):
        RSO(gamma=0.0)
    with pytest.raises(ConfigError, match=r'^rso: function is "hinge"; expected one of hinge_norm, sigmoid_norm\.$'):
        RSO(function="hinge")
