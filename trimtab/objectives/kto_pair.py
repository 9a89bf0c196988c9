"""KTO on pairs, as first released; later versions split pairs into thumbs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class KTOPair(Objective):
    """Both answers of a pair as thumbs; the reference point of each half is the divergence on the other half.

    rho(y) = log pi(y|x)/pi_ref(y|x)
    KL_w   = max(0, mean_i rho(y_w,i)),   KL_l = max(0, mean_i rho(y_l,i))
    L      = [1 - sigma(beta (rho(y_w) - KL_l)) + 1 - sigma(beta (KL_w - rho(y_l)))] / 2
    """

    beta: float = option(0.1, "risk aversion: how soon utility saturates", source="paper, section 4.2", above=0)
    detach: bool = option(False, "no gradient through the two KL terms", source="the released code has it")
    feedback, needs, coupled = Pairs, frozenset({"reference"}), True
    paper = "arXiv:2402.01306"
    use = "Results of the early paired KTO are to be reproduced."
    avoid = "You start afresh: kto on the same pairs (convert: thumb) has the paper's reference point."
    differs = "The released code lets the gradient flow through both KL terms (the default here); KTO itself does not."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def divergence_of(self, y: Completions) -> Tensor:
        """max(0, mean rho) in nats, one number for the batch."""
        return (y.detach() if self.detach else y).log_ratio.mean().clamp(min=0)

    def loss(self, batch: Pairs) -> Tensor:
        gain = self.reward(batch.chosen) - self.beta * self.divergence_of(batch.rejected)
        safety = self.beta * self.divergence_of(batch.chosen) - self.reward(batch.rejected)
        # 1 - sigma(u) = sigma(-u)
        return (torch.sigmoid(-gain) + torch.sigmoid(-safety)) / 2

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        if not batch.learning:  # held-out pairs come one by one: there is no mean to take
            return {}
        sides = {"kl/chosen": batch.chosen, "kl/rejected": batch.rejected}
        return {name: self.divergence_of(y).reshape(1) for name, y in sides.items()}
