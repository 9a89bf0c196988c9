"""Nash-MD: a policy that no other is preferred to, learned against a mixture of itself and the reference."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.credit.clip import ratio
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class NashMD(Objective):
    """Nash-MD-PG: an answer's score is its probability of being preferred to an answer of the mixture.

    P_i = P(y_i preferred to y'),   y' ~ pi_old^(1-b) pi_ref^b / Z      (b = 0: self-play; b = 1: against the reference)
    A_i = P_i - 1/2 - tau log(pi_old(y_i|x) / pi_ref(y_i|x))
    L   = -mean_i A_i pi(y_i|x) / pi_old(y_i|x)                         (section 7)
    """

    tau: float = option(0.1, "weight of the KL to the reference", source="TRL; the paper tried 0.01 to 0.2", above=0)
    feedback, needs, by_answer = Rollouts, frozenset({"reference"}), True
    paper = "arXiv:2312.00886"
    use = (
        "Preferences that no reward explains (a beats b beats c beats a). A judge of pairs gives the scores for b = 0."
    )
    avoid = "The judge gives plain rewards: scores must lie between 0 and 1, and 1/2 must mean equal."
    differs = (
        "TRL's (removed) KL term weighs each token by its own log-ratio only, a biased gradient; the paper's is the whole "
        "answer's, as here. The ratio is ours, for answers that are used again: it is 1 in the paper, and is not clipped."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.tau * y.log_ratio

    def credit(
        self, batch: Rollouts, memory: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        advantage = batch.score - 0.5 - self.tau * batch.y.log_ratio
        return {"advantage": advantage[batch.y.owner]}, memory

    def loss(self, batch: Rollouts) -> Tensor:
        y = batch.y
        return -batch.per_prompt(ratio(y.sum(y.token_logps - batch.behaviour)) * y.first(batch.advantage))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(torch.ones_like(batch.y.length))
