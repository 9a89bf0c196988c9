"""GSPO against arithmetic, and the two ways of writing it down."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, credited, exactly, gradient, rollouts
from tests.objectives.test_grpo import BEHAVIOUR, REFERENCE, A, moved, with_advantages
from trimtab.errors import ConfigError
from trimtab.objectives.grpo import GRPO
from trimtab.objectives.gspo import GSPO


def test_golden() -> None:
    """Mean log-ratios (0.1 + 0.3)/2 = 0.2 and (-0.3 + 0.2 + 0)/3 = -1/30;  e^0.2 -> 1.1 (A > 0), e^(-1/30) within [0.8, 1.1].
    L = -A (1.1 - e^(-1/30)), by a token of the second A e^(-1/30) / 3
    """
    method, s = GSPO(clip_low=0.2, clip_high=0.1), math.exp(-1 / 30)
    batch = moved(method)
    assert method.loss(batch).tolist() == exactly([-A * (1.1 - s)])
    assert gradient(method, batch, batch.y)[0] == exactly([0.0, 0.0, A * s / 3, A * s / 3, A * s / 3])
    assert method.size(batch).tolist() == [2.0]
    assert method.metrics(batch)["clip_ratio/high_mean"].tolist() == [1, 1, 0, 0, 0]
    assert method.metrics(batch)["clip_ratio/low_mean"].tolist() == [0] * 5


def test_golden_of_the_papers_clip() -> None:
    """1.0004 and 0.9997: both answers have gone far enough."""
    batch = moved(GSPO())
    assert GSPO().loss(batch).tolist() == exactly([-A * (1.0004 - 0.9997)])
    assert gradient(GSPO(), batch, batch.y) == [[0.0] * 5]


def test_of_one_token_it_is_grpo() -> None:
    rows, later = [[[-0.5], [-1.0], [-2.0]]], [[-0.4], [-0.5], [-2.6]]
    mine, other = GSPO(clip_low=0.2, clip_high=0.3), GRPO(beta=0.0, clip_low=0.2, clip_high=0.3)
    batch = credited(mine, rollouts(rows, [[1.0, 0.6, 0.0]], rows), later)
    assert close(mine.loss(batch), other.loss(batch))
    assert gradient(mine, batch, batch.y)[0] == exactly(gradient(other, batch, batch.y)[0])


def test_on_policy_its_gradient_is_grpos() -> None:
    """s = 1: -A/|y| by each token, and the loss is minus the advantages."""
    batch = with_advantages(credited(GSPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE)), 0.9, -0.2)
    assert GSPO().loss(batch).tolist() == exactly([-0.7])
    assert gradient(GSPO(), batch, batch.y)[0] == exactly(gradient(GRPO(beta=0.0), batch, batch.y)[0])


def test_verls_form_is_the_same() -> None:
    """Each token with sg[s] pi/sg[pi] for its ratio, then the mean over tokens: loss and gradient."""
    mine = GSPO(clip_low=0.1, clip_high=0.3)
    batch = moved(mine, (0.0, 1.0))  # neither is cut
    y = batch.y
    s = (y.sum(y.token_logps - batch.behaviour) / y.length).exp().detach()[y.owner]
    token = s * (y.token_logps - y.token_logps.detach()).exp()
    theirs = -(y.sum(torch.minimum(token * batch.advantage, token.clamp(0.9, 1.3) * batch.advantage)) / y.length).sum()
    assert mine.loss(batch).sum().item() == exactly(theirs.item())
    (slope,) = torch.autograd.grad(theirs, y._token_logps)
    assert slope.abs().min() > 0.1 and gradient(mine, batch, y)[0] == exactly(slope.tolist())


def test_rewards_alike_are_no_news() -> None:
    batch = moved(GSPO(), (0.7, 0.7))
    assert GSPO().loss(batch).tolist() == [0.0] and gradient(GSPO(), batch, batch.y) == [[0.0] * 5]


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    batch = credited(GSPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]]), [[by, by], [-by, -by, -by]])
    assert GSPO().loss(batch).isfinite().all() and all(map(math.isfinite, gradient(GSPO(), batch, batch.y)[0]))


@pytest.mark.parametrize("option", ["clip_low", "clip_high"])
def test_out_of_range(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^gspo: {option} is 0\.0; expected a number above 0\.$"):
        GSPO(**{option: 0.0})  # type: ignore[arg-type]
