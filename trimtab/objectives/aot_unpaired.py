"""AOT for answers that were not compared with each other."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.aot import AOT, matched


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """The rewards of chosen answers as a whole shall beat those of rejected ones, rank by rank.

    u(y)  = pi(y|x)/pi_ref(y|x)
    d_(i) = sort_i(log u(y_w)) - sort_i(log u(y_l))
    L     = -(1 - eps) log sigma(beta d_(i)) - eps log sigma(-beta d_(i)),   i = 1 .. batch size
    """

    use = "Large batches in which chosen and rejected answers need not share a prompt."
    differs = (
        "TRL up to 0.27 calls this one aot_pair, and the paired one aot. Needs as many chosen as rejected answers."
    )

    def gap(self, batch: Pairs) -> Tensor:
        return matched(batch.chosen.log_ratio, batch.rejected.log_ratio)
