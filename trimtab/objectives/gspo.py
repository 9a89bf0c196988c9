"""GSPO: GRPO whose ratio, like its reward, is the whole answer's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.credit.clip import ratio, surrogate
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives.base import option
from trimtab.objectives.dapo import DAPO


@dataclass(frozen=True)
class GSPO(DAPO):
    """An answer is clipped as a whole, by the geometric mean of its tokens' ratios.

    A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4),   s_i = (pi(y_i|x) / pi_old(y_i|x))^(1/|y_i|)
    L   = -mean_i min(s_i A_i, clip(s_i, 1 - c_low, 1 + c_high) A_i)                         (equation 5)
    """

    clip_low: float = option(3e-4, "s of at least 1 - c for bad answers", source="paper, 5.1", above=0)
    clip_high: float = option(4e-4, "s of at most 1 + c for good answers", source="paper, 5.1", above=0)
    by_answer = True
    paper = "arXiv:2507.18071"
    use = "Answers are learned from in several steps (batch_size below prompts_per_round, or passes), or experts are routed."
    avoid = "Every answer is used once: s is then 1, and this is GRPO without KL. One good token in a bad answer is not seen."
    differs = "verl writes sg[s] pi/sg[pi] for each token: loss and gradient are the same."

    def moved(self, batch: Rollouts) -> Tensor:
        y = batch.y
        return ratio(y.sum(y.token_logps - batch.behaviour) / y.length)[y.owner]

    def loss(self, batch: Rollouts) -> Tensor:
        gain = surrogate(self.moved(batch), batch.advantage, self.clip_low, self.clip_high)
        return -batch.per_prompt(batch.y.sum(gain) / batch.y.length)

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(torch.ones_like(batch.y.length))
