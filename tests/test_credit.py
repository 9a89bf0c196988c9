"""Rewards to go, generalised advantages, whitening and the KL controller: against loops, hand arithmetic and identities.

Advantages within a group are tested with RLOO and GRPO, the clip with GRPO, the KL in its own file.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.objectives.by_hand import close, exactly
from trimtab.credit.controller import KL_COEF, adapted, refuse_idle, steered
from trimtab.credit.gae import at_end, gae, reward_to_go
from trimtab.credit.whiten import rescaled, whiten
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions

LENGTHS = [3, 0, 1, 4]  # an answer without tokens, and one of a single token


def answers(lengths: list[int], dtype: torch.dtype = torch.float64) -> Completions:
    return Completions(torch.zeros(sum(lengths), dtype=dtype), torch.tensor(lengths))


def noise(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- rewards and advantages by token ----------------------------------------------------------------------------------------


def test_the_score_sits_on_the_last_token() -> None:
    y = answers(LENGTHS)
    found = at_end(y, column(5, 6, 7, 8))
    assert found.tolist() == [0, 0, 5, 7, 0, 0, 0, 8]
    assert y.sum(found).tolist() == [5, 0, 7, 8]  # nothing of an answer without tokens


def test_reward_to_go_golden() -> None:
    """gamma 0.5, rewards 1, 2, 4 and 3:  G = 1 + 0.5 * 4, 2 + 0.5 * 4, 4 and 3"""
    assert reward_to_go(answers([3, 1]), column(1, 2, 4, 3), 0.5).tolist() == [3.0, 4.0, 4.0, 3.0]


def test_gae_golden() -> None:
    """gamma 0.9, lambda 0.5; rewards 0.1, -0.2, 1 with values 0.5, 0.4, 0.3, and reward 2 with value 0.7.

    delta = 0.1 + 0.36 - 0.5, -0.2 + 0.27 - 0.4, 1 - 0.3 = -0.04, -0.33, 0.7;  2 - 0.7 = 1.3
    A     = -0.04 - 0.45 * 0.015, -0.33 + 0.45 * 0.7, 0.7 = -0.04675, -0.015, 0.7;  1.3
    """
    y = answers([3, 1])
    advantage, returns = gae(y, column(0.1, -0.2, 1, 2), column(0.5, 0.4, 0.3, 0.7), 0.9, 0.5)
    assert advantage.tolist() == exactly([-0.04675, -0.015, 0.7, 1.3])
    assert returns.tolist() == exactly([0.45325, 0.385, 1.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_recursion(gamma: float, gae_lambda: float, dtype: torch.dtype) -> None:
    y, reward, value = answers(LENGTHS, dtype), noise(8, 0, dtype), noise(8, 1, dtype)
    wanted: list[float] = []
    at = 0
    for n in LENGTHS:
        row, running, after = [], 0.0, 0.0
        for r, v in zip(reward[at : at + n].tolist()[::-1], value[at : at + n].tolist()[::-1], strict=True):
            running = r + gamma * after - v + gamma * gae_lambda * running
            row.append(running)
            after = v
        wanted += row[::-1]
        at += n
    advantage, returns = gae(y, reward, value, gamma, gae_lambda)
    assert advantage.dtype == returns.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert advantage.tolist() == pytest.approx(wanted, abs=tolerance)
    assert (returns - value).tolist() == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_what_came_less_what_was_expected(gamma: float) -> None:
    y, reward, value = answers(LENGTHS), noise(8, 2), noise(8, 3)
    advantage, returns = gae(y, reward, value, gamma, 1.0)
    assert close(returns, reward_to_go(y, reward, gamma)) and close(advantage, reward_to_go(y, reward, gamma) - value)
    assert close(gae(y, reward, torch.zeros(8).double(), gamma, 1.0)[0], reward_to_go(y, reward, gamma))


def test_lambda_0_is_one_step() -> None:
    y, reward, value = answers(LENGTHS), noise(8, 4), noise(8, 5)
    assert close(gae(y, reward, value, 0.9, 0.0)[0], reward + 0.9 * y.following(value) - value)


def test_a_score_and_a_penalty_by_token() -> None:
    """gamma = lambda = 1:  A_t = score - (penalties from t on) - V_t; without a penalty score - V_t."""
    y, score, value, penalty = answers(LENGTHS), column(5, 6, 7, 8), noise(8, 6), noise(8, 7)
    advantage, _ = gae(y, at_end(y, score), value, 1.0, 1.0)
    assert close(advantage, score[y.owner] - value)
    advantage, _ = gae(y, at_end(y, score) - penalty, value, 1.0, 1.0)
    assert close(advantage, score[y.owner] - reward_to_go(y, penalty, 1.0) - value)


def test_a_perfect_critic_leaves_nothing() -> None:
    """V_t = gamma^(T - t) score: every error is 0, whatever lambda."""
    y, score = answers(LENGTHS), column(5, 6, 7, 8)
    left = y.length[y.owner] - 1 - y.position
    advantage, returns = gae(y, at_end(y, score), 0.9**left * score[y.owner], 0.9, 0.6)
    assert close(advantage, torch.zeros(8).double()) and close(returns, 0.9**left * score[y.owner])


def test_answers_are_apart() -> None:
    y, reward, value = answers(LENGTHS), noise(8, 8), noise(8, 9)
    whole = gae(y, reward, value, 0.9, 0.8)[0].split(LENGTHS)
    for row, r, v, n in zip(whole, reward.split(LENGTHS), value.split(LENGTHS), LENGTHS, strict=True):
        assert not n or close(row, gae(answers([n]), r, v, 0.9, 0.8)[0])


# --- whitening ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deviation", "spread"), [("population", math.sqrt(14 / 3)), ("sample", math.sqrt(7))])
def test_whiten_golden(deviation: str, spread: float) -> None:
    """1, 2, 6: mean 3, gaps -2, -1, 3 with squares 14; over 3, or over 2 (Bessel)."""
    found = whiten(column(1, 2, 6), deviation, 0.0)  # type: ignore[arg-type]
    assert found.tolist() == exactly([-2 / spread, -1 / spread, 3 / spread])
    kept = rescaled(column(1, 2, 6), deviation, 0.0)  # type: ignore[arg-type]
    assert kept.tolist() == exactly([3 - 2 / spread, 3 - 1 / spread, 3 + 3 / spread])


def test_epsilon_is_added_to_the_variance() -> None:
    assert whiten(column(-1, 1), epsilon=3.0).tolist() == exactly([-0.5, 0.5])
    assert whiten(column(-1, 1)).tolist() == exactly([-1 / math.sqrt(1 + 1e-8), 1 / math.sqrt(1 + 1e-8)])


def test_mean_0_variance_1_whatever_the_unit() -> None:
    x = noise(50, 10)
    found = whiten(x)
    assert abs(found.mean().item()) < 1e-12 and found.var(correction=0).item() == pytest.approx(1, abs=1e-7)
    assert close(whiten(3 * x + 70), found, 1e-7)
    assert rescaled(x + 70).mean().item() == pytest.approx((x + 70).mean().item(), rel=1e-12)


@pytest.mark.parametrize("deviation", ["population", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_numbers_alike_are_0(n: int, dtype: torch.dtype, deviation: str) -> None:
    """And not a rounding error blown up: (70.1 + 70.1 + 70.1) / 3 is not 70.1."""
    alike = torch.full((n,), 70.1, dtype=dtype)
    assert whiten(alike, deviation).tolist() == [0.0] * n  # type: ignore[arg-type]
    assert rescaled(alike).tolist() == pytest.approx(alike.tolist())


# --- the KL controller ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nats", "factor"),
    [
        ([6.0, 6.0], 1.0),
        ([6.5, 6.1], 1 + 0.05 * 2 / 100),  # KL 6.3 is 5 % above 6
        ([4.8, 6.0], 1 - 0.1 * 2 / 100),
        ([600.0, 0.0], 1 + 0.2 * 2 / 100),  # held
        ([-3.0, 1.0], 1 - 0.2 * 2 / 100),  # a sample's KL may be negative
    ],
)
def test_controller_golden(nats: list[float], factor: float) -> None:
    """Target 6 nats, 2 answers, horizon 100: coefficient (1 + error 2 / 100)."""
    found = adapted(column(0.3)[0], column(*nats), 6.0, 100)
    assert found.item() == exactly(0.3 * factor)


def test_it_settles_where_the_kl_is_right() -> None:
    """A policy whose KL is 1 / coefficient: the coefficient goes to 1 / target, from either side."""
    for start in (0.01, 2.0):
        coefficient = column(start)[0]
        for _ in range(400):
            coefficient = adapted(coefficient, (1 / coefficient).expand(10), 6.0, 100)
        assert coefficient.item() == pytest.approx(1 / 6, rel=1e-3)


def test_a_round_that_is_long_against_the_horizon() -> None:
    """20 answers against a horizon of 4: 1 - 0.2 * 20 / 4 = 0; the coefficient would be gone for good."""
    with pytest.raises(ConfigError, match=r"^horizon is 4 and a round has 20 answers: .* Set horizon above 4\.$"):
        adapted(column(0.3)[0], torch.zeros(20).double(), 6.0, 4)
    assert adapted(column(0.3)[0], torch.zeros(20).double(), 6.0, 5).item() == exactly(0.3 * (1 - 0.2 * 20 / 5))


def test_memory_is_untouched_where_the_coefficient_is_fixed() -> None:
    memory = {"other": column(1)}
    assert steered(memory, column(0.3)[0], column(6), 0.0, 100) is memory
    found = steered(memory, column(0.3)[0], column(60), 6.0, 100)
    assert set(found) == {"other", KL_COEF} and found[KL_COEF].item() == exactly(0.3 * 1.002)


# --- what cannot be meant -------------------------------------------------------------------------------------------------------


def test_a_controller_without_effect() -> None:
    refuse_idle("mine", 0.1, 6.0, True)
    refuse_idle("mine", 0.0, 0.0, False)
    with pytest.raises(ConfigError, match=r"^mine: horizon has no effect with target_kl: 0"):
        refuse_idle("mine", 0.1, 0.0, True)
    with pytest.raises(ConfigError, match=r"^mine: target_kl has no effect with beta: 0"):
        refuse_idle("mine", 0.0, 6.0, False)
