"""PPO against arithmetic: token rewards, advantages of a round, both clips, the adaptive coefficient, its figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.by_hand import Rows, close, credited, exactly, gradient, rollouts
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.ppo import PPO
from trimtab.update.measure import measure

# one prompt, answers of two tokens and of one; log-ratios to the reference when sampled 0.2, 0.3 and -0.5
BEHAVIOUR = [[[-0.5, -1.0], [-2.0]]]
REFERENCE = [[[-0.7, -1.3], [-1.5]]]
POLICY = [[-0.4, -1.5], [-2.3]]
VALUES = [0.4, 0.2, 0.1]
GOLDEN = PPO(beta=0.5, gamma=0.9, gae_lambda=0.5)
A = [g / math.sqrt(0.24683750 / 3 + 1e-8) for g in (-0.285, 0.3925, -0.1075)]


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sampled(values: list[float] = VALUES, scores: tuple[float, float] = (1.0, 0.0)) -> Rollouts:
    batch = rollouts(BEHAVIOUR, [list(scores)], REFERENCE)
    batch.y._extras["value"] = column(values).requires_grad_()
    return batch


def moved(method: PPO, policy: Rows | None = None, after: list[float] | None = None, **before: Any) -> Rollouts:
    """Credited, then under a policy and a critic that have moved on."""
    batch = credited(method, sampled(**before), policy)
    if after is not None:
        batch.y._extras["value"] = column(after).requires_grad_()
    return batch


def by_value(method: PPO, batch: Rollouts) -> list[float]:
    return torch.autograd.grad(method.loss(batch).sum(), batch.y._extras["value"])[0].tolist()


def test_golden() -> None:
    """beta 0.5, gamma 0.9, lambda 0.5.   r = -0.1, 1 - 0.15 and 0 + 0.25
    delta = -0.1 + 0.18 - 0.4, 0.85 - 0.2 and 0.25 - 0.1 = -0.32, 0.65, 0.15
    A = -0.32 + 0.45 * 0.65, 0.65, 0.15 = -0.0275, 0.65, 0.15;  R = A + V = 0.3725, 0.85, 0.25
    whitened: mean 0.2575, gaps -0.285, 0.3925, -0.1075, variance 0.2468375 / 3
    ratios e^0.1 (A < 0: free), e^-0.5 (A > 0: free), e^-0.3 < 0.8 (A < 0: cut)
    V now 0.7, 0.6, -0.4, held at 0.6, 0.4, -0.1: errors 0.3275 > 0.2275; 0.25 < 0.45, which is held; 0.65 > 0.35
    L = 0.05 (0.3275^2 + 0.45^2 + 0.65^2) - (A e^0.1 + A e^-0.5 + A 0.8)
    """
    batch = moved(GOLDEN, POLICY, [0.7, 0.6, -0.4])
    assert batch.advantage.tolist() == exactly(A)
    assert batch.column("returns").tolist() == exactly([0.3725, 0.85, 0.25])
    assert batch.column("value").tolist() == VALUES
    ratios = [math.exp(0.1), math.exp(-0.5), 0.8]
    gain = sum(a * r for a, r in zip(A, ratios, strict=True))
    assert GOLDEN.loss(batch).tolist() == exactly([0.05 * (0.3275**2 + 0.45**2 + 0.65**2) - gain])
    assert gradient(GOLDEN, batch, batch.y)[0] == exactly([-A[0] * ratios[0], -A[1] * ratios[1], 0.0])
    assert by_value(GOLDEN, batch) == exactly([0.1 * 0.3275, 0.0, -0.1 * 0.65])
    assert GOLDEN.size(batch).tolist() == [3.0]


def test_whitened_rewards() -> None:
    """r = -0.1, 0.85, 0.25: mean 1/3, scaled around it; with V = 0 and gamma = lambda = 1 returns are sums of them."""
    r = [-0.1, 0.85, 0.25]
    spread = math.sqrt(sum((x - 1 / 3) ** 2 for x in r) / 3 + 1e-8)
    a, b, c = ((x - 1 / 3) / spread + 1 / 3 for x in r)
    batch = moved(PPO(beta=0.5, gae_lambda=1.0, whiten_rewards=True), values=[0.0] * 3)
    assert batch.column("returns").tolist() == exactly([a + b, b, c])


def test_token_rewards_add_up_to_the_score_less_the_kl() -> None:
    """No critic, gamma = lambda = 1: the return of the first token is the sum of all rewards, score - beta sum log-ratio."""
    batch = moved(PPO(beta=0.5, gae_lambda=1.0), values=[0.0] * 3)
    assert batch.y.first(batch.column("returns")).tolist() == exactly([1 - 0.5 * 0.5, 0 + 0.5 * 0.5])


# --- while the policy is the one that sampled ---------------------------------------------------------------------------------


def test_ratio_1() -> None:
    """The policy's part is -sum A, which is 0 once whitened, its gradient -A; nothing is cut, nothing has moved."""
    method = PPO(beta=0.5, value_weight=0.0)
    batch = moved(method)
    assert abs(batch.advantage.sum().item()) < 1e-12 and batch.advantage.var(correction=0).item() == pytest.approx(1)
    assert abs(method.loss(batch).item()) < 1e-12
    assert gradient(method, batch, batch.y)[0] == exactly([-a for a in batch.advantage.tolist()])
    bare = replace(batch, columns={**batch.columns, "advantage": column([0.5, -2.0, 3.0])})
    assert method.loss(bare).tolist() == exactly([-1.5])
    told = measure(method, batch)
    assert told["policy/clipfrac"].tolist() == told["policy/approxkl"].tolist() == [0.0, 0.0, 0.0]


