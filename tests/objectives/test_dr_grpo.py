"""Dr. GRPO against arithmetic, and against the methods that it is nearly one of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import close, credited, exactly, gradient, rollouts
from tests.objectives.test_grpo import BEHAVIOUR, REFERENCE, moved, with_advantages
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.objectives.dr_grpo import DrGRPO
from trimtab.objectives.grpo import GRPO
from trimtab.objectives.rloo import RLOO
from trimtab.run import plan

EQUAL = [[[-0.5, -1.0], [-0.3, -0.9]], [[-1.0, -0.2], [-2.0, -0.4]]]
LATER = [[-0.4, -0.5], [-0.9, -0.7], [-1.1, -0.3], [-1.8, -0.6]]


def test_golden() -> None:
    """A = 1 - 1/2, 0 - 1/2;  ratios e^0.1, e^0.3 -> 1.2 and e^-0.3 -> 0.8, e^0.2, 1.  L = -(e^0.1 + 1.2 - 0.8 - e^0.2 - 1) / 2
    over 2 answers of 10 tokens at most: 20
    """
    method = DrGRPO(longest=10)
    batch = moved(method)
    assert batch.advantage.tolist() == exactly([0.5, 0.5, -0.5, -0.5, -0.5])
    assert method.loss(batch).tolist() == exactly([-(math.exp(0.1) + 1.2 - 0.8 - math.exp(0.2) - 1) / 2])
    assert gradient(method, batch, batch.y)[0] == exactly([-math.exp(0.1) / 2, 0.0, 0.0, math.exp(0.2) / 2, 0.5])
    assert method.size(batch).tolist() == [20.0]
    assert method.metrics(batch)["clip_ratio/high_mean"].tolist() == [0, 1, 0, 0, 0]


def test_rewards_alike_are_no_news() -> None:
    batch = moved(DrGRPO(), (0.7, 0.7))
    assert DrGRPO().loss(batch).tolist() == [0.0] and gradient(DrGRPO(), batch, batch.y) == [[0.0] * 5]


def test_the_advantage_is_in_the_unit_of_the_reward() -> None:
    """Rewards times 10, advantage times 10, where GRPO's stays; rewards plus 10, nothing."""
    once, shifted, scaled = (moved(DrGRPO(), s).advantage for s in ((1.0, 0.0), (11.0, 10.0), (10.0, 0.0)))
    assert close(shifted, once) and close(scaled, 10 * once)


def per_answer(method: Any, batch: Any) -> torch.Tensor:
    """Loss and gradient of a step: divided by the method's own size."""
    found = torch.tensor([method.loss(batch).sum().item(), *gradient(method, batch, batch.y)[0]], dtype=torch.float64)
    return found / method.size(batch).sum()


def test_where_every_answer_is_the_longest_it_is_grpo_with_its_advantages() -> None:
    """1/|y| = 1/longest: what is left of the difference is the deviation."""
    batch = credited(DrGRPO(), rollouts(EQUAL, [[1.0, 0.2], [0.1, 0.6]], EQUAL), LATER)
    assert close(per_answer(DrGRPO(longest=2), batch), per_answer(GRPO(beta=0.0), batch))
    assert not close(per_answer(DrGRPO(longest=3), batch), per_answer(GRPO(beta=0.0), batch), 1e-3)


def test_longest_only_scales() -> None:
    batch = moved(DrGRPO())
    assert close(7 * per_answer(DrGRPO(longest=7), batch), per_answer(DrGRPO(longest=1), batch))


def test_longest_is_the_longest_answer_of_the_run() -> None:
    """Whatever sample_tokens is, and again from the configuration that was written; another number is refused."""
    run = {"data": "x.jsonl", "method": "dr_grpo", "judge": "rule:judge.py:brief"}
    assert resolve(run).objective() == DrGRPO()
    found = resolve({**run, "sample_tokens": 24})
    assert found.objective() == DrGRPO(longest=24) and plan(found).longest == 24
    assert resolve(found.flat()).flat() == found.flat()
    with pytest.raises(ConfigError, match=r"^dr_grpo: longest is 96 and sample_tokens is 24: they are one number\."):
        resolve({**run, "sample_tokens": "24", "longest": "96"})


def test_on_policy_rloo_is_k_over_k_minus_1_of_it() -> None:
    """Three answers: 3/2 of the gradient. (The values are sums of advantages, over answers there and over tokens here.)"""
    rows = [[[-0.5, -1.0], [-2.0, -0.6, -0.3], [-0.7]]]
    batch = rollouts(rows, [[1.0, 0.0, 0.4]], rows)
    mine = per_answer(DrGRPO(longest=1), credited(DrGRPO(), batch))[1:]
    assert close(per_answer(RLOO(beta=0.0), credited(RLOO(beta=0.0), batch))[1:], 1.5 * mine)


def test_on_policy_the_loss_is_minus_the_advantage_of_every_token() -> None:
    batch = with_advantages(credited(DrGRPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE)), 0.9, -0.2)
    assert DrGRPO().loss(batch).tolist() == exactly([-(2 * 0.9 - 3 * 0.2)])


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    batch = replace(
        moved(DrGRPO()), y=moved(DrGRPO()).y.with_policy(torch.tensor([by, 0, 0, by, -by]).requires_grad_())
    )
    assert DrGRPO().loss(batch).isfinite().all() and all(map(math.isfinite, gradient(DrGRPO(), batch, batch.y)[0]))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("longest", 0, "a number at least 1"),
        ("clip_low", 0.0, "a number above 0"),
        ("clip_high", -1.0, "a number above 0"),
    ],
)
def test_out_of_range(option: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^dr_grpo: {option} is {value}; expected {expected}\.$"):
        DrGRPO(**{option: value})  # type: ignore[arg-type]
