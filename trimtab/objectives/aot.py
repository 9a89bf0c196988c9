"""AOT: the margins as a whole shall beat the reference's, rank by rank."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


def matched(a: Tensor, b: Tensor) -> Tensor:
    """[R] each value of a minus the value of b with the same rank: optimal transport on a line."""
    return a - b.sort().values[a.argsort().argsort()]


@dataclass(frozen=True)
class AOT(DPO):
    """Alignment via optimal transport, paired: sorted margins of the policy against sorted margins of the reference.

    d_(i) = sort_i(log pi(y_w|x)/pi(y_l|x)) - sort_i(log pi_ref(y_w|x)/pi_ref(y_l|x))
    L     = -(1 - eps) log sigma(beta d_(i)) - eps log sigma(-beta d_(i)),   i = 1 .. batch size
    """

    beta: float = option(0.01, "strength of the pull to the reference", source="authors' runs", above=0)
    label_smoothing: float = option(0.0, "eps, share of labels doubted", source="TRL", at_least=0, below=0.5)
    coupled = True
    paper = "arXiv:2406.05882"
    use = "Large batches of pairs, and the whole distribution of margins shall rise rather than each pair's."
    avoid = "Batches are small: with one row it is DPO, with few the order of the margins is noise."
    differs = "TRL sorts within one device; here the whole batch of a step. Held-out rows are measured alone, as DPO."

    def gap(self, batch: Pairs) -> Tensor:
        policy = batch.chosen.logp - batch.rejected.logp
        return matched(policy, batch.chosen.ref_logp - batch.rejected.ref_logp)

    def loss(self, batch: Pairs) -> Tensor:
        eps, margin = self.label_smoothing, self.beta * self.gap(batch)
        return -(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)