def test_the_critic_alone_at_first() -> None:
    """V = V_old: half the squared distance to the returns, by the value its distance."""
    method = PPO(beta=0.5, value_weight=1.0)
    batch = moved(method)
    gap = (column(VALUES) - batch.column("returns")).tolist()
    assert method.loss(batch).item() == exactly(0.5 * sum(g * g for g in gap))
    assert by_value(method, batch) == exactly(gap)


def test_the_better_answer_is_pulled_up() -> None:
    batch = moved(PPO(beta=0.0), values=[0.0] * 3)
    assert [g < 0 for g in gradient(PPO(beta=0.0), batch, batch.y)[0]] == [True, True, False]


@pytest.mark.parametrize(("by", "good", "slope"), [(0.3, True, 0), (0.3, False, 1), (-0.3, True, 1), (-0.3, False, 0)])
def test_the_clip_cuts_only_what_has_gone_too_far(by: float, good: bool, slope: int) -> None:
    """Above 1 + c for a good token, below 1 - c for a bad one."""
    method, sign = PPO(value_weight=0.0), 1.0 if good else -1.0
    batch = moved(method, [[-0.5 + by, -1.0], [-2.0]])
    batch = replace(batch, columns={**batch.columns, "advantage": column([sign, 0.0, 0.0])})
    assert gradient(method, batch, batch.y)[0] == exactly([-sign * math.exp(by) * slope, 0.0, 0.0])
    assert measure(method, batch)["policy/clipfrac"].tolist() == [1.0 - slope, 0.0, 0.0]


# --- figures ------------------------------------------------------------------------------------------------------------------


def test_figures() -> None:
    """Errors 0.3275, -0.25, -0.65 against returns 0.3725, 0.85, 0.25; their mean is 0.4908..., their variance population."""
    batch = moved(GOLDEN, POLICY, [0.7, 0.6, -0.4])
    told = measure(GOLDEN, batch)
    assert told["policy/approxkl"].tolist() == exactly([0.005, 0.125, 0.045])
    assert told["policy/clipfrac"].tolist() == [0.0, 0.0, 1.0]
    assert told["val/error"].tolist() == exactly([0.3275**2, 0.25**2, 0.65**2])
    mean = (0.3725 + 0.85 + 0.25) / 3
    variance = sum((x - mean) ** 2 for x in (0.3725, 0.85, 0.25)) / 3
    error = (0.3275**2 + 0.25**2 + 0.65**2) / 3
    assert told["val/var_explained"].mean().item() == exactly(1 - error / variance)
    assert told["objective/kl_coef"].tolist() == [0.5, 0.5, 0.5]


