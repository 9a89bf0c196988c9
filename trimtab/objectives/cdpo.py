"""Conservative DPO: label smoothing for labels that may be flipped."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class CDPO(DPO):
    """DPO that believes each label with probability 1 - eps only; the margin then has a finite optimum.

    m = r(y_w) - r(y_l)
    L = -(1 - eps) log sigma(m) - eps log sigma(-m),   smallest at m = log((1 - eps) / eps)
    """

    label_smoothing: float = option(
        0.1,
        "eps, share of labels doubted",
        source="ours; the note asks for the share of flipped labels",
        at_least=0,
        below=0.5,
    )
    paper = "Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO (ericmitchell.ai/cdpo.pdf)"
    use = "A known share of labels is wrong, and margins must stay finite."
    avoid = "Labels are clean: it holds margins back. For an unbiased loss at a known flip rate use robust_dpo."

    def loss(self, batch: Pairs) -> Tensor:
        eps, margin = self.label_smoothing, self.reward(batch.chosen) - self.reward(batch.rejected)
        return -(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)
