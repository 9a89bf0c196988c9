"""TODO: Tie-rank Oriented DPO, which learns from ties too."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


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
    avoid = "The data has no ties: it is then DPO with a target margin."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def log_odds(self, batch: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """[R] log P(first wins), log P(second wins), log P(tie)."""
        margin = self.reward(batch.chosen) - self.reward(batch.rejected)
        first, second = logsigmoid(margin - self.alpha), logsigmoid(-margin - self.alpha)
        # log(e^(2 alpha) - 1), stable for every alpha > 0
        return first, second, 2 * self.alpha + math.log(-math.expm1(-2 * self.alpha)) + first + second

    def loss(self, batch: Pairs) -> Tensor:
        first, _, tie = self.log_odds(batch)
        return -torch.where(batch.tie, tie, first)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        first, second, tie = self.log_odds(batch)
        said = torch.where(batch.tie, 2, 0)
        right = (torch.stack([first, second, tie]).argmax(0) == said).to(first.dtype)
        return {"accuracies/three_way": right, "accuracies/tie": right[batch.tie], "p_tie": tie.exp()}
