"""DPO against arithmetic."""

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
    sigma,
    softplus,
    swapped,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO


def test_golden() -> None:
    """log-ratio of the chosen:   (-0.5 + 0.7) + (-1.0 + 1.3)                  =  0.5
    log-ratio of the rejected: (-2.0 + 1.5) + (-0.25 + 0.5) + (-0.75 + 0.8) = -0.2      h = 0.7
    beta 0.5:  m = 0.35,  L = log(1 + e^-0.35) = 0.533382155418777
    dL/dm = -sigma(-0.35); by every chosen token -0.5 sigma(-0.35) = -0.206691210541335, by every rejected one +.
    """
    batch = pair()
    assert DPO(beta=0.5).loss(batch).item() == exactly(0.533382155418777) == exactly(softplus(-0.35))
    chosen, rejected = gradient(DPO(beta=0.5), batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.206691210541335] * 2)
    assert rejected == exactly([0.5 * sigma(-0.35)] * 3)
    assert DPO(beta=0.5).reward(batch.chosen).item() == exactly(0.25)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_ln_2_at_the_reference_whatever_beta(beta: float) -> None:
    batch = pairs_of([0.0])
    assert DPO(beta=beta).loss(batch).item() == exactly(math.log(2))
    assert gradient(DPO(beta=beta), batch, batch.chosen, batch.rejected) == [exactly([-beta / 2]), exactly([beta / 2])]


def test_swapping_the_sides_negates_the_margin() -> None:
    batch = random_pairs()
    h = batch.chosen.log_ratio - batch.rejected.log_ratio
    assert close(DPO(beta=0.3).loss(swapped(batch)), DPO(beta=0.3).loss(batch) + 0.3 * h)


def test_a_constant_per_prompt_on_both_references_changes_nothing() -> None:
    batch, by = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert close(DPO().loss(moved), DPO().loss(batch))
    a, b = (gradient(DPO(), x, x.chosen, x.rejected) for x in (batch, moved))
    assert same_gradient(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = pairs_of([1000.0, -1000.0], dtype=dtype)
    assert DPO(beta=1.0).loss(batch).tolist() == [0.0, 1000.0]
    assert gradient(DPO(beta=1.0), batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ConfigError, match=rf"^dpo: beta is {beta}; expected a number above 0\.$"):
        DPO(beta=beta)