def test_var_explained() -> None:
    """1 for a perfect critic, 0 for one that knows the mean, left out where all returns are the same."""
    batch = moved(GOLDEN)
    for values, wanted in (([0.3725, 0.85, 0.25], 1.0), ([1.4725 / 3] * 3, 0.0)):
        batch.y._extras["value"] = column(values)
        assert measure(GOLDEN, batch)["val/var_explained"].mean().item() == exactly(wanted)
    batch = moved(PPO(beta=0.0, gae_lambda=1.0), scores=(1.0, 1.0))
    assert batch.column("returns").tolist() == exactly([1.0, 1.0, 1.0])
    assert "val/var_explained" not in measure(PPO(), batch)
    rounding = replace(
        batch, columns={**batch.columns, "returns": column([1e-8, -1e-8, 0.0])}
    )  # log-ratios of a first round
    assert "val/var_explained" not in measure(PPO(), rounding)


def test_var_explained_of_a_part_is_by_the_whole_batch() -> None:
    """A microbatch has too few returns to know their variance."""
    whole = moved(GOLDEN, after=[0.0, 0.0, 0.0])
    of_all = measure(GOLDEN, whole)["val/var_explained"]
    rows = torch.tensor([1])
    part = Rollouts(
        whole.y.take(rows), torch.tensor([0]), torch.tensor([1]), whole.score[rows], around=whole,
        columns={k: v[2:] for k, v in whole.columns.items()},
    )  # fmt: skip
    assert measure(GOLDEN, part)["val/var_explained"].tolist() == exactly(of_all[2:].tolist())


# --- the coefficient ----------------------------------------------------------------------------------------------------------


def test_a_fixed_coefficient_leaves_no_memory() -> None:
    assert GOLDEN.credit(sampled(), {})[1] == {} and not GOLDEN.has_memory()


def test_an_adaptive_coefficient() -> None:
    """KL (0.5 - 0.5) / 2 = 0 against a target of 6: error -0.2, 2 answers, horizon 100: 0.5 -> 0.498 -> 0.498 * 0.996.
    The round uses, and reports, the coefficient that it began with: r = -0.2 * 0.498 for the first token of the second."""
    method = PPO(beta=0.5, target_kl=6.0, horizon=100, gae_lambda=0.0)
    columns, memory = method.credit(sampled(), {})
    assert columns["kl_coef"].tolist() == [0.5] * 3 and memory["kl_coef"].item() == exactly(0.498)
    columns, memory = method.credit(sampled(), memory)
    assert columns["kl_coef"].tolist() == exactly([0.498] * 3) and memory["kl_coef"].item() == exactly(0.498 * 0.996)
    assert not memory["kl_coef"].requires_grad
    assert columns["returns"].tolist() == exactly([-0.2 * 0.498 + 0.2, 1 - 0.3 * 0.498, 0.5 * 0.498])


def test_the_target_is_nats_an_answer() -> None:
    """Log-ratios 0.2 + 0.3 and 0.1: KL 0.3 by answers, and not 0.175 or 0.2 by their tokens."""
    batch = rollouts(BEHAVIOUR, [[1.0, 0.0]], [[[-0.7, -1.3], [-2.1]]])
    batch.y._extras["value"] = column(VALUES)
    for target, factor in ((0.3, 1.0), (0.25, 1 + 0.2 * 2 / 100), (0.29, 1 + (0.3 / 0.29 - 1) * 2 / 100)):
        memory = PPO(beta=0.5, target_kl=target, horizon=100).credit(batch, {})[1]
        assert memory["kl_coef"].item() == exactly(0.5 * factor)


