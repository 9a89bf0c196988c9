"""Robust DPO against arithmetic and against DPO."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, same_gradient, swapped
from trimtab.errors import ConfigError
from trimtab.objectives.dpo import DPO
from trimtab.objectives.robust_dpo import RobustDPO


def test_golden() -> None:
    """The pair of test_dpo, beta 0.5: m = 0.35; flip rate 0.2, 1 - 2 * 0.2 = 0.6.
    L = (0.8 log(1 + e^-0.35) - 0.2 log(1 + e^0.35)) / 0.6
      = (0.8 * 0.533382155418777 - 0.2 * 0.883382155418777) / 0.6 = 0.41671548875211
    dL/dm = -(0.8 sigma(-0.35) + 0.2 sigma(0.35)) / 0.6; times 0.5: -+0.373357877208002 by every token.
    """
    batch, method = pair(), RobustDPO(beta=0.5, flip_rate=0.2)
    assert method.loss(batch).item() == exactly(0.41671548875211)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.373357877208002] * 2) and rejected == exactly([0.373357877208002] * 3)


def test_ln_2_at_the_reference() -> None:
    assert RobustDPO(flip_rate=0.3).loss(pairs_of([0.0])).item() == exactly(math.log(2))


def test_no_flips_is_dpo() -> None:
    batch = random_pairs()
    assert close(RobustDPO(beta=0.3, flip_rate=0.0).loss(batch), DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (RobustDPO(flip_rate=0.0), DPO()))
    assert same_gradient(a, b)


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.45])
def test_dpo_minus_a_line(eps: float) -> None:
    """robust = DPO - eps / (1 - 2 eps) beta h (spec 3)."""
    batch = random_pairs()
    line = eps / (1 - 2 * eps) * 0.3 * (batch.chosen.log_ratio - batch.rejected.log_ratio)
    assert close(RobustDPO(beta=0.3, flip_rate=eps).loss(batch), DPO(beta=0.3).loss(batch) - line)


def test_unbiased_under_flips() -> None:
    """(1 - eps) L(w, l) + eps L(l, w) = DPO(w, l): what the method is for."""
    batch, method = random_pairs(), RobustDPO(beta=0.3, flip_rate=0.2)
    assert close(0.8 * method.loss(batch) + 0.2 * method.loss(swapped(batch)), DPO(beta=0.3).loss(batch))


def test_unbounded_below() -> None:
    """m = 100, eps = 0.1: 0.1 * (-100) / 0.8 = -12.5 (spec 3)."""
    assert RobustDPO(beta=0.1, flip_rate=0.1).loss(pairs_of([1000.0])).item() == exactly(-12.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """eps = 0.25: L = -(0.25 / 0.5) 1000 at +1000, and 1000 + 0.5 * 1000 at -1000; slopes -0.5 and -1.5."""
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), RobustDPO(beta=1.0, flip_rate=0.25)
    assert method.loss(batch).tolist() == [-500.0, 1500.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[-0.5, -1.5], [0.5, 1.5]]


@pytest.mark.parametrize("eps", [0.5, 0.9, -0.1, math.nan])
def test_flip_rate_out_of_range(eps: float) -> None:
    message = rf"^robust_dpo: flip_rate is {eps}; expected a number at least 0 and below 0\.5\.$"
    with pytest.raises(ConfigError, match=message):
        RobustDPO(flip_rate=eps)
    with pytest.raises(ConfigError, match=r"^robust_dpo: beta is 0; expected a number above 0\.$"):
        RobustDPO(beta=0)
