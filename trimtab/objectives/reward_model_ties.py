"""A reward model that learns from ties: Bradley-Terry, extended by Rao and Kupper or by Davidson."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.reward_model import off_centre
from trimtab.objectives.todo import Odds, rao_kupper, three_way


def davidson(d: Tensor, nu: float) -> Odds:
    """A tie in proportion to the geometric mean of both strengths."""
    first, second, tie = torch.stack([d / 2, -d / 2, torch.full_like(d, math.log(nu))]).log_softmax(0)
    return first, second, tie


@dataclass(frozen=True)
class RewardModelTies(Objective):
    """Maximum likelihood of wins and ties, d = s(y_1) - s(y_2), s(y) the model's number at the last token.

    Rao-Kupper: P(1 wins) = sigma(d - alpha),   P(tie) = sigma(d + alpha) - sigma(d - alpha),   alpha = 2 artanh(p0)
    Davidson:   (P(1), P(2), P(tie)) ~ (e^(d/2), e^(-d/2), nu),   nu = 2 p0 / (1 - p0)
    L = -log P(what was said) + c (s(y_1) + s(y_2))^2,   p0 = P(tie) at d = 0
    """

    tie_model: str = option(
        "rao_kupper", "how ties come about", source="paper, from 1967", choices=("rao_kupper", "davidson")
    )
    tie_probability: float = option(
        0.25, "p0: how often equally good answers tie", source="ours: TODO's alpha of 0.5", above=0, below=1
    )
    centring: float = option(0.0, "c: pulls scores to mean 0", source="as in reward_model", at_least=0)
    feedback, needs, ties = Pairs, frozenset({"score"}), True
    paper = "arXiv:2410.05328"
    use = "Comparisons in which annotators often said 'equally good'."
    avoid = "There are no ties: it is then reward_model with a margin."
    differs = "The papers' theta = e^alpha (Rao-Kupper) and nu (Davidson, 1970) are one option here, p0, for both."

    def reward(self, y: Completions) -> Tensor:
        return y.score

    def log_odds(self, batch: Pairs) -> Odds:
        d, p0 = self.reward(batch.chosen) - self.reward(batch.rejected), self.tie_probability
        return rao_kupper(d, 2 * math.atanh(p0)) if self.tie_model == "rao_kupper" else davidson(d, 2 * p0 / (1 - p0))

    def loss(self, batch: Pairs) -> Tensor:
        odds = self.log_odds(batch)
        return self.centring * off_centre(batch) - torch.where(batch.tie, odds[2], odds[0])

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return three_way(self.log_odds(batch), batch.tie)

    def advise(self, batch: Pairs) -> tuple[str, list[str]]:
        share = batch.tie.float().mean().item()
        note = f"{share:.0%} of the comparisons are ties, tie_probability is {self.tie_probability:g}: raise it"
        return "", [note] if share > self.tie_probability else []