def test_a_horizon_shorter_than_a_round() -> None:
    six = rollouts([[[-1.0]] * 6], [[1.0, 0.0] * 3], [[[-1.0]] * 6])
    six.y._extras["value"] = column([0.0] * 6)
    with pytest.raises(ConfigError, match="horizon is 1 and a round has 6 answers"):
        PPO(target_kl=6.0, horizon=1).credit(six, {})


# --- edges --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float, dtype: torch.dtype) -> None:
    """To the policy that sampled, and to the reference when it was sampled."""
    length = torch.tensor([2, 1])
    y = Completions(column([-0.5, -1.0, -2.0]).to(dtype), length, column([by, 0.0, -by]).to(dtype))
    y._extras["value"] = column(VALUES).to(dtype)
    base = {"behaviour": y._token_logps}
    batch = Rollouts(y, torch.tensor([0, 0]), torch.tensor([1, 2]), column([1.0, 0.0]).to(dtype), columns=base)
    method = PPO(target_kl=6.0, whiten_rewards=True)
    columns, memory = method.credit(batch, {})
    assert all(v.dtype == dtype and v.isfinite().all() for v in (*columns.values(), *memory.values()))
    leaf = column([by, -by, by]).to(dtype).requires_grad_()
    late = replace(batch, y=y.with_policy(leaf), columns={**base, **columns})
    loss = method.loss(late)
    assert loss.dtype == dtype and loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()
    assert all(v.isfinite().all() for v in measure(method, late).values())


def test_float32_is_float64_rounded() -> None:
    wide = sampled()
    known = {k: v.float() for k, v in wide.columns.items()}
    extras = {k: v.detach().float() for k, v in wide.y._extras.items()}
    y = Completions(wide.y._token_logps.detach().float(), wide.y._length, wide.y._ref.float(), extras)
    narrow = replace(wide, y=y, score=wide.score.float(), columns=known)
    a, b = GOLDEN.credit(wide, {})[0], GOLDEN.credit(narrow, {})[0]
    assert all(b[k].dtype == torch.float32 and close(b[k].double(), a[k].double(), 1e-6) for k in a)


def test_one_token_and_none() -> None:
    """A round of one token has nothing to compare with; an answer without tokens is learned from nowhere."""
    one = rollouts([[[-1.0]]], [[3.0]], [[[-1.2]]])
    one.y._extras["value"] = column([0.5])
    batch = credited(GOLDEN, one)
    assert batch.advantage.tolist() == [0.0] and batch.column("returns").tolist() == exactly([2.9])
    with_none = rollouts([[[-0.5, -1.0], [], [-2.0]]], [[1.0, 9.0, 0.0]], [[[-0.7, -1.3], [], [-1.5]]])
    with_none.y._extras["value"] = column(VALUES)
    batch = credited(GOLDEN, with_none)
    assert batch.advantage.tolist() == exactly(A) and GOLDEN.size(batch).tolist() == [3.0]
    assert GOLDEN.loss(batch).tolist() == exactly(GOLDEN.loss(moved(GOLDEN)).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, r"^ppo: clip is 0\.0; expected a number above 0\.$"),
        ({"value_clip": 0.0}, r"^ppo: value_clip is 0\.0; expected a number above 0\.$"),
        ({"beta": -0.1}, r"^ppo: beta is -0\.1; expected a number at least 0\.$"),
        ({"gamma": 0.0}, r"^ppo: gamma is 0\.0; expected a number above 0 and at most 1\.$"),
        ({"gamma": 1.01}, r"^ppo: gamma is 1\.01; expected a number above 0 and at most 1\.$"),
        ({"gae_lambda": 1.5}, r"^ppo: gae_lambda is 1\.5; expected a number at least 0 and at most 1\.$"),
        ({"horizon": 5000}, r"^ppo: horizon has no effect with target_kl: 0, where beta is fixed\. Remove it\.$"),
        ({"target_kl": 6.0, "beta": 0.0}, r"^ppo: target_kl has no effect with beta: 0"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPO(**options)
