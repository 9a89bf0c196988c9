"""Nash-MD against arithmetic; where it leads is in tests/online/test_known_optima.py."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, credited, exactly, gradient, rollouts
from tests.objectives.test_grpo import BEHAVIOUR, POLICY, REFERENCE
from trimtab.errors import ConfigError
from trimtab.objectives.nash_md import NashMD
from trimtab.objectives.rloo import RLOO


def test_golden() -> None:
    """tau 0.5, P = 0.8 and 0.3, log-ratios to the reference when sampled 0.2 + 0.3 = 0.5 and -0.5 - 0.1 + 0.5 = -0.1.
    A = 0.8 - 0.5 - 0.25 = 0.05,  0.3 - 0.5 + 0.05 = -0.15;  since then 0.1 + 0.3 = 0.4 and -0.3 + 0.2 = -0.1
    L = -(0.05 e^0.4 - 0.15 e^-0.1), by a token minus its answer's term
    """
    method = NashMD(tau=0.5)
    batch = credited(method, rollouts(BEHAVIOUR, [[0.8, 0.3]], REFERENCE), POLICY)
    assert batch.advantage.tolist() == exactly([0.05, 0.05, -0.15, -0.15, -0.15])
    a, b = 0.05 * math.exp(0.4), 0.15 * math.exp(-0.1)
    assert method.loss(batch).tolist() == exactly([b - a])
    assert gradient(method, batch, batch.y)[0] == exactly([-a, -a, b, b, b])
    assert method.size(batch).tolist() == [2.0]


def test_it_is_reinforce() -> None:
    """As sampled: by each token of an answer minus its advantage, and an even match teaches nothing at the reference."""
    batch = credited(NashMD(), rollouts(REFERENCE, [[0.9, 0.5]], REFERENCE))
    assert gradient(NashMD(), batch, batch.y)[0] == exactly([-0.4, -0.4, 0.0, 0.0, 0.0])
    assert NashMD().loss(batch).tolist() == exactly([-0.4])


def test_the_penalty_is_the_whole_answers() -> None:
    """Every token pays for the log-ratio of all tokens; in TRL's, each for its own only."""
    batch = credited(NashMD(tau=1.0), rollouts(BEHAVIOUR, [[0.5, 0.5]], REFERENCE))
    assert batch.advantage.tolist() == exactly([-0.5, -0.5, 0.1, 0.1, 0.1])
    own = batch.behaviour - torch.tensor([t for row in REFERENCE[0] for t in row], dtype=torch.float64)
    assert not close(-own, batch.advantage, 0.1)


def test_nobody_else_is_the_baseline() -> None:
    """The 1/2 is what an equal would get; RLOO's baseline is what the other answers got."""
    others = credited(NashMD(), rollouts(BEHAVIOUR, [[0.8, 0.9]], REFERENCE)).advantage
    assert close(others[:2], credited(NashMD(), rollouts(BEHAVIOUR, [[0.8, 0.1]], REFERENCE)).advantage[:2])
    assert credited(RLOO(beta=0.1), rollouts(BEHAVIOUR, [[0.8, 0.9]], REFERENCE)).advantage[0] < 0 < others[0]


def test_the_implied_reward_is_tau_log_ratio() -> None:
    batch = rollouts(BEHAVIOUR, [[0.8, 0.3]], REFERENCE)
    assert NashMD(tau=0.5).reward(batch.y).tolist() == exactly([0.25, -0.05])


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    batch = credited(NashMD(), rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE), [[by, 0.0], [0.0, -by, -by]])
    assert NashMD().loss(batch).isfinite().all() and all(map(math.isfinite, gradient(NashMD(), batch, batch.y)[0]))


def test_out_of_range() -> None:
    """Without the KL self-play turns in circles."""
    with pytest.raises(ConfigError, match=r"^nash_md: tau is 0\.0; expected a number above 0\.$"):
        NashMD(tau=0.0)
