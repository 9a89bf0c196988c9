"""cDPO: golden values, its optimum, and what it is equal to."""

import math

import pytest
import torch

from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.cdpo import CDPO
from trimtab.objectives.dpo import DPO
from trimtab.objectives.robust_dpo import RobustDPO


def pair(h: float, dtype: torch.dtype = torch.float64) -> tuple[Pairs, torch.Tensor]:
    """One comparison of one token each, whose log-ratio margin is ``h`` nats; and the chosen log-prob, a leaf."""
    chosen = torch.tensor([h - 2.0], dtype=dtype, requires_grad=True)
    one, ref = torch.tensor([1]), torch.tensor([-2.0], dtype=dtype)
    view = Pairs(Completions(chosen, one, ref), Completions(ref.clone(), one, ref), torch.tensor([False]))
    return view, chosen


def test_golden() -> None:
    """beta = 0.5, h = 3, eps = 0.2: m = 1.5.

    log sigma(1.5)  = -log(1 + e^-1.5) = -0.2014132779827524
    log sigma(-1.5) = -1.5 - 0.2014132779827524 = -1.7014132779827524
    L = 0.8 * 0.2014132779827524 + 0.2 * 1.7014132779827524 = 0.5014132779827524
    dL/dm = -0.8 sigma(-1.5) + 0.2 sigma(1.5) = -0.8 * 0.1824255238063563 + 0.2 * 0.8175744761936437
          = 0.0175744761936437, and dL/dlogp_w = beta dL/dm = 0.0087872380968218
    """
    view, chosen = pair(3.0)
    loss = CDPO(beta=0.5, label_smoothing=0.2).loss(view)
    assert loss.item() == pytest.approx(0.5014132779827524, abs=1e-10)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert slope.item() == pytest.approx(0.00878723809682185, abs=1e-10)


@pytest.mark.parametrize("h", [-7.0, 0.0, 0.3, 40.0])
def test_it_is_dpo_plus_a_line_and_robust_dpo_minus_one(h: float) -> None:
    """cDPO = DPO + eps beta h; eps = 0 is DPO; robust DPO has the opposite sign (spec 3)."""
    view, _ = pair(h)
    dpo, eps, beta = DPO(beta=0.3).loss(view), 0.1, 0.3
    torch.testing.assert_close(CDPO(beta, eps).loss(view), dpo + eps * beta * h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(CDPO(beta, 0.0).loss(view), dpo, rtol=0, atol=0)
    robust = RobustDPO(beta, eps).loss(view)
    torch.testing.assert_close(robust, dpo - eps / (1 - 2 * eps) * beta * h, rtol=1e-12, atol=1e-12)


def test_at_the_reference_it_is_ln_2_and_its_optimum_is_finite() -> None:
    view, _ = pair(0.0)
    assert CDPO().loss(view).item() == pytest.approx(math.log(2), abs=1e-12)
    best, chosen = pair(math.log(0.9 / 0.1) / 0.5)
    (slope,) = torch.autograd.grad(CDPO(beta=0.5, label_smoothing=0.1).loss(best).sum(), chosen)
    assert abs(slope.item()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [-1000.0, 1000.0])
def test_extremes_stay_finite(h: float, dtype: torch.dtype) -> None:
    view, chosen = pair(h, dtype)
    loss = CDPO(beta=1.0).loss(view)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert torch.isfinite(loss).all() and torch.isfinite(slope).all()


def test_half_of_the_labels_cannot_be_doubted() -> None:
    with pytest.raises(ConfigError, match="cdpo: label_smoothing is 0.5; expected a number at least 0 and below 0.5"):
        CDPO(label_smoothing=0.5)
