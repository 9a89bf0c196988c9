"""TODO: Tie-rank Oriented DPO, which learns from ties too."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option

Odds = tuple[Tensor, Tensor, Tensor]  # [R] log P(first wins), log P(second wins), log P(tie)


def rao_kupper(margin: Tensor, alpha: float) -> Odds:
    """A tie where the margin, with noise, is within alpha of 0."""
    first, second = logsigmoid(margin - alpha), logsigmoid(-margin - alpha)
    # log(e^(2 alpha) - 1), stable for every alpha > 0
    return first, second, 2 * alpha + math.log(-math.expm1(-2 * alpha)) + first + second


def three_way(odds: Odds, tie: Tensor) -> dict[str, Tensor]:
    """Is what was said the likeliest outcome? Not where another one is as likely: at margin 0 both answers win alike."""
    first, second, both = odds
    said, other = torch.where(tie, both, first), torch.where(tie, first, both)
    right = ((said > other) & (said > second)).to(first.dtype)
    return {"accuracies/three_way": right, "accuracies/tie": right[tie], "p_tie": odds[2].exp()}


@dataclass(frozen=True)
class TODO(Objective):
    """A Bradley-Terry model with ties, m = r(y_1) - r(y_2), r(y) = beta log pi(y|x)/pi_ref(y|x).

    P(1 wins) = sigma(m - alpha)
    P(tie)    = (e^(2 alpha) - 1) sigma(m - alpha) sigma(-m - alpha)
    L         = -log P(what was said)
    """

    beta: float = option(0.01, "strength of the pull to the reference", source="paper, section 5", above=0)
    alpha: float = option(0.5, "half width of the band of margins called a tie", source="paper, section 5", above=0)
    feedback, needs, ties = Pairs, frozenset({"reference"}), True
    paper = "arXiv:2411.02442"
    use = "Annotators said 'equally good' often enough to learn from it."
    avoid = "The data has no ties: it is then DPO with a target margin."
    differs = "The authors' code has theta = -alpha with three defaults and overflows at large margins; the formula is the same."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def log_odds(self, batch: Pairs) -> Odds:
        return rao_kupper(self.reward(batch.chosen) - self.reward(batch.rejected), self.alpha)

    def loss(self, batch: Pairs) -> Tensor:
        first, _, tie = self.log_odds(batch)
        return -torch.where(batch.tie, tie, first)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return three_way(self.log_odds(batch), batch.tie)
