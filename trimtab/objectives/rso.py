"""RSO: the two losses of statistical rejection sampling optimization."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.gpo import FUNCTIONS

NAMES = {"hinge_norm": "hinge", "sigmoid_norm": "logistic"}


@dataclass(frozen=True)
class RSO(Objective):
    """Losses on log-probs normalised by the reference, for pairs sampled near the optimal policy.

    z = gamma log u(y_w)/u(y_l),   u(y) = pi(y|x)/pi_ref(y|x)
    L = max(0, 1 - z)   (hinge_norm)   or   -log sigma(z)   (sigmoid_norm)
    """

    gamma: float = option(0.05, "scale of the margin", source="paper, section 4", above=0)
    function: str = option(
        "hinge_norm",
        "of the margin; sigmoid_norm is DPO with beta = gamma",
        source="what torchtune and TRL call RSO; the paper compares both",
        choices=tuple(NAMES),
    )
    feedback, needs = Pairs, frozenset({"reference"})
    paper = "arXiv:2309.06657"
    use = "Pairs made by rejection sampling from the policy's own answers and a reward model."
    avoid = "The pairs were written by other models: the method's point is the sampling, not this loss."
    differs = (
        "The sampler (its temperature is another one) is a source of pairs, not this loss. TRL's hinge is hinge_norm."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.gamma * y.log_ratio

    def loss(self, batch: Pairs) -> Tensor:
        return FUNCTIONS[NAMES[self.function]](self.reward(batch.chosen) - self.reward(batch.rejected))
