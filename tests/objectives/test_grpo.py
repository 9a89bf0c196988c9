"""GRPO against arithmetic; what its clip, its deviation and its KL mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import close, credited, exactly, gradient, rollouts
from trimtab.credit.clip import FAR, ratio, surrogate
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives.check import check_objective
from trimtab.objectives.dapo import DAPO
from trimtab.objectives.grpo import GRPO

# two answers, of 2 and 3 tokens; log-ratios to pi_old 0.1, 0.3 and -0.3, 0.2, 0; to the reference 0.3, 0.6 and -0.8, 0.1, 0.5
BEHAVIOUR = [[[-0.5, -1.0], [-2.0, -0.6, -0.3]]]
REFERENCE = [[[-0.7, -1.3], [-1.5, -0.5, -0.8]]]
POLICY = [[-0.4, -0.7], [-2.3, -0.4, -0.3]]
A = 0.5 / (math.sqrt(0.5) + 1e-4)  # of rewards 1 and 0: 1/2 and -1/2 in sample deviations


def moved(method: Any, scores: tuple[float, float] = (1.0, 0.0)) -> Rollouts:
    """The two answers, credited, under the policy that has moved on."""
    return credited(method, rollouts(BEHAVIOUR, [list(scores)], REFERENCE), POLICY)


def with_advantages(batch: Rollouts, *advantage: float) -> Rollouts:
    """The same with other advantages, one for each answer."""
    column = torch.tensor(advantage, dtype=torch.float64)[batch.y.owner]
    return replace(batch, columns={**batch.columns, "advantage": column})


def test_golden() -> None:
    """A = +-1/2 / (sqrt(1/2) + 1e-4);  ratios e^0.1, e^0.3 -> 1.2 (A > 0) and e^-0.3 -> 0.8 (A < 0), e^0.2 (A < 0), 1.
    k3 at l = 0.3, 0.6 and -0.8, 0.1, 0.5:  e^-l - 1 + l, by the token 1 - e^-l.   beta 0.1
    L = -A (e^0.1 + 1.2) / 2 + A (0.8 + e^0.2 + 1) / 3 + 0.1 (k3(0.3) + k3(0.6)) / 2 + 0.1 (k3(-0.8) + k3(0.1) + k3(0.5)) / 3
    """
    method = GRPO(beta=0.1)
    batch = moved(method)
    assert batch.advantage.tolist() == exactly([A, A, -A, -A, -A])

    def k3(x: float) -> float:
        return math.exp(-x) - 1 + x

    gain = A * (math.exp(0.1) + 1.2) / 2 - A * (0.8 + math.exp(0.2) + 1) / 3
    cost = 0.1 * (k3(0.3) + k3(0.6)) / 2 + 0.1 * (k3(-0.8) + k3(0.1) + k3(0.5)) / 3
    assert method.loss(batch).tolist() == exactly([cost - gain])
    pull = [0.1 / n * (1 - math.exp(-x)) for n, x in ((2, 0.3), (2, 0.6), (3, -0.8), (3, 0.1), (3, 0.5))]
    push = [-A * math.exp(0.1) / 2, 0.0, 0.0, A * math.exp(0.2) / 3, A / 3]
    assert gradient(method, batch, batch.y)[0] == exactly([a + b for a, b in zip(push, pull, strict=True)])
    assert method.size(batch).tolist() == [2.0]


@pytest.mark.parametrize("estimator", ["k2", "corrected"])
def test_golden_of_the_other_estimators(estimator: str) -> None:
    """beta 1, no advantage.  k2: l^2/2, by the token l.  corrected: ratio k3, by the token ratio (k3 + 1 - e^-l)."""
    batch = with_advantages(moved(GRPO()), 0.0, 0.0)
    rows = [(2, 0.3, 0.1), (2, 0.6, 0.3), (3, -0.8, -0.3), (3, 0.1, 0.2), (3, 0.5, 0.0)]
    k3 = [math.exp(-x) - 1 + x for _, x, _ in rows]
    if estimator == "k2":
        terms, slopes = [x**2 / 2 for _, x, _ in rows], [x for _, x, _ in rows]
    else:
        terms = [math.exp(m) * k for k, (_, _, m) in zip(k3, rows, strict=True)]
        slopes = [math.exp(m) * (k + 1 - math.exp(-x)) for k, (_, x, m) in zip(k3, rows, strict=True)]
    method = GRPO(beta=1.0, estimator=estimator)
    assert method.loss(batch).tolist() == exactly([sum(t / n for t, (n, _, _) in zip(terms, rows, strict=True))])
    assert gradient(method, batch, batch.y)[0] == exactly([s / n for s, (n, _, _) in zip(slopes, rows, strict=True)])


def test_what_the_clip_cuts_is_logged_as_trl_does() -> None:
    """Cut are e^0.3 with A > 0 and e^-0.3 with A < 0; the rewards the other way round: e^0.2 with A > 0, nothing below."""
    told = GRPO().metrics(moved(GRPO()))
    assert told["clip_ratio/high_mean"].tolist() == [0, 1, 0, 0, 0] and told["clip_ratio/low_mean"].tolist() == [
        0,
        0,
        1,
        0,
        0,
    ]
    told = GRPO().metrics(moved(GRPO(), (0.0, 1.0)))
    assert told["clip_ratio/high_mean"].tolist() == [0, 0, 0, 1, 0] and told["clip_ratio/low_mean"].tolist() == [0] * 5


@pytest.mark.parametrize(("deviation", "wanted"), [("sample", math.sqrt(0.5)), ("population", 0.5)])
def test_two_answers(deviation: Any, wanted: float) -> None:
    """Bessel +-0.7071, population +-1, whatever the rewards are; the 1e-4 shows where they are close."""
    for far in (1e6, 1.0, 1e-3):
        found = moved(GRPO(deviation=deviation), (7 + far, 7.0)).advantage
        assert found[0].item() == pytest.approx(far / 2 / (far * wanted + 1e-4), rel=1e-9)
        assert found[0].item() == -found[-1].item()
    assert moved(GRPO(deviation=deviation), (1e9, 0.0)).advantage[0].item() == pytest.approx(0.5 / wanted, rel=1e-9)


def test_rewards_alike_leave_the_kl() -> None:
    """0, not 0/0; and a group of one has no one to be compared with."""
    alike = moved(GRPO(beta=0.0), (0.7, 0.7))
    assert GRPO(beta=0.0).loss(alike).tolist() == [0.0] and gradient(GRPO(beta=0.0), alike, alike.y) == [[0.0] * 5]
    assert GRPO().loss(alike).item() > 0
    assert credited(GRPO(), rollouts([[[-1.0]]], [[3.0]], [[[-1.0]]])).advantage.tolist() == [0.0]


def test_on_policy_the_loss_is_minus_the_advantages() -> None:
    """Ratio 1: -sum A, by a token -A/|y|; the advantages of a group add up to 0."""
    method, batch = GRPO(beta=0.0), rollouts(BEHAVIOUR, [[1.0, 0.3]], REFERENCE)
    batch = credited(method, batch)
    assert batch.y.first(batch.advantage).sum().item() == exactly(0) and method.loss(batch).tolist() == exactly([0.0])
    batch = with_advantages(batch, 0.9, -0.2)
    assert method.loss(batch).tolist() == exactly([-0.7])
    assert gradient(method, batch, batch.y)[0] == exactly([-0.45, -0.45, 0.2 / 3, 0.2 / 3, 0.2 / 3])


def test_at_the_reference_there_is_no_kl() -> None:
    batch = credited(GRPO(), rollouts(BEHAVIOUR, [[0.0, 0.0]], REFERENCE), REFERENCE[0])
    for estimator in ("k2", "k3", "corrected"):
        assert GRPO(beta=1.0, estimator=estimator).loss(batch).tolist() == [0.0]
        assert gradient(GRPO(beta=1.0, estimator=estimator), batch, batch.y) == [[0.0] * 5]


def test_of_equal_lengths_it_is_dapo() -> None:
    """1/|y| for each answer is one number for all tokens then; with other lengths it is not."""
    token, answer = DAPO(clip_low=0.2, clip_high=0.28), GRPO(beta=0.0, clip_low=0.2, clip_high=0.28)

    def both(behaviour: Any, policy: Any) -> list[Any]:
        found = []
        for method in (token, answer):
            batch = credited(method, rollouts(behaviour, [[1.0, 0.2], [0.1, 0.6]], behaviour), policy)
            size = method.size(batch).sum()
            slope = torch.tensor(gradient(method, batch, batch.y)[0], dtype=torch.float64) / size
            found.append(torch.cat([method.loss(batch).sum()[None] / size, slope]))
        return found

    same = [[[-0.5, -1.0], [-0.3, -0.9]], [[-1.0, -0.2], [-2.0, -0.4]]]
    assert close(*both(same, [[-0.4, -0.5], [-0.9, -0.7], [-1.1, -0.3], [-1.8, -0.6]]))
    other = [[[-0.5, -1.0], [-0.3]], [[-1.0, -0.2], [-2.0, -0.4]]]
    assert not close(*both(other, [[-0.4, -0.5], [-0.9], [-1.1, -0.3], [-1.8, -0.6]]), 1e-3)


def test_the_surrogate_never_gains_by_the_clip() -> None:
    """min(rA, clip(r)A) <= rA; equal inside the clip, and outside where the advantage calls the policy back."""
    moved = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0], dtype=torch.float64)
    assert surrogate(moved, torch.ones(5), 0.2, 0.3).tolist() == exactly([0.5, 0.9, 1.0, 1.1, 1.3])
    assert surrogate(moved, -torch.ones(5), 0.2, 0.3).tolist() == exactly([-0.8, -0.9, -1.0, -1.1, -2.0])
    assert ratio(torch.tensor([-1e4, 0.0, 1e4])).tolist() == pytest.approx([0.0, 1.0, math.exp(FAR)])


@pytest.mark.parametrize("estimator", ["k2", "k3", "corrected"])
@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(estimator: str, by: float) -> None:
    method = GRPO(estimator=estimator)
    batch = credited(method, rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE), [[by, 0.0], [0.0, by, -by]])
    assert method.loss(batch).isfinite().all() and all(map(math.isfinite, gradient(method, batch, batch.y)[0]))


def test_without_a_kl_the_contract_holds() -> None:
    assert check_objective(GRPO(beta=0.0))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("beta", -0.1, "a number at least 0"),
        ("clip_low", 0.0, "a number above 0"),
        ("clip_high", 0.0, "a number above 0"),
    ],
)
def test_out_of_range(option: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^grpo: {option} is {value}; expected {expected}\.$"):
        GRPO(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("deviation", "none"), ("estimator", "k1")])
def test_unknown_choices(option: str, value: str) -> None:
    """k1 in a loss has a mean gradient of 0: it would do nothing, so it is refused."""
    with pytest.raises(ConfigError, match=rf'^grpo: {option} is "{value}"; expected one of '):
        GRPO(**{option: value})  # type: ignore[arg-type]
