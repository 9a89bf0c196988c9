"""GRPO: the other answers to the same prompt take the place of a critic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.credit.clip import cut, ratio, surrogate
from trimtab.credit.group import standardised
from trimtab.credit.kl import kl
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class GRPO(Objective):
    """An answer's advantage is its reward in standard deviations of the K answers to its prompt.

    A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4),   ratio_t = pi(y_t|.) / pi_old(y_t|.)
    L   = -mean_i 1/|y_i| sum_t [min(ratio_t A_i, clip(ratio_t) A_i) - beta KL_t]          (equation 3)
    """

    beta: float = option(0.04, "weight of the KL to the reference, in the loss", source="paper, 4.2", at_least=0)
    clip_low: float = option(0.2, "ratio of at least 1 - c for bad answers", source="TRL 1.16", above=0)
    clip_high: float = option(0.2, "ratio of at most 1 + c for good answers", source="TRL 1.16", above=0)
    deviation: Literal["sample", "population"] = option(
        "sample", "divides by K - 1 or by K", source="TRL 1.16, verl", choices=("sample", "population")
    )
    estimator: str = option(
        "k3", "of the KL: k2, k3, or corrected (k3 times ratio)", source="paper, 4", choices=("k2", "k3", "corrected")
    )
    feedback, needs = Rollouts, frozenset({"reference"})
    paper = "arXiv:2402.03300"
    use = "You have a reward that can be checked and can afford many answers to each prompt."
    avoid = "Answers differ much in length: 1/|y| makes long wrong ones cheap. Or prompts are nearly all right or all wrong."
    differs = (
        "k3 in a loss descends KL(ref || pi); corrected is TRL's, and KL(pi || ref). TRL's defaults are DAPO's token mean and "
        "beta 0; open-instruct divides by K, HALOs clips the ratio to the reference."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio if self.beta else y.logp

    def credit(
        self, batch: Rollouts, memory: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return {"advantage": standardised(batch.score, batch.prompt, self.deviation)[batch.y.owner]}, memory

    def loss(self, batch: Rollouts) -> Tensor:
        y, moved = batch.y, ratio(batch.y.token_logps - batch.behaviour)
        gain = surrogate(moved, batch.advantage, self.clip_low, self.clip_high)
        return -batch.per_prompt(y.sum(gain - self.beta * kl(y.token_log_ratios, self.estimator, moved)) / y.length)

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(torch.ones_like(batch.y.length))

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return cut(ratio(batch.y.token_logps - batch.behaviour), batch.advantage, self.clip_low, self.clip_high)
