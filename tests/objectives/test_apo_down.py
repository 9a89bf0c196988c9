"""APO-down against arithmetic."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, shifted
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.apo_down import APODown


def test_golden() -> None:
    """The pair of test_dpo, beta 0.5: r_w = 0.25, r_l = -0.1.  L = sigma(0.25) + sigma(-0.35) = 0.975558921968468
    times 0.5: sigma'(0.25) - sigma'(0.35) -> 0.0018183438575491, sigma'(0.35) -> 0.12124869751125
    """
    batch, method = pair(), APODown(beta=0.5)
    assert method.loss(batch).item() == exactly(0.975558921968468)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.0018183438575491] * 2) and rejected == exactly([0.12124869751125] * 3)


def test_at_the_reference() -> None:
    """1; the two pulls on the chosen answer cancel, the rejected one goes down."""
    batch = pairs_of([0.0])
    assert APODown(beta=0.2).loss(batch).item() == exactly(1.0)
    assert gradient(APODown(beta=0.2), batch, batch.chosen, batch.rejected) == [exactly([0.0]), exactly([0.05])]


def test_both_fall_where_the_pair_is_already_apart() -> None:
    batch = pairs_of([3.0])
    assert all(g[0] > 0 for g in gradient(APODown(beta=1.0), batch, batch.chosen, batch.rejected))


def test_a_constant_on_both_references_matters() -> None:
    batch, by = random_pairs(), torch.ones(7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert not close(APODown().loss(moved), APODown().loss(batch), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), APODown(beta=1.0)
    assert method.loss(batch).tolist() == exactly([1.0, 1.0])
    assert gradient(method, batch, batch.chosen, batch.rejected) == [exactly([0.0, 0.0])] * 2


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^apo_down: beta is -1\.0; expected a number above 0\.$"):
        APODown(beta=-1.0)
