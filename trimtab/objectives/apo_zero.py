"""APO-zero: chosen answers up, rejected answers down."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class APOZero(DPO):
    """Anchored: each answer is held against the reference itself, not only against the other answer.

    L = -sigma(r(y_w)) + sigma(r(y_l)) + 1 = sigma(-r(y_w)) + sigma(r(y_l))
    """

    beta: float = option(0.1, "strength of the pull to the reference", source="authors' runs", above=0)
    paper = "arXiv:2408.06266"
    use = "The chosen answers are better than what the model itself says."
    avoid = "The model is already better than the chosen answers: apo_down then lowers both."
    differs = "The paper writes no + 1; TRL has it, and it changes no gradient. The loss lies between 0 and 2."

    def loss(self, batch: Pairs) -> Tensor:
        return torch.sigmoid(-self.reward(batch.chosen)) + torch.sigmoid(self.reward(batch.rejected))
