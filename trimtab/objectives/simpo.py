"""SimPO: a reference-free, length-normalised preference loss."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class SimPO(Objective):
    """The reward is the mean log-probability, and the chosen must win by a target margin.

    r(y) = (beta/|y|) log pi(y|x)
    L    = -log sigma(r(y_w) - r(y_l) - gamma),   gamma = beta * gamma_beta_ratio       (equation 6)
    """

    beta: float = option(2.0, "scale of the mean log-probability", source="paper, table 8: 2.0 to 10", above=0)
    gamma_beta_ratio: float = option(
        0.5, "target margin gamma divided by beta", source="authors' README: tune from 0.5", at_least=0
    )
    feedback = Pairs
    paper = "arXiv:2405.14734"
    use = "Memory is short (no reference), or answers grow longer under DPO."
    avoid = "You must stay near the reference: nothing but the learning rate holds SimPO there."
    differs = "TRL and ms-swift carry CPO's likelihood term and an absolute gamma in it; turbo's gamma is the ratio used here."
    length_control = True

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.mean_logp

    def loss(self, batch: Pairs) -> Tensor:
        margin = self.reward(batch.chosen) - self.reward(batch.rejected)
        return -logsigmoid(margin - self.beta * self.gamma_beta_ratio)
