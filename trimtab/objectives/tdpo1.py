"""TDPO1: token-level DPO, with the sequential forward KL in the margin."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class TDPO1(Objective):
    """DPO derived token by token: how far each answer's path has moved from the reference enters the margin.

    D(y) = sum_t KL(pi_ref(.|x, y_<t) || pi(.|x, y_<t))
    L    = -log sigma(beta log u(y_w)/u(y_l) - beta (D(y_l) - D(y_w))),   u(y) = pi(y|x)/pi_ref(y|x)
    """

    beta: float = option(0.1, "strength of the pull to the reference", source="paper, section 5", above=0)
    feedback, needs = Pairs, frozenset({"reference", "token_kl"})
    paper = "arXiv:2404.11999"
    use = "Pairs, and the divergence of good and bad answers must stay balanced; for small learning rates."
    avoid = "Memory is short, or the reference is cached: it needs the reference's whole distribution at every token."
    differs = "The authors log beta (log u + D) as reward; here it is beta log u. Their config trains TDPO1 by default."
    divergence, level = "forward KL per token", "token"

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def drift(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """[R] D(y_w) and D(y_l) in nats."""
        chosen, rejected = batch.chosen, batch.rejected
        return chosen.sum(chosen.extra("token_kl")), rejected.sum(rejected.extra("token_kl"))

    def penalty(self, batch: Pairs) -> Tensor:
        chosen, rejected = self.drift(batch)
        return rejected - chosen

    def loss(self, batch: Pairs) -> Tensor:
        margin = self.reward(batch.chosen) - self.reward(batch.rejected)
        return -logsigmoid(margin - self.beta * self.penalty(batch))

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        chosen, rejected = self.drift(batch)
        return {"kl/chosen": chosen, "kl/rejected": rejected, "kl/margin": rejected - chosen}
