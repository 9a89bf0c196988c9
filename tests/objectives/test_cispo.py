"""CISPO against arithmetic, and that no token loses its gradient."""

from __future__ import annotations

import math

import pytest

from tests.objectives.by_hand import credited, exactly, gradient, rollouts
from tests.objectives.test_grpo import BEHAVIOUR, REFERENCE, A, moved, with_advantages
from trimtab.errors import ConfigError
from trimtab.objectives.cispo import CISPO
from trimtab.objectives.dapo import DAPO


def test_golden() -> None:
    """Cap 1.2, weights e^0.1, e^0.3 -> 1.2 and e^-0.3, e^0.2 -> 1.2, 1; log-probs -0.4, -0.7 and -2.3, -0.4, -0.3.
    L = A (0.4 e^0.1 + 0.7 * 1.2) - A (2.3 e^-0.3 + 0.4 * 1.2 + 0.3), by a token -A times its weight, over 5 tokens
    """
    method = CISPO(cap=1.2)
    batch = moved(method)
    good, bad = 0.4 * math.exp(0.1) + 0.7 * 1.2, 2.3 * math.exp(-0.3) + 0.4 * 1.2 + 0.3
    assert method.loss(batch).tolist() == exactly([A * good - A * bad])
    assert gradient(method, batch, batch.y)[0] == exactly(
        [-A * math.exp(0.1), -1.2 * A, A * math.exp(-0.3), 1.2 * A, A]
    )
    assert method.size(batch).tolist() == [5.0]
    told = method.metrics(batch)  # as TRL counts: capped, and A > 0
    assert list(told) == ["clip_ratio/high_mean"] and told["clip_ratio/high_mean"].tolist() == [0, 1, 0, 0, 0]


def test_the_weight_has_no_gradient_and_no_lower_bound() -> None:
    """A token at ratio e^-3 counts e^-3, not 0.8; with a gradient through the weight its slope would be (1 + log pi) as much."""
    policy = [[-3.5, -1.0], [-2.0, -0.6, -0.3]]
    batch = credited(CISPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]]), policy)
    assert gradient(CISPO(), batch, batch.y)[0][0] == exactly(-A * math.exp(-3))


def test_no_token_loses_its_gradient() -> None:
    """Where DAPO has cut a token off on either side, it is still pushed."""
    batch = moved(CISPO())
    assert gradient(DAPO(), batch, batch.y)[0].count(0.0) == 2
    assert all(gradient(CISPO(), batch, batch.y)[0])


def test_on_policy_its_gradient_is_dapos() -> None:
    """Weight 1: REINFORCE on every token. The value is another: -A log pi."""
    batch = with_advantages(credited(CISPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE)), 0.9, -0.2)
    assert gradient(CISPO(), batch, batch.y)[0] == exactly(gradient(DAPO(), batch, batch.y)[0])
    assert CISPO().loss(batch).tolist() == exactly([0.9 * 1.5 - 0.2 * 2.9])


def test_rewards_alike_are_no_news() -> None:
    batch = moved(CISPO(), (0.7, 0.7))
    assert CISPO().loss(batch).tolist() == [0.0] and gradient(CISPO(), batch, batch.y)[0] == exactly([0.0] * 5)


def test_the_deviation_can_be_the_populations() -> None:
    assert moved(CISPO(deviation="population")).advantage[0].item() == exactly(0.5 / 0.5001)


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    batch = credited(CISPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]]), [[by, 0.0], [0.0, by, -by]])
    assert CISPO().loss(batch).isfinite().all() and all(map(math.isfinite, gradient(CISPO(), batch, batch.y)[0]))


def test_out_of_range() -> None:
    """A cap below 1 would weigh what was sampled just now by less than 1."""
    with pytest.raises(ConfigError, match=r"^cispo: cap is 0\.9; expected a number at least 1\.$"):
        CISPO(cap=0.9)
