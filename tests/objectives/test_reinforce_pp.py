"""REINFORCE++ against arithmetic: rewards to go, one mean and one deviation for all tokens of the round, the group baseline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import close, credited, exactly, gradient, rollouts
from trimtab.errors import ConfigError
from trimtab.objectives.ppo import PPO
from trimtab.objectives.reinforce_pp import ReinforcePP
from trimtab.update.measure import measure

# two prompts with two answers each; log-ratios to the reference when sampled 0.2, 0.3; -0.5; 0.1; 0
BEHAVIOUR = [[[-0.5, -1.0], [-2.0]], [[-0.7], [-0.3]]]
REFERENCE = [[[-0.7, -1.3], [-1.5]], [[-0.8], [-0.3]]]
SCORES = [[1.0, 0.0], [3.0, 2.0]]


def whitened(g: list[float]) -> list[float]:
    mean = sum(g) / len(g)
    spread = math.sqrt(sum((x - mean) ** 2 for x in g) / len(g) + 1e-8)
    return [(x - mean) / spread for x in g]


def test_golden() -> None:
    """beta 0.5, gamma 0.9:  r = -0.1, 0.85; 0.25; 2.95; 2,   G = -0.1 + 0.9 * 0.85, the others are r
    G = 0.665, 0.85, 0.25, 2.95, 2: mean 1.343; whitened over all five.  A < 0 for the first three
    ratios e^0.1, e^-0.4 < 0.8 (A < 0: cut), e^-0.1; e^0.3 > 1.2 (A > 0: cut), 1
    """
    method = ReinforcePP(beta=0.5, gamma=0.9)
    policy = [[-0.4, -1.4], [-2.1], [-0.4], [-0.3]]
    batch = credited(method, rollouts(BEHAVIOUR, SCORES, REFERENCE), policy)
    a = whitened([0.665, 0.85, 0.25, 2.95, 2.0])
    assert batch.advantage.tolist() == exactly(a)
    x, y, z = a[0] * math.exp(0.1), a[2] * math.exp(-0.1), a[4]
    assert method.loss(batch).tolist() == exactly([-(x + 0.8 * a[1] + y), -(1.2 * a[3] + z)])
    assert gradient(method, batch, batch.y)[0] == exactly([-x, 0.0, -y, 0.0, -z])
    assert method.size(batch).tolist() == [3.0, 2.0]
    assert measure(method, batch)["policy/clipfrac"].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_golden_with_the_group_as_baseline() -> None:
    """Scores less their prompt's mean, 1/2, -1/2, 1/2, -1/2, then the KL: r = -0.1, 0.35; -0.25; 0.45; -0.5."""
    batch = credited(ReinforcePP(beta=0.5, baseline="group"), rollouts(BEHAVIOUR, SCORES, REFERENCE))
    assert batch.advantage.tolist() == exactly(whitened([0.25, 0.35, -0.25, 0.45, -0.5]))


def test_ratio_1() -> None:
    """-sum A = 0 over the round, whatever the rewards; the gradient by a token is -A, nothing is cut."""
    method = ReinforcePP()
    batch = credited(method, rollouts(BEHAVIOUR, SCORES, REFERENCE))
    assert abs(method.loss(batch).sum().item()) < 1e-12
    assert gradient(method, batch, batch.y)[0] == exactly([-a for a in batch.advantage.tolist()])
    assert not measure(method, batch)["policy/clipfrac"].any() and not measure(method, batch)["policy/approxkl"].any()


def test_it_is_ppo_without_a_critic() -> None:
    """V = 0 and lambda = 1: the same advantages; without weight on the critic the same loss."""
    ours, theirs = ReinforcePP(beta=0.3, gamma=0.9), PPO(beta=0.3, gamma=0.9, gae_lambda=1.0, value_weight=0.0)
    batch = rollouts(BEHAVIOUR, SCORES, REFERENCE)
    batch.y._extras["value"] = torch.zeros(5, dtype=torch.float64)
    policy = [[-0.4, -1.4], [-2.1], [-0.4], [-0.3]]
    a, b = credited(ours, batch, policy), credited(theirs, batch, policy)
    assert close(a.advantage, b.advantage) and close(ours.loss(a), theirs.loss(b))


def test_the_unit_of_the_reward_does_not_matter_without_a_kl() -> None:
    method = ReinforcePP(beta=0.0)
    once = credited(method, rollouts(BEHAVIOUR, SCORES, REFERENCE))
    more = credited(method, rollouts(BEHAVIOUR, [[7 + 100 * s for s in row] for row in SCORES], REFERENCE))
    assert close(once.advantage, more.advantage, 1e-7)


def test_rewards_alike_are_no_news() -> None:
    for baseline in ("none", "group"):
        method = ReinforcePP(beta=0.0, baseline=baseline)
        batch = credited(method, rollouts(BEHAVIOUR, [[0.7, 0.7], [0.7, 0.7]], REFERENCE))
        assert batch.advantage.tolist() == [0.0] * 5


def test_one_token_and_none() -> None:
    one = credited(ReinforcePP(), rollouts([[[-1.0]]], [[3.0]], [[[-1.2]]]))
    assert one.advantage.tolist() == [0.0]
    with_none = rollouts([[[-0.5, -1.0], [], [-2.0]]], [[1.0, 9.0, 0.0]], [[[-0.7, -1.3], [], [-1.5]]])
    batch = credited(ReinforcePP(beta=0.5, gamma=0.9), with_none)
    assert batch.advantage.tolist() == exactly(whitened([0.665, 0.85, 0.25]))


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    """To the policy that sampled, and to the reference."""
    refs = [[[by, -1.0], [-by]], [[-0.7], [by]]]
    batch = credited(ReinforcePP(), rollouts(BEHAVIOUR, SCORES, refs), [[by, 0.0], [-by], [by], [-by]])
    assert batch.advantage.isfinite().all() and ReinforcePP().loss(batch).isfinite().all()
    assert all(map(math.isfinite, gradient(ReinforcePP(), batch, batch.y)[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, r"^reinforce_pp: clip is 0\.0; expected a number above 0\.$"),
        ({"beta": -1.0}, r"^reinforce_pp: beta is -1\.0; expected a number at least 0\.$"),
        ({"gamma": 1.1}, r"^reinforce_pp: gamma is 1\.1; expected a number above 0 and at most 1\.$"),
        ({"baseline": "mean"}, r'^reinforce_pp: baseline is "mean"; expected one of none, group\.$'),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReinforcePP(**options)
