"""WPO: golden values, the clamp, and what it is equal to (spec 24)."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import CHOSEN, REF_CHOSEN, REF_REJECTED, REJECTED, close, completions, exactly, gradient
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.wpo import WPO


def pair(collisions: tuple[list[float], list[float]], dtype: torch.dtype = torch.float64) -> Pairs:
    chosen, rejected = completions(CHOSEN, REF_CHOSEN, dtype), completions(REJECTED, REF_REJECTED, dtype)
    for y, values in zip((chosen, rejected), collisions, strict=True):
        y._extras["collision"] = torch.tensor(values, dtype=dtype)
    return Pairs(chosen, rejected, torch.tensor([False]))


def test_golden() -> None:
    """h = 0.7, beta 0.5: DPO's loss is log(1 + e^-0.35) = 0.533382... and its slope by h -0.5 sigma(-0.35).
    w(y_w) = exp(((-0.5 + 0.4) + (-1.0 + 0.6)) / 2) = e^-0.25
    w(y_l) = exp(((-2.0 + 1.0) + (-0.25 + 0.3) + (-0.75 + 0.5)) / 3) = e^-0.4;  the product e^-0.65 = 0.522045776761016
    """
    batch, method = pair(([-0.4, -0.6], [-1.0, -0.3, -0.5])), WPO(beta=0.5)
    dpo, weight = 0.533382155418777, 0.522045776761016
    assert method.weight(batch).item() == exactly(weight)
    assert DPO(beta=0.5).loss(batch).item() == exactly(dpo)
    assert method.loss(batch).item() == exactly(weight * dpo)
    # the weight has no gradient
    slope = 0.5 * 0.413382421082671 * weight
    assert gradient(method, batch, batch.chosen, batch.rejected) == [exactly([-slope] * 2), exactly([slope] * 3)]


def test_the_product_is_clamped() -> None:
    """w(y_w) = e^0.5, w(y_l) = e^0.2: the authors hold the product at 1, which is DPO; TRL from 0.29 lets it be e^0.7."""
    batch = pair(([-1.0, -1.5], [-2.2, -0.45, -0.95]))
    dpo = DPO(beta=0.01).loss(batch)
    assert close(WPO().loss(batch), dpo)
    assert WPO(clamp=False).loss(batch).item() == exactly(dpo.item() * 2.0137527074704766)


def test_the_weight_is_of_the_product_not_of_each() -> None:
    """w(y_w) = e^0.5 and w(y_l) = e^-0.5: the product is 1; clamping each would give e^-0.5."""
    batch = pair(([-1.0, -1.5], [-1.5, 0.25, -0.25]))
    assert WPO().weight(batch).item() == exactly(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    batch = pair(([-1000.0, -900.0], [-1e-8, -1000.0, 0.0]), dtype)
    for method in (WPO(beta=1.0), WPO(beta=1.0, clamp=True)):
        assert torch.isfinite(method.loss(batch)).all()
        assert all(torch.isfinite(torch.tensor(g)).all() for g in gradient(method, batch, batch.chosen))
