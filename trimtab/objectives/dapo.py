"""DAPO: GRPO with more room upwards, tokens instead of answers as the unit, and no KL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.credit.clip import cut, ratio, surrogate
from trimtab.credit.group import standardised
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class DAPO(Objective):
    """Every token of the batch counts the same, and an unlikely token may grow further before the clip stops it.

    A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4),   ratio_t = pi(y_t|.) / pi_old(y_t|.)
    L   = -1/(sum_i |y_i|) sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - c_low, 1 + c_high) A_i)     (equation 8)
    """

    clip_low: float = option(0.2, "ratio of at least 1 - c for bad answers", source="paper, 4.1", above=0)
    clip_high: float = option(0.28, "ratio of at most 1 + c for good answers", source="paper, 4.1", above=0)
    deviation: Literal["sample", "population"] = option(
        "sample", "divides by K - 1 or by K", source="authors' code (verl)", choices=("sample", "population")
    )
    feedback = Rollouts
    paper = "arXiv:2503.14476"
    use = "Long answers, rewards that can be checked. Set redraw (dynamic sampling) and overlong_buffer (its length penalty) too."
    avoid = "Nothing but a KL would hold the policy: rewards that are learned, and can be fooled."
    differs = (
        "The paper's sum runs over one prompt's answers; its code, TRL's and this one over all answers of the step."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.logp

    def credit(
        self, batch: Rollouts, memory: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return {"advantage": standardised(batch.score, batch.prompt, self.deviation)[batch.y.owner]}, memory

    def moved(self, batch: Rollouts) -> Tensor:
        """[N] how many times as likely each token has become since it was sampled."""
        return ratio(batch.y.token_logps - batch.behaviour)

    def loss(self, batch: Rollouts) -> Tensor:
        gain = surrogate(self.moved(batch), batch.advantage, self.clip_low, self.clip_high)
        return -batch.per_prompt(batch.y.sum(gain))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(batch.y.length)

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return cut(self.moved(batch), batch.advantage, self.clip_low, self.clip_high)
