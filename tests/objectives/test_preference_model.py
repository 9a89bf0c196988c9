"""Preference model: golden values, orders, ties, soft labels, circular preferences, stability."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import close, exactly, score_gradient, scored, scored_pairs, sigma, softplus
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.preference_model import PreferenceModel
from trimtab.objectives.reward_model import RewardModel


def one(tie: bool = False, strength: float | None = None) -> Pairs:
    """s(x, y_w, y_l) = 1.2 and s(x, y_l, y_w) = 0.5: the model leans to what stands first."""
    known = None if strength is None else torch.tensor([strength], dtype=torch.float64)
    return Pairs(scored([[0.3, 1.2]]), scored([[0.9, 0.5]]), torch.tensor([tie]), known)


def test_golden() -> None:
    """L = (log(1 + e^-1.2) + log(1 + e^0.5))/2 = 0.618679725759069
    slopes -sigma(-1.2)/2 = -0.115737608250491 and sigma(0.5)/2 = 0.311229665600927
    """
    batch, method = one(), PreferenceModel()
    assert method.loss(batch).item() == exactly(0.618679725759069) == exactly((softplus(-1.2) + softplus(0.5)) / 2)
    chosen, rejected = score_gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.0, -0.115737608250491]) and rejected == exactly([0.0, 0.311229665600927])


def test_a_tie_is_a_coin_in_both_orders() -> None:
    """p = 1/2: L = [log(1 + e^-1.2) + log(1 + e^1.2) + log(1 + e^-0.5) + log(1 + e^0.5)]/4, slopes (sigma - 1/2)/2."""
    batch = one(tie=True)
    wanted = (softplus(-1.2) + softplus(1.2) + softplus(-0.5) + softplus(0.5)) / 4
    assert PreferenceModel().loss(batch).item() == exactly(wanted)
    chosen, rejected = score_gradient(PreferenceModel(), batch, batch.chosen, batch.rejected)
    assert chosen[1] == exactly((sigma(1.2) - 0.5) / 2) and rejected[1] == exactly((sigma(0.5) - 0.5) / 2)
    turned = Pairs(batch.rejected, batch.chosen, batch.tie)
    assert PreferenceModel().loss(turned).item() == exactly(wanted), "a tie does not know its sides"


def test_soft_labels() -> None:
    """slope (sigma(s) - p)/2 in the winner's order, (sigma(s) - 1 + p)/2 in the other; p = 1 is a sure label."""
    batch = one(strength=0.8)
    chosen, rejected = score_gradient(PreferenceModel(strength="probability"), batch, batch.chosen, batch.rejected)
    assert chosen[1] == exactly((sigma(1.2) - 0.8) / 2) and rejected[1] == exactly((sigma(0.5) - 0.2) / 2)
    sure = one(strength=1.0)
    assert close(PreferenceModel(strength="probability").loss(sure), PreferenceModel().loss(one()))


def test_a_model_that_is_a_difference_of_rewards_is_the_reward_model() -> None:
    d = [-2.0, 0.0, 0.7]
    batch = Pairs(scored([[x] for x in d]), scored([[-x] for x in d]), torch.zeros(3, dtype=torch.bool))
    assert close(PreferenceModel().loss(batch), RewardModel().loss(scored_pairs(d)))


def test_rock_paper_scissors_can_be_learned() -> None:
    """a beats b beats c beats a: loss towards 0, while no rewards bring the mean loss below log 2."""
    wins = Pairs(scored([[30.0]] * 3), scored([[-30.0]] * 3), torch.zeros(3, dtype=torch.bool))
    assert PreferenceModel().loss(wins).max() < 1e-12
    rewards = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [softplus(float(r[(i + 1) % 3] - r[i])) for r in rewards for i in range(3)]
    assert min(sum(losses[3 * k : 3 * k + 3]) / 3 for k in range(200)) >= softplus(0.0)


def test_metrics() -> None:
    found = PreferenceModel().metrics(one())
    assert found["p_chosen"].tolist() == exactly([(sigma(1.2) + 1 - sigma(0.5)) / 2])
    assert found["same_in_both_orders"].tolist() == [0.0]  # the first one wins in either order: position bias
    agreed = Pairs(scored([[1.2]]), scored([[-0.5]]), torch.tensor([False]))
    assert PreferenceModel().metrics(agreed)["same_in_both_orders"].tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tie", [False, True])
def test_scores_of_1000(tie: bool, dtype: torch.dtype) -> None:
    batch = scored_pairs([-2000.0, 0.0, 2000.0], tie, dtype)
    loss, (slope,) = PreferenceModel().loss(batch), score_gradient(PreferenceModel(), batch, batch.chosen)
    assert torch.isfinite(loss).all() and torch.isfinite(torch.tensor(slope)).all()
    assert loss[0].item() == pytest.approx(500.0 if tie else 1000.0, rel=1e-6)


def test_advice_and_bad_options() -> None:
    soft, unknown = PreferenceModel(strength="probability"), float("nan")
    assert "1 of 1 comparisons have no strength" in soft.advise(one(strength=unknown))[0]
    assert soft.advise(one(tie=True, strength=unknown)) == ("", [])
    assert PreferenceModel().advise(one()) == ("", [])
    with pytest.raises(ConfigError, match=r"^preference_model: strength"):
        PreferenceModel(strength="margin")
