"""Robust DPO: unbiased under flipped labels."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class RobustDPO(DPO):
    """DPO whose expectation under labels flipped at rate eps equals DPO on clean labels.

    L = [-(1 - eps) log sigma(m) + eps log sigma(-m)] / (1 - 2 eps),   m = r(y_w) - r(y_l)

    Unbounded below: a negative loss is legal.
    """

    flip_rate: float = option(0.1, "share of labels believed to be flipped", source="ours", at_least=0, below=0.5)
    paper = "arXiv:2403.00409"
    use = "Labels were flipped at a known rate, and the expected loss on clean labels is wanted."
    avoid = "The flip rate is unknown and may be near zero: the loss is unbounded below and over-fits clean labels."

    def loss(self, batch: Pairs) -> Tensor:
        eps, margin = self.flip_rate, self.reward(batch.chosen) - self.reward(batch.rejected)
        return (-(1 - eps) * logsigmoid(margin) + eps * logsigmoid(-margin)) / (1 - 2 * eps)
