"""TODO against arithmetic, as a probability model, and against DPO."""

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
    sigma,
    softplus,
    swapped,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.todo import TODO

ALPHAS = [1e-6, 0.01, 0.5, 3.0, 40.0, 300.0]


def test_golden_preference() -> None:
    """The pair of test_dpo, beta 0.5: m = 0.35; alpha 0.3.  L = log(1 + e^(0.3 - 0.35)) = 0.668459648013286
    dL/dm = -sigma(-0.05); times 0.5: -+0.243751301757895 by every token.
    """
    batch, method = pair(), TODO(beta=0.5, alpha=0.3)
    assert method.loss(batch).item() == exactly(0.668459648013286) == exactly(softplus(-0.05))
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.243751301757895] * 2) and rejected == exactly([0.243751301757895] * 3)


def test_golden_tie() -> None:
    """The same pair called a tie.  L = log(1 + e^0.65) + log(1 + e^-0.05) - log(e^0.6 - 1) = 1.93438535206232
    dL/dm = sigma(0.65) - sigma(-0.05); times 0.5: +-0.0847539295788546 (the larger reward is pulled down).
    """
    batch, method = pair(tie=True), TODO(beta=0.5, alpha=0.3)
    assert method.loss(batch).item() == exactly(1.93438535206232)
    assert method.loss(batch).item() == exactly(softplus(0.65) + softplus(-0.05) - math.log(math.exp(0.6) - 1))
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.0847539295788546] * 2) and rejected == exactly([-0.0847539295788546] * 3)


def test_at_the_reference() -> None:
    """Spec 0.1, alpha 0.5: preference softplus(0.5) = 0.974077, tie 2 softplus(0.5) - log(e - 1) = 1.406829."""
    assert TODO().loss(pairs_of([0.0])).item() == exactly(softplus(0.5)) == pytest.approx(0.974077, abs=1e-6)
    tie = TODO().loss(pairs_of([0.0], tie=True)).item()
    assert tie == exactly(2 * softplus(0.5) - math.log(math.e - 1)) == pytest.approx(1.406829, abs=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_win_lose_and_tie_are_all_there_is(alpha: float) -> None:
    odds = TODO(beta=1.0, alpha=alpha).log_odds(pairs_of([-1000.0, -3.0, 0.0, 0.2, 3.0, 1000.0]))
    assert close(sum(p.exp() for p in odds), torch.ones(6, dtype=torch.float64), 1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.5, 3.0])
def test_tie_is_the_band_between_the_two_thresholds(alpha: float) -> None:
    """P(tie) = sigma(m + alpha) - sigma(m - alpha) (spec 19)."""
    h = [-3.0, 0.0, 0.2, 3.0]
    tie = TODO(beta=1.0, alpha=alpha).loss(pairs_of(h, tie=True))
    wanted = [-math.log(sigma(m + alpha) - sigma(m - alpha)) for m in h]
    assert tie.tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_tie_gradient_is_0_at_0_and_odd(alpha: float) -> None:
    def slope(*h: float) -> list[float]:
        batch = pairs_of(h, tie=True)
        return gradient(TODO(beta=1.0, alpha=alpha), batch, batch.chosen)[0]

    assert slope(0.0) == [0.0]
    right, left = slope(0.1, 1.0, 30.0, 1000.0), slope(-0.1, -1.0, -30.0, -1000.0)
    assert right == exactly([-x for x in left])
    wanted = [sigma(m + alpha) - sigma(alpha - m) for m in (0.1, 1.0, 30.0, 1000.0)]
    assert right == exactly(wanted) and all(x >= 0 for x in right)


def test_narrow_band_is_dpo() -> None:
    """alpha -> 0: preferences are DPO's in value and gradient; the tie's gradient is tanh(m / 2)."""
    batch = random_pairs()
    assert close(TODO(beta=0.3, alpha=1e-12).loss(batch), DPO(beta=0.3).loss(batch), 1e-11)
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (TODO(beta=0.3, alpha=1e-12), DPO(beta=0.3)))
    assert same_gradient(a, b, 1e-11)
    tie = pairs_of([0.7], tie=True)
    assert gradient(TODO(beta=1.0, alpha=1e-12), tie, tie.chosen)[0] == exactly([math.tanh(0.35)])


def test_a_tie_does_not_know_its_sides() -> None:
    batch = random_pairs(ties=True)
    assert batch.tie.any() and not batch.tie.all()
    straight, turned = TODO(beta=0.3).loss(batch), TODO(beta=0.3).loss(swapped(batch))
    assert close(straight[batch.tie], turned[batch.tie]) and not close(straight[~batch.tie], turned[~batch.tie])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tie", [False, True])
def test_log_ratios_of_1000_and_every_alpha(alpha: float, tie: bool, dtype: torch.dtype) -> None:
    h = [-1000.0, -1.0, 0.0, 1.0, 1000.0]
    batch, method = pairs_of(h, tie=tie, dtype=dtype), TODO(beta=1.0, alpha=alpha)
    log_band = 2 * alpha + math.log(-math.expm1(-2 * alpha))
    wanted = [softplus(m + alpha) + softplus(alpha - m) - log_band if tie else softplus(alpha - m) for m in h]
    # sums of a few thousand, rounded
    assert method.loss(batch).tolist() == pytest.approx(wanted, abs=6000 * torch.finfo(dtype).eps)
    slope = gradient(method, batch, batch.chosen)[0]
    expected = [sigma(m + alpha) - sigma(alpha - m) if tie else -sigma(alpha - m) for m in h]
    assert slope == pytest.approx(expected, abs=4 * torch.finfo(dtype).eps)


def test_metrics_count_three_ways() -> None:
    """alpha 2, beta 1: the likeliest outcome at m = 9, 0, 0, -9 is win, tie, tie, lose; said: win, win, tie, tie."""
    h = pairs_of([9.0, 0.0, 0.0, -9.0])
    batch = Pairs(h.chosen, h.rejected, torch.tensor([False, False, True, True]))
    found = TODO(beta=1.0, alpha=2.0).metrics(batch)
    assert found["accuracies/three_way"].tolist() == [1, 0, 1, 0] and found["accuracies/tie"].tolist() == [1, 0]
    assert found["p_tie"][1].item() == exactly(sigma(2.0) - sigma(-2.0))


def test_a_draw_between_the_answers_is_not_right() -> None:
    """alpha 0.5 at m = 0: each answer wins with sigma(-0.5) = 0.378, a tie has 0.245. Nothing was told apart."""
    h = pairs_of([0.0, 0.0])
    found = TODO(beta=1.0, alpha=0.5).metrics(Pairs(h.chosen, h.rejected, torch.tensor([False, True])))
    assert found["accuracies/three_way"].tolist() == [0, 0]


@pytest.mark.parametrize("alpha", [0.0, -0.5, math.nan])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match=rf"^todo: alpha is {alpha}; expected a number above 0\.$"):
        TODO(alpha=alpha)
