"""RLOO against arithmetic, and what leaving one out means."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, credited, exactly, gradient, rollouts
from trimtab.credit.group import centred, leave_one_out, standardised
from trimtab.errors import ConfigError
from trimtab.objectives.rloo import RLOO

BEHAVIOUR = [[[-0.5, -1.0], [-2.0], [-0.25, -0.75]]]
REFERENCE = [[[-0.7, -1.3], [-1.5], [-0.5, -0.8]]]
POLICY = [[-0.4, -1.0], [-2.3], [-0.25, -0.5]]


def test_golden() -> None:
    """beta 0.5, log-ratios when sampled 0.5, -0.5, 0.3:  R = 1 - 0.25, 0 + 0.25, 0.5 - 0.15 = 0.75, 0.25, 0.35
    A = 0.75 - 0.3, 0.25 - 0.55, 0.35 - 0.5 = 0.45, -0.3, -0.15
    ratios e^0.1, e^-0.3, e^0.25; the second is cut at 0.8 (A < 0: nothing to gain), the third is not (A < 0 and above 1)
    L = -(0.45 e^0.1 - 0.3 * 0.8 - 0.15 e^0.25);  by a token: -A ratio, 0 where it is cut
    """
    batch, method = rollouts(BEHAVIOUR, [[1.0, 0.0, 0.5]], REFERENCE), RLOO(beta=0.5)
    batch = credited(method, batch, POLICY)
    assert batch.advantage.tolist() == exactly([0.45, 0.45, -0.3, -0.15, -0.15])
    a, b = 0.45 * math.exp(0.1), 0.15 * math.exp(0.25)
    assert method.loss(batch).tolist() == exactly([-(a - 0.24 - b)])
    assert gradient(method, batch, batch.y)[0] == exactly([-a, -a, 0.0, b, b])
    assert method.size(batch).tolist() == [3.0]


def test_on_policy_it_is_reinforce() -> None:
    """Ratio 1: the value is -sum A = 0, the gradient by every token of an answer is -A."""
    batch = credited(RLOO(beta=0.0), rollouts(BEHAVIOUR, [[1.0, 0.0, 0.5]], REFERENCE))
    assert RLOO().loss(batch).tolist() == exactly([0.0])
    assert gradient(RLOO(), batch, batch.y)[0] == exactly([-0.75, -0.75, 0.75, 0.0, 0.0])


def test_leaving_one_out() -> None:
    reward = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 7.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    found = leave_one_out(reward, group)
    assert found.tolist() == [2.0, -2.0, 0.0, 0.0, 0.0, 0.0]  # two answers: their difference; alike or alone: nothing
    four = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_two = torch.tensor([0] * 4 + [1] * 4)
    assert close(leave_one_out(four, of_two), 4 / 3 * centred(four, of_two))
    assert close(leave_one_out(four + 5, of_two), leave_one_out(four, of_two))


@pytest.mark.parametrize(("deviation", "wanted"), [("sample", 0.5**0.5), ("population", 1.0)])
def test_standardised_pair(deviation: str, wanted: float) -> None:
    found = standardised(torch.tensor([1.0, 0.0]).double(), torch.zeros(2, dtype=torch.long), deviation, 0.0)  # type: ignore[arg-type]
    assert found.tolist() == exactly([wanted, -wanted])


def test_rewards_alike_are_no_news() -> None:
    alike, group = torch.full((3,), 0.7, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    assert standardised(alike, group).tolist() == [0.0, 0.0, 0.0] == leave_one_out(alike, group).tolist()


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    batch = credited(RLOO(beta=0.0), rollouts(BEHAVIOUR, [[1.0, 0.0, 0.5]], REFERENCE), [[by, 0.0], [by], [by, 0.0]])
    assert RLOO().loss(batch).isfinite().all()
    assert all(map(math.isfinite, gradient(RLOO(), batch, batch.y)[0]))


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^rloo: clip is 0\.0; expected a number above 0\.$"):
        RLOO(clip=0.0)
