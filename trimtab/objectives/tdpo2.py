"""TDPO2: token-level DPO whose constraint holds the rejected answer's divergence, scaled by alpha."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.tdpo1 import TDPO1


@dataclass(frozen=True)
class TDPO2(TDPO1):
    """TDPO1 with a weight on the divergence terms, and no gradient through the chosen answer's.

    D(y) = sum_t KL(pi_ref(.|x, y_<t) || pi(.|x, y_<t))
    L    = -log sigma(beta log u(y_w)/u(y_l) - alpha beta (D(y_l) - sg D(y_w))),   u(y) = pi(y|x)/pi_ref(y|x)
    """

    alpha: float = option(0.5, "weight of the divergence terms; 0 is DPO", source="authors' code", at_least=0)
    use = "Pairs, and sequential KL must stay low at equal utility; for larger learning rates than TDPO1 bears."
    differs = "Only D(y_w) is without gradient, not the chosen log-ratio (a common misreading)."

    def penalty(self, batch: Pairs) -> Tensor:
        chosen, rejected = self.drift(batch)
        return self.alpha * (rejected - chosen.detach())
