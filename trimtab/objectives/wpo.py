"""WPO: DPO whose pairs weigh as much as they look like the policy's own."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class WPO(DPO):
    """Off-policy pairs count less: each token's probability over what a token sampled from the policy has on average.

    w(y) = exp((1/|y|) sum_t [log pi(y_t|.) - log sum_v pi(v|.)^2]), no gradient
    L    = -w(y_w) w(y_l) log sigma(beta log u(y_w)/u(y_l)),   u(y) = pi(y|x)/pi_ref(y|x)
    """

    beta: float = option(0.01, "strength of the pull to the reference", source="paper, section 4", above=0)
    clamp: bool = option(True, "hold the product of both weights at 1 or below", source="authors' code; TRL up to 0.28")
    needs = frozenset({"reference", "collision"})
    paper = "arXiv:2406.11827"
    use = "Pairs that another model wrote, with the policy's own taste wanted (off-policy data)."
    avoid = (
        "The answers are far from anything the policy would say: all weights are then near 0 and nothing is learned."
    )
    differs = "TRL from 0.29 does not clamp; open-instruct's wpo has no alignment term. Weights come from the policy, each step."

    def weight(self, batch: Pairs) -> Tensor:
        """[R] w(y_w) w(y_l)."""

        def aligned(y: Completions) -> Tensor:
            y = y.detach()
            return y.sum(y.token_logps - y.extra("collision")) / y.length

        log_weight = aligned(batch.chosen) + aligned(batch.rejected)
        return log_weight.clamp(max=0 if self.clamp else 30).exp()  # 30: twice what any vocabulary allows

    def loss(self, batch: Pairs) -> Tensor:
        return self.weight(batch) * super().loss(batch)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return {"weight": self.weight(batch)}
