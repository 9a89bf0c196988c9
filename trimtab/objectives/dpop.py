"""DPOP (DPO-positive): the chosen must not become less likely than under the reference."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class DPOP(DPO):
    """DPO can win by lowering the chosen less than the rejected; a penalty inside the margin forbids that.

    L = -log sigma(beta [log u(y_w)/u(y_l) - lambda max(0, -log u(y_w))]),   u(y) = pi(y|x)/pi_ref(y|x)
    """

    beta: float = option(0.3, "strength of the pull to the reference", source="paper, section 5", above=0)
    penalty_weight: float = option(
        50.0, "lambda, weight of a chosen answer below the reference", source="paper, section 5", at_least=0
    )
    paper = "arXiv:2402.13228"
    use = "Chosen and rejected differ in few tokens (mathematics, edits), where DPO lowers the chosen too."
    avoid = "The chosen answers are worse than what the policy would say: it is held to them all the same."
    differs = (
        "Version 1 of the paper has the penalty outside log sigma; the authors say inside. Rewards are without it."
    )

    def loss(self, batch: Pairs) -> Tensor:
        penalty = self.penalty_weight * relu(-batch.chosen.log_ratio)
        return -logsigmoid(self.beta * (batch.chosen.log_ratio - batch.rejected.log_ratio - penalty))
