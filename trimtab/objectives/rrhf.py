"""RRHF: rank answers by their likelihood, imitate the best."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option
from trimtab.objectives.plackett_luce import places


def of_the_best(batch: Rankings, values: Tensor) -> Tensor:
    """[B] -> [R] the value of each prompt's best completion; the mean where several share the first rank."""
    best = (places(batch) == 1).to(values)
    return (best * batch.table(values, 0.0)).sum(1) / best.sum(1)


@dataclass(frozen=True)
class RRHF(Objective):
    """Rank responses to align with human feedback: a hinge on every pair in the wrong order, and likelihood of the best.

    s_k = log pi(y_k|x) / |y_k|^p
    L   = w sum_{k better than i} max(0, s_i - s_k) - log pi(y_1|x)
    """

    length_penalty: float = option(1.0, "p: 1 is the mean log-prob, 0 the sum", source="paper", at_least=0)
    rank_weight: float = option(1.0, "w: weight of the hinges", source="paper; authors' script", above=0)
    nll_normalise: str = option(
        "sequence_sum",
        "how the best answer's log-prob counts",
        source="paper",
        choices=("sequence_sum", "sequence_mean"),
    )
    feedback, with_sft, length_control = Rankings, True, True
    paper = "arXiv:2304.05302"
    use = "Ranked answers of several models, one of them good enough to imitate, and no memory for a reference."
    avoid = "The best of each list is not worth imitating: it is fine-tuned on that one."
    differs = (
        "The authors' code takes the NLL as a mean over the padded length, with rank_weight 100 (1 in their script)."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.logp / y.length**self.length_penalty

    def loss(self, batch: Rankings) -> Tensor:
        s, rank = batch.table(self.reward(batch.y), 0.0), places(batch)
        better = rank[:, :, None] < rank[:, None, :]
        hinge = torch.where(better, relu(s[:, None, :] - s[:, :, None]), 0).sum((1, 2))
        likelihood = batch.y.logp if self.nll_normalise == "sequence_sum" else batch.y.mean_logp
        return self.rank_weight * hinge - of_the_best(batch, likelihood)
