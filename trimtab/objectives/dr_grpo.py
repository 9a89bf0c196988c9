"""Dr. GRPO: GRPO without the two divisions that bias it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.credit.clip import cut, ratio, surrogate
from trimtab.credit.group import centred
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class DrGRPO(Objective):
    """GRPO done right: no deviation, which weighs prompts, and a constant for the length, which weighs answers.

    A_i = r_i - mean_j r_j,   ratio_t = pi(y_t|.) / pi_old(y_t|.)
    L   = -mean_i 1/longest sum_t min(ratio_t A_i, clip(ratio_t) A_i)
    """

    clip_low: float = option(0.2, "ratio of at least 1 - c for bad answers", source="authors' code", above=0)
    clip_high: float = option(0.2, "ratio of at most 1 + c for good answers", source="authors' code", above=0)
    longest: int = option(
        96, "what a loss is divided by: sample_tokens", source="authors' code", at_least=1, follows="sample_tokens"
    )
    feedback = Rollouts
    paper = "arXiv:2503.20783"
    use = "Rewards that can be checked, and neither length nor difficulty of a prompt shall bend the gradient."
    avoid = "Rewards of different prompts have different scales: the largest scale then rules."
    differs = (
        "longest only scales the gradient. The authors' code divides by the longest answer that it samples, TRL does, too; "
        "verl divides by it but not by the number of answers."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.logp

    def credit(
        self, batch: Rollouts, memory: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return {"advantage": centred(batch.score, batch.prompt)[batch.y.owner]}, memory

    def loss(self, batch: Rollouts) -> Tensor:
        moved = ratio(batch.y.token_logps - batch.behaviour)
        return -batch.per_prompt(batch.y.sum(surrogate(moved, batch.advantage, self.clip_low, self.clip_high)))

    def size(self, batch: Rollouts) -> Tensor:
        return self.longest * batch.per_prompt(torch.ones_like(batch.y.length))

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return cut(ratio(batch.y.token_logps - batch.behaviour), batch.advantage, self.clip_low, self.clip_high)
