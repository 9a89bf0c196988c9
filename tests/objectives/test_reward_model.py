"""Bradley-Terry reward model: golden values, which token is read, margins, soft labels, centring, stability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import close, exactly, pairs_of, score_gradient, scored, scored_pairs, softplus
from trimtab.errors import ConfigError, NeedError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.cdpo import CDPO
from trimtab.objectives.dpo import DPO
from trimtab.objectives.reward_model import RewardModel


def one(strength: float = 0.3) -> Pairs:
    """Numbers after each token: 0.3, 1.2 for the chosen, 0.9, -0.4, 0.5 for the rejected; d = 1.2 - 0.5 = 0.7."""
    known = torch.tensor([strength], dtype=torch.float64)
    return Pairs(scored([[0.3, 1.2]]), scored([[0.9, -0.4, 0.5]]), torch.tensor([False]), known)


def test_golden() -> None:
    """L = log(1 + e^-0.7) = 0.403186048885458;  dL/dd = -sigma(-0.7) = -0.331812227831834, at the last token only."""
    batch, method = one(), RewardModel()
    assert method.loss(batch).item() == exactly(0.403186048885458)
    chosen, rejected = score_gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.0, -0.331812227831834]) and rejected == exactly([0.0, 0.0, 0.331812227831834])


def test_golden_with_every_term() -> None:
    """Margin 0.3, so d = 0.4; eps 0.2; c 0.1 and s_w + s_l = 1.7:
    L = 0.8 log(1 + e^-0.4) + 0.2 log(1 + e^0.4) + 0.1 * 1.7^2 = 0.882015252399953
    dL/dd = -0.8 sigma(-0.4) + 0.2 sigma(0.4) = -0.201312339887548;  centring adds 2 * 0.1 * 1.7 = 0.34 to both
    """
    batch, method = one(), RewardModel(strength="margin", label_smoothing=0.2, centring=0.1)
    assert method.loss(batch).item() == exactly(0.882015252399953)
    chosen, rejected = score_gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.0, 0.34 - 0.201312339887548])
    assert rejected == exactly([0.0, 0.0, 0.34 + 0.201312339887548])


def test_only_the_last_token_is_read() -> None:
    batch = one()
    other = Pairs(scored([[9.0, 1.2]]), scored([[-9.0, 7.0, 0.5]]), batch.tie)
    assert close(RewardModel().loss(batch), RewardModel().loss(other))
    with pytest.raises(NeedError, match='"score" was read'):
        RewardModel().loss(pairs_of([0.7]))


@pytest.mark.parametrize("d", [[-3.0, 0.0, 0.7, 4.0]])
def test_it_is_dpo_on_explicit_rewards(d: list[float]) -> None:
    batch, implicit = scored_pairs(d), pairs_of(d)
    assert close(RewardModel().loss(batch), DPO(beta=1.0).loss(implicit))
    smooth = RewardModel(label_smoothing=0.2).loss(batch)
    assert close(smooth, CDPO(beta=1.0, label_smoothing=0.2).loss(implicit))


def test_what_strength_means() -> None:
    """s = 0.3, d = 0.7: margin log(1 + e^-0.4); weight 0.3 log(1 + e^-0.7); soft labels p log and (1 - p) log."""

    def loss(strength: str, s: float = 0.3) -> float:
        return RewardModel(strength=strength).loss(one(s)).item()

    assert loss("margin") == exactly(softplus(-0.4)) and loss("weight") == exactly(0.3 * softplus(-0.7))
    assert loss("probability") == exactly(0.3 * softplus(-0.7) + 0.7 * softplus(0.7))
    p = 1 / (1 + torch.tensor(-0.3, dtype=torch.float64).exp()).item()
    assert loss("reward_difference") == exactly(p * softplus(-0.7) + (1 - p) * softplus(0.7))
    assert loss("probability", 1.0) == loss("ignored") == exactly(softplus(-0.7))
    assert loss("margin", 0.0) == loss("weight", 1.0) == loss("ignored")
    # a held-out row whose strength is unknown is an ordinary comparison
    for strength in ("margin", "weight", "probability", "reward_difference"):
        assert loss(strength, float("nan")) == loss("ignored")


def test_soft_labels_are_fitted_where_the_odds_are_theirs() -> None:
    """dL/dd = sigma(d) - p (spec D.8)."""
    batch = replace(scored_pairs([0.7]), strength=torch.tensor([0.9], dtype=torch.float64))
    ((slope,),) = score_gradient(RewardModel(strength="probability"), batch, batch.chosen)
    assert slope == exactly(torch.sigmoid(torch.tensor(0.7, dtype=torch.float64)).item() - 0.9)


def test_centring_sees_the_level_and_only_the_level() -> None:
    batch = one()
    higher = Pairs(scored([[0.3, 2.2]]), scored([[0.9, -0.4, 1.5]]), batch.tie)
    assert close(RewardModel().loss(batch), RewardModel().loss(higher))
    gap = RewardModel(centring=0.1).loss(higher) - RewardModel(centring=0.1).loss(batch)
    assert gap.item() == exactly(0.1 * (3.7**2 - 1.7**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"strength": "margin"}])
def test_scores_of_1000(options: dict[str, Any], dtype: torch.dtype) -> None:
    """OpenRLHF's log(1 + exp(r_l - r_w)) is inf here."""
    batch = scored_pairs([-2000.0, -1.0, 0.0, 1.0, 2000.0], dtype=dtype)
    batch = replace(batch, strength=torch.zeros(5, dtype=dtype))
    loss = RewardModel(**options).loss(batch)
    (slope,) = score_gradient(RewardModel(**options), batch, batch.chosen)
    assert torch.isfinite(loss).all() and torch.isfinite(torch.tensor(slope)).all()
    assert loss[0].item() == pytest.approx(2000.0 * (1 - options.get("label_smoothing", 0)), rel=1e-6)
    assert slope[0] == pytest.approx(-1 + options.get("label_smoothing", 0))


def test_the_margin_moves_the_gradient() -> None:
    """OpenRLHF's LogExpLoss takes a margin and ignores it (spec 2)."""
    batch = one(5.0)
    ((_, with_margin),) = score_gradient(RewardModel(strength="margin"), batch, batch.chosen)
    ((_, without),) = score_gradient(RewardModel(), batch, batch.chosen)
    assert with_margin < without < 0


def test_what_is_refused() -> None:
    unknown = one(float("nan"))
    refused, _ = RewardModel(strength="margin").advise(unknown)
    assert refused == "1 of 1 comparisons have no strength; reward_model needs one for each, or strength: ignored"
    assert RewardModel().advise(unknown) == ("", [])
    assert "no probabilities" in RewardModel(strength="probability").advise(one(1.5))[0]
    for bad in ({"label_smoothing": 0.5}, {"centring": -0.1}, {"strength": "sure"}):
        with pytest.raises(ConfigError, match=r"^reward_model: "):
            RewardModel(**bad)  # type: ignore[arg-type]
