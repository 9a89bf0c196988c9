"""IPO against arithmetic, and what the mean over tokens changes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import (
    close,
    exactly,
    gradient,
    pair,
    pairs_of,
    random_pairs,
    same_gradient,
    shifted,
    swapped,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.ipo import IPO


def test_golden_sum() -> None:
    """The pair of test_dpo, h = 0.5 + 0.2 = 0.7; tau 0.25: target 2.  L = (-1.3)^2 = 1.69,  dL/dh = -2.6."""
    batch, method = pair(), IPO(tau=0.25, aggregation="sum")
    assert method.loss(batch).item() == exactly(1.69)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-2.6] * 2) and rejected == exactly([2.6] * 3)
    assert method.reward(batch.chosen).item() == exactly(0.125)


def test_golden_mean() -> None:
    """0.5/2 + 0.2/3 - 2 = -1.683333333333333: squared 2.833611111111111; -+3.366666666666667 over 2 and over 3."""
    batch, method = pair(), IPO(tau=0.25)
    assert method.loss(batch).item() == exactly(2.833611111111111)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-1.683333333333333] * 2) and rejected == exactly([1.122222222222222] * 3)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_at_the_reference(aggregation: str) -> None:
    """1/(4 tau^2), and no 0/0 where every log-ratio is 0 (HALOs' divisor counts those that are not)."""
    assert IPO(tau=0.1, aggregation=aggregation).loss(pairs_of([0.0])).item() == exactly(25.0)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_the_best_margin_is_finite_and_the_loss_is_never_negative(aggregation: str) -> None:
    h = torch.linspace(-20, 20, 41).tolist()
    batch, method = pairs_of([*h, 5.0]), IPO(tau=0.1, aggregation=aggregation)
    assert (method.loss(batch) >= 0).all() and method.loss(batch)[-1].item() == exactly(0.0)
    assert gradient(method, batch, batch.chosen)[0][-1] == exactly(0.0)


def test_swapping_the_sides_negates_the_margin() -> None:
    """(h - c)^2 - (-h - c)^2 = -4 h c."""
    batch = random_pairs()
    h = batch.chosen.log_ratio - batch.rejected.log_ratio
    method = IPO(tau=0.5, aggregation="sum")
    assert close(method.loss(batch) - method.loss(swapped(batch)), -4 * h)


def test_a_constant_per_prompt_on_both_references_matters_to_the_mean_only() -> None:
    batch, by = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    total, mean = IPO(aggregation="sum"), IPO()
    assert close(total.loss(moved), total.loss(batch)) and not close(mean.loss(moved), mean.loss(batch), 1e-3)
    a, b = (gradient(total, x, x.chosen, x.rejected) for x in (batch, moved))
    assert same_gradient(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), IPO(tau=0.5, aggregation="sum")
    assert method.loss(batch).tolist() == [999.0**2, 1001.0**2]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[1998.0, -2002.0], [-1998.0, 2002.0]]


def test_out_of_range() -> None:
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=rf"^ipo: tau is {tau}; expected a number above 0\.$"):
            IPO(tau=tau)
    with pytest.raises(ConfigError, match=r'^ipo: aggregation is "token"; expected one of mean, sum\.$'):
        IPO(aggregation="token")
