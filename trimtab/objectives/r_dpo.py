"""R-DPO: DPO with a penalty on length."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class RDPO(DPO):
    """DPO's closed form for a reward minus alpha |y|: the length that judges like is explained away.

    r(y) = beta log pi(y|x)/pi_ref(y|x) + alpha |y|
    L    = -log sigma(r(y_w) - r(y_l))

    The sign is plus: a longer chosen answer needs less of a margin and so pulls less.
    """

    alpha: float = option(
        0.01, "price of a token, in units of reward", source="ours: 0.005 to 0.05 does not saturate sigma", at_least=0
    )
    length_control = True
    paper = "arXiv:2403.19159"
    use = "The chosen answers are longer than the rejected ones, and the model must not learn that."
    avoid = "Lengths differ by hundreds of tokens: alpha |y_w| - alpha |y_l| then saturates the sigmoid."
    differs = "No official code. A survey prints minus signs, which reward verbosity. Rewards contain alpha |y|."

    def reward(self, y: Completions) -> Tensor:
        return super().reward(y) + self.alpha * y.length
