"""Offline PPO: golden values of both versions, GAE against a loop, where the reward sits (spec 31, A.2)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import completions, exactly
from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.offline_ppo import OfflinePPO


def thumbs(logps: list[list[float]], refs: list[list[float]], values: list[list[float]], up: list[bool]) -> Thumbs:
    y = completions(logps, refs)
    flat = [v for row in values for v in row]
    y._extras["value"] = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
    return Thumbs(y, torch.tensor(up))


def single() -> Thumbs:
    """Two answers of one token: log-ratios 0.2 (up) and 0.5 (down), values 0.2 and -0.4."""
    return thumbs([[-0.8], [-0.5]], [[-1.0], [-1.0]], [[0.2], [-0.4]], [True, False])


W = 0.7 / math.sqrt(0.49 + 1e-8)  # whitened: errors 1 - 0.2 = 0.8 and -1 + 0.4 = -0.6, mean 0.1, variance 0.49


def test_golden() -> None:
    """c = 0.5, c_v = 0.01, c_kl = 0.1; clip to [0.5, 1.5].
    up:   A = W,  ratio e^0.2 is inside: -W e^0.2;          value 0.005 (0.2 - 1)^2;   KL 0.1 * 0.2
    down: A = -W, ratio e^0.5 = 1.65 is above, but max(W e^0.5, W 1.5) keeps it: W e^0.5;  0.005 (-0.4 + 1)^2;  0.1 * 0.5
    """
    batch, method = single(), OfflinePPO()
    loss = method.loss(batch)
    up = -W * math.exp(0.2) + 0.005 * 0.64 + 0.02
    down = W * math.exp(0.5) + 0.005 * 0.36 + 0.05
    assert loss.tolist() == [exactly(up), exactly(down)]
    by_logp, by_value = torch.autograd.grad(loss.sum(), [batch.y._token_logps, batch.y._extras["value"]])
    assert by_logp.tolist() == exactly([-W * math.exp(0.2) + 0.1, W * math.exp(0.5) + 0.1])
    assert by_value.tolist() == exactly([0.01 * (0.2 - 1), 0.01 * (-0.4 + 1)])


def test_golden_of_the_first_release() -> None:
    """clip to [0.5, 2], KL term -0.1 log ratio, rewards to go without the current one: G = 0 for a single token."""
    loss = OfflinePPO(version="report").loss(single())
    up = -W * math.exp(0.2) + 0.005 * 0.04 - 0.02
    down = W * math.exp(0.5) + 0.005 * 0.16 - 0.05
    assert loss.tolist() == [exactly(up), exactly(down)]


def test_a_good_answer_is_clipped_above() -> None:
    """up with log-ratio 1: -W min(e, 1.5), no gradient but the KL's."""
    batch = thumbs([[0.0], [-0.5]], [[-1.0], [-1.0]], [[0.2], [-0.4]], [True, False])
    loss = OfflinePPO().loss(batch)
    assert loss[0].item() == exactly(-W * 1.5 + 0.005 * 0.64 + 0.1)
    assert torch.autograd.grad(loss[0], batch.y._token_logps)[0].tolist() == exactly([0.1, 0.0])


def test_the_reward_sits_on_the_last_token_and_gae_is_gae() -> None:
    """Against the recursion written as a loop; lengths 3, 1 and 4."""
    values = [[0.3, -0.2, 0.5], [0.1], [0.0, 0.4, -0.3, 0.2]]
    up = [True, True, False]
    refs = [[-1.0] * len(v) for v in values]
    batch, method = thumbs(refs, refs, values, up), OfflinePPO(gamma=0.9, gae_lambda=0.7)
    raw: list[float] = []
    returns: list[float] = []
    for v, good in zip(values, up, strict=True):
        adv, ret, row, gains = 0.0, 0.0, [], []
        for t in reversed(range(len(v))):
            paid = (1.0 if good else -1.0) if t == len(v) - 1 else 0.0
            after = v[t + 1] if t + 1 < len(v) else 0.0
            adv = paid + 0.9 * after - v[t] + 0.9 * 0.7 * adv
            ret = paid + 0.9 * ret
            row.insert(0, adv)
            gains.insert(0, ret)
        raw += row
        returns += gains
    mean = sum(raw) / 8
    std = math.sqrt(sum((a - mean) ** 2 for a in raw) / 8 + 1e-8)
    advantage, to_go = method.advantages(batch)
    assert advantage.tolist() == exactly([(a - mean) / std for a in raw])
    assert to_go.tolist() == exactly(returns)


def test_at_the_reference_the_policy_term_vanishes_but_not_its_gradient() -> None:
    batch = thumbs([[-1.0], [-1.0]], [[-1.0], [-1.0]], [[0.0], [0.0]], [True, False])
    loss = OfflinePPO(value_weight=0.0).loss(batch)
    assert loss.sum().item() == exactly(0.0)
    slope = torch.autograd.grad(loss.sum(), batch.y._token_logps)[0]
    assert slope[0] < 0 < slope[1]


def test_size_is_tokens() -> None:
    y = Completions(torch.zeros(4), torch.tensor([3, 1]))
    assert OfflinePPO().size(Thumbs(y, torch.tensor([True, False]))).tolist() == [3, 1]


@pytest.mark.parametrize("apart", [-1000.0, 1000.0])
def test_extremes_stay_finite(apart: float) -> None:
    batch = thumbs([[apart], [0.0]], [[0.0], [apart]], [[0.0], [0.0]], [True, False])
    loss = OfflinePPO().loss(batch)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), batch.y._token_logps)[0]).all()
