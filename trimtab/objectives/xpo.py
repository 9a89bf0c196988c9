"""XPO: DPO on pairs of policy and reference, with a bonus for leaving what the reference says."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class XPO(DPO):
    """Exploratory preference optimization: online DPO, one answer of each pair from the reference, made less likely.

    y ~ pi_old, y~ ~ pi_ref, who of them won: the judge.   r(y) = beta log pi(y|x)/pi_ref(y|x)
    L = -log sigma(r(y_w) - r(y_l)) + alpha log pi(y~|x)
    """

    alpha: float = option(1e-5, "weight of the bonus", source="TRL", at_least=0)
    paper = "arXiv:2405.21046"
    use = "Rounds of online DPO where the policy keeps saying what the reference says."
    avoid = "Answers are long: the bonus is a sum over tokens and grows with them."
    partner = True
    differs = "Algorithm 1 learns from all rounds so far (keep_rounds: all); TRL's (removed) used the last one only."

    def loss(self, batch: Pairs) -> Tensor:
        return super().loss(batch) + self.alpha * batch.target.logp
