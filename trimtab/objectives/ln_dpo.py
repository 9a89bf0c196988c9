"""LN-DPO: length-normalised DPO."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class LNDPO(DPO):
    """DPO on the mean log-ratio per token, so that long answers do not win by their length.

    r(y) = (beta/|y|) log pi(y|x)/pi_ref(y|x)
    L    = -log sigma(r(y_w) - r(y_l))
    """

    beta: float = option(5.0, "scale of the mean log-ratio", source="Tulu 3: 5", above=0)
    length_control = True
    paper = "arXiv:2411.15124"
    use = "DPO makes answers longer and longer, and a reference must still hold the policy."
    avoid = "Answers are of one length: it is then DPO with another beta. Without a reference use simpo."
    differs = "TRL calls it sigmoid_norm, open-instruct dpo_norm; beta is larger than DPO's since the mean is small."

    def reward(self, y: Completions) -> Tensor:
        return super().reward(y) / y.length
