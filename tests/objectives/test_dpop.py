"""DPOP against arithmetic: the penalty stands inside sigma and inside beta."""

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
    softplus,
    swapped,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.dpop import DPOP


def test_golden() -> None:
    """The pair of test_dpo turned round: log-ratios -0.2 and 0.5, h = -0.7; the chosen is 0.2 below the reference.
    beta 0.5, lambda 2:  z = 0.5 (-0.7 - 2 * 0.2) = -0.55,  L = log(1 + e^0.55) = 1.00549248146133764
    by a chosen token -0.5 sigma(0.55) (1 + 2) = -0.951203386516201, by a rejected one +0.317067795505400
    """
    batch, method = swapped(pair()), DPOP(beta=0.5, penalty_weight=2.0)
    assert method.loss(batch).item() == exactly(1.00549248146133764) == exactly(softplus(0.55))
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.951203386516201] * 3) and rejected == exactly([0.317067795505400] * 2)
    assert method.reward(batch.chosen).item() == exactly(-0.1)  # without the penalty


def test_a_chosen_above_the_reference_is_dpo() -> None:
    """The pair of test_dpo as it is: L = log(1 + e^-0.35)."""
    assert DPOP(beta=0.5).loss(pair()).item() == exactly(softplus(-0.35))


def test_ln_2_at_the_reference() -> None:
    assert DPOP().loss(pairs_of([0.0])).item() == exactly(math.log(2))


def test_no_penalty_is_dpo() -> None:
    batch, method = random_pairs(), DPOP(beta=0.3, penalty_weight=0.0)
    assert close(method.loss(batch), DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (method, DPO(beta=0.3)))
    assert same_gradient(a, b)


def test_the_penalty_is_not_outside() -> None:
    """The first version's -log sigma(beta h) + lambda max(0, ...) would have no factor sigma(-z) in its gradient."""
    batch = pairs_of([-0.4])
    outside = DPO(beta=0.3).loss(batch) + 50 * 0.2
    assert not close(DPOP().loss(batch), outside, 1e-2) and DPOP().loss(batch).item() == exactly(softplus(0.3 * 10.4))


def test_it_sees_absolute_log_ratios() -> None:
    """A constant on both references leaves DPO as it is, not DPOP (spec 32)."""
    batch, by = random_pairs(), torch.full((7,), 3.0, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert close(DPO().loss(moved), DPO().loss(batch)) and (DPOP().loss(moved) > DPOP().loss(batch) + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """h = -1000, the chosen at -500: z = -(1000 + 50 * 500)."""
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), DPOP(beta=1.0)
    assert method.loss(batch).tolist() == [0.0, 26000.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -51.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^dpop: penalty_weight is -1\.0; expected a number at least 0\.$"):
        DPOP(penalty_weight=-1.0)
    with pytest.raises(ConfigError, match=r"^dpop: beta is 0\.0; expected a number above 0\.$"):
        DPOP(beta=0.0)
