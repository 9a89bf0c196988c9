"""RLOO: REINFORCE with the other answers' mean reward as baseline."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.credit.clip import ratio, surrogate
from trimtab.credit.group import leave_one_out
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class RLOO(Objective):
    """The whole answer is one action; each of the K answers is compared with the mean of the K - 1 others.

    R_i = r_i - beta log(pi_old(y_i|x) / pi_ref(y_i|x)),   A_i = R_i - mean_{j != i} R_j
    L   = -mean_i min(ratio A, clip(ratio) A),             ratio = pi(y_i|x) / pi_old(y_i|x)
    """

    beta: float = option(0.05, "weight of the KL to the reference, in the reward", source="TRL 1.16", at_least=0)
    clip: float = option(
        0.2, "ratio in [1 - c, 1 + c]; only answers used again are touched", source="TRL 1.16", above=0
    )
    feedback, needs, by_answer = Rollouts, frozenset({"reference"}), True
    paper = "arXiv:2402.14740"
    use = "You have a reward and can sample: no critic, few settings."
    avoid = "One answer per prompt is all you can pay for."
    differs = "The paper takes one step per answer, where the ratio is 1; the clip on whole answers is TRL's."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio if self.beta else y.logp

    def credit(
        self, batch: Rollouts, memory: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        reward = batch.score - self.beta * batch.y.log_ratio
        return {"advantage": leave_one_out(reward, batch.prompt)[batch.y.owner]}, memory

    def loss(self, batch: Rollouts) -> Tensor:
        y, advantage = batch.y, batch.y.first(batch.advantage)
        moved = ratio(y.sum(y.token_logps - batch.behaviour))
        return -batch.per_prompt(surrogate(moved, advantage, self.clip, self.clip))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(torch.ones_like(batch.y.length))
