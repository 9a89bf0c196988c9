"""Reward model with ties: golden values of both models, what they share, their limits, stability."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, pairs_of, score_gradient, scored, scored_pairs
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.reward_model import RewardModel
from trimtab.objectives.reward_model_ties import RewardModelTies
from trimtab.objectives.todo import TODO

MODELS = ("rao_kupper", "davidson")


def one(tie: bool) -> Pairs:
    """Numbers after each token: 0.3, 1.2 and 0.9, 0.5; d = 0.7."""
    return Pairs(scored([[0.3, 1.2]]), scored([[0.9, 0.5]]), torch.tensor([tie]))


def test_golden_rao_kupper() -> None:
    """p0 0.25: alpha = log(1.25/0.75) = 0.510825623765991.
    win: log(1 + e^(alpha - 0.7)) = 0.603026706051205, slope -sigma(alpha - 0.7) = -0.452846944122342
    tie: -log(sigma(0.7 + alpha) - sigma(0.7 - alpha)) = 1.49927519253051,
         slope sigma(0.7 + alpha) - sigma(alpha - 0.7) = 0.317598056934906
    """
    for tie, loss, slope in (
        (False, 0.603026706051205, -0.452846944122342),
        (True, 1.49927519253051, 0.317598056934906),
    ):
        batch, method = one(tie), RewardModelTies(tie_probability=0.25)
        assert method.loss(batch).item() == exactly(loss)
        chosen, rejected = score_gradient(method, batch, batch.chosen, batch.rejected)
        assert chosen == exactly([0.0, slope]) and rejected == exactly([0.0, -slope])


def test_golden_davidson() -> None:
    """p0 0.25: nu = 2/3; Z = e^0.35 + e^-0.35 + nu = 2.79042230497863; E = (e^0.35 - e^-0.35)/(2 Z) = 0.128005617214276.
    win: log Z - 0.35 = 0.676192948170558, slope E - 1/2;  tie: log Z - log nu = 1.43165805627872, slope E
    """
    for tie, loss, slope in (
        (False, 0.676192948170558, -0.371994382785724),
        (True, 1.43165805627872, 0.128005617214276),
    ):
        batch, method = one(tie), RewardModelTies(tie_model="davidson", tie_probability=0.25)
        assert method.loss(batch).item() == exactly(loss)
        chosen, rejected = score_gradient(method, batch, batch.chosen, batch.rejected)
        assert chosen == exactly([0.0, slope]) and rejected == exactly([0.0, -slope])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("p0", [1e-6, 0.25, 0.9, 1 - 1e-6])
def test_three_outcomes_are_all_there_is_and_equals_tie_as_often_as_said(model: str, p0: float) -> None:
    method = RewardModelTies(tie_model=model, tie_probability=p0)
    odds = method.log_odds(scored_pairs([-1000.0, -3.0, 0.0, 0.2, 3.0, 1000.0]))
    assert close(sum(p.exp() for p in odds), torch.ones(6, dtype=torch.float64), 1e-10)  # type: ignore[arg-type]
    assert odds[2][2].exp().item() == exactly(p0)
    assert odds[0][2].item() == exactly(math.log((1 - p0) / 2))


def test_rao_kupper_is_todo_on_explicit_rewards() -> None:
    alpha = 0.5
    method, batch = RewardModelTies(tie_probability=math.tanh(alpha / 2)), scored_pairs([-2.0, 0.0, 0.7], tie=True)
    assert close(method.loss(batch), TODO(beta=1.0, alpha=alpha).loss(pairs_of([-2.0, 0.0, 0.7], tie=True)))


@pytest.mark.parametrize("model", MODELS)
def test_without_ties_it_becomes_the_reward_model(model: str) -> None:
    batch = scored_pairs([-2.0, 0.0, 0.7])
    method = RewardModelTies(tie_model=model, tie_probability=1e-12, centring=0.1)
    assert close(method.loss(batch), RewardModel(centring=0.1).loss(batch), 1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_a_tie_pulls_the_scores_together_and_does_not_know_its_sides(model: str) -> None:
    method = RewardModelTies(tie_model=model)
    there, back = scored_pairs([0.0, 0.7], tie=True), scored_pairs([0.0, -0.7], tie=True)
    assert close(method.loss(there), method.loss(back))
    (right,), (left,) = (score_gradient(method, b, b.chosen) for b in (there, back))
    assert right[0] == exactly(0.0) and right[1] == exactly(-left[1]) and right[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tie", [False, True])
def test_scores_of_1000(model: str, tie: bool, dtype: torch.dtype) -> None:
    batch = scored_pairs([-2000.0, 0.0, 2000.0], tie, dtype)
    method = RewardModelTies(tie_model=model)
    loss, (slope,) = method.loss(batch), score_gradient(method, batch, batch.chosen)
    assert torch.isfinite(loss).all() and torch.isfinite(torch.tensor(slope)).all()
    # far out a tie costs d under Rao-Kupper and d/2 under Davidson, a wrong order d under both
    assert loss[0].item() == pytest.approx((1000.0 if tie and model == "davidson" else 2000.0), rel=2e-3)


def test_metrics_and_advice() -> None:
    d = scored_pairs([9.0, 0.0, 0.0, -9.0])
    batch = Pairs(d.chosen, d.rejected, torch.tensor([False, False, True, True]))
    found = RewardModelTies(tie_probability=0.8).metrics(batch)
    assert found["accuracies/three_way"].tolist() == [1, 0, 1, 0] and found["accuracies/tie"].tolist() == [1, 0]
    assert RewardModelTies(tie_probability=0.8).advise(batch) == ("", [])
    assert RewardModelTies().advise(batch)[1] == ["50% of the comparisons are ties, tie_probability is 0.25: raise it"]


@pytest.mark.parametrize("bad", [{"tie_probability": 0.0}, {"tie_probability": 1.0}, {"tie_model": "thurstone"}])
def test_bad_options(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^reward_model_ties: "):
        RewardModelTies(**bad)  # type: ignore[arg-type]
