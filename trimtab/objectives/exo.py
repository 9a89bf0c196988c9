"""EXO on pairs: reverse KL from what the policy prefers to what was preferred."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """[R, K] -> [R] sum_k q_k (log q_k - log p_k)."""
    return (log_q.exp() * (log_q - log_p)).sum(1)


@dataclass(frozen=True)
class EXO(DPO):
    """Efficient exact optimization (EXO-pref): DPO turned around, KL(q || p) instead of KL(p || q).

    q = softmax(r(y_w), r(y_l)),   p = (1 - eps, eps)
    L = sum_k q_k (log q_k - log p_k),   smallest (0) at r(y_w) - r(y_l) = log((1 - eps) / eps)
    """

    beta: float = option(
        0.5, "beta_pi: strength of the pull to the reference", source="authors' scripts (TL;DR, HH)", above=0
    )
    label_smoothing: float = option(1e-3, "eps, share of labels doubted", source="paper", above=0, below=0.5)
    paper = "arXiv:2402.00856"
    use = "Pairs, and the policy shall seek the mode of what is preferred instead of covering all of it."
    avoid = "Many pairs start out clearly wrong: its gradient vanishes there, DPO's does not."
    differs = "The authors' code ignores its label smoothing (fixed labels 0 and -10) and divides logits by a temperature of 0.8."

    def loss(self, batch: Pairs) -> Tensor:
        rewards = torch.stack([self.reward(batch.chosen), self.reward(batch.rejected)], 1)
        log_p = rewards.new_tensor([math.log1p(-self.label_smoothing), math.log(self.label_smoothing)])
        return reverse_kl(rewards.log_softmax(1), log_p)
