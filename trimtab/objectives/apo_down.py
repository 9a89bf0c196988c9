"""APO-down: both answers down, the rejected one further."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.apo_zero import APOZero


@dataclass(frozen=True)
class APODown(APOZero):
    """Anchored: the chosen answer is lowered against the reference, the rejected one against the chosen.

    L = sigma(r(y_w)) - sigma(r(y_w) - r(y_l)) + 1 = sigma(r(y_w)) + sigma(r(y_l) - r(y_w))
    """

    use = "The model itself is better than the chosen answers, yet chosen beats rejected."
    avoid = "The chosen answers are ones to imitate: it makes them less likely."
    differs = (
        "The paper writes no + 1. TRL from 0.29 mixes f-divergence scores into one half of it; here both are the same."
    )

    def loss(self, batch: Pairs) -> Tensor:
        chosen, rejected = self.reward(batch.chosen), self.reward(batch.rejected)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
