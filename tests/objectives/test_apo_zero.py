"""APO-zero against arithmetic and against KTO without a reference point."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, shifted, thumbs
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.apo_zero import APOZero
from trimtab.objectives.kto import KTO


def test_golden() -> None:
    """The pair of test_dpo, beta 0.5: r_w = 0.25, r_l = -0.1.  L = sigma(-0.25) + sigma(-0.1) = 0.912844311635262
    times 0.5: -sigma'(0.25) -> -0.123067041368799, sigma'(-0.1) -> 0.124688020096446
    """
    batch, method = pair(), APOZero(beta=0.5)
    assert method.loss(batch).item() == exactly(0.912844311635262)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.123067041368799] * 2) and rejected == exactly([0.124688020096446] * 3)


def test_at_the_reference() -> None:
    """1, with the + 1 of TRL."""
    batch = pairs_of([0.0])
    assert APOZero(beta=0.2).loss(batch).item() == exactly(1.0)
    assert gradient(APOZero(beta=0.2), batch, batch.chosen, batch.rejected) == [exactly([-0.05]), exactly([0.05])]


def test_it_is_kto_with_the_reference_point_at_0() -> None:
    rho = [0.5, -2.0]
    kto = KTO(beta=0.3).loss(thumbs([rho[0], rho[1]], [True, False], []))
    y = thumbs(rho, [True, False], []).y
    batch = Pairs(y.take(torch.tensor([0])), y.take(torch.tensor([1])), torch.tensor([False]))
    assert close(APOZero(beta=0.3).loss(batch), kto.sum().reshape(1))


def test_a_constant_on_both_references_matters() -> None:
    batch, by = random_pairs(), torch.ones(7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert not close(APOZero().loss(moved), APOZero().loss(batch), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Between 0 and 2; saturated rewards have no gradient."""
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), APOZero(beta=1.0)
    assert method.loss(batch).tolist() == exactly([0.0, 2.0])
    assert gradient(method, batch, batch.chosen, batch.rejected) == [exactly([0.0, 0.0])] * 2


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^apo_zero: beta is 0\.0; expected a number above 0\.$"):
        APOZero(beta=0.0)
