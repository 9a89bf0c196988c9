"""Direct Preference Optimization."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class DPO(Objective):
    """Maximum likelihood of the comparisons under a Bradley-Terry model of the implicit reward.

    r(y) = beta log pi(y|x)/pi_ref(y|x)
    L    = -log sigma(r(y_w) - r(y_l))                                     (equation 7)
    """

    beta: float = option(0.1, "strength of the pull to the reference", source="paper, section 6", above=0)
    feedback, needs = Pairs, frozenset({"reference"})
    paper = "arXiv:2305.18290"
    use = "Clean comparisons and a reference that was trained on similar answers: the method to beat."
    avoid = "Labels are noisy (cDPO, robust DPO) or many pairs are ties (TODO)."
    differs = (
        "Summed log-probs as in the paper; TRL's sigmoid loss is the same, its label_smoothing was dropped in 0.29."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def loss(self, batch: Pairs) -> Tensor:
        return -logsigmoid(self.reward(batch.chosen) - self.reward(batch.rejected))
