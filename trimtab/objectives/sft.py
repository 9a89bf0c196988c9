"""Supervised fine-tuning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Demonstrations
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class SFT(Objective):
    """Maximum likelihood of demonstrations:  L = -(1/N) sum_i log pi(y_i | x_i).

    N counts tokens of the whole batch (``token``), sequences (``sequence_sum``), or each sequence is first divided by
    its own length (``sequence_mean``).
    """

    normalise: str = option(
        "token",
        "what the sum of log-probs is divided by",
        source="token mean over the whole batch: transformers, TRL, OpenRLHF",
        choices=("token", "sequence_sum", "sequence_mean"),
    )
    feedback = Demonstrations
    paper = "arXiv:2203.02155"
    use = "Answers to imitate: the step before any preference method."
    avoid = "You have comparisons and already a model that follows instructions: SFT also raises what is bad alike."
    differs = "Three normalisations are in the wild; HALOs also drops tokens whose log-prob rounds to 0."
    with_sft = True

    def reward(self, y: Completions) -> Tensor:
        return y.mean_logp if self.normalise == "sequence_mean" else y.logp

    def loss(self, batch: Demonstrations) -> Tensor:
        return -self.reward(batch.y)

    def size(self, batch: Demonstrations) -> Tensor:
        return batch.y.length if self.normalise == "token" else torch.ones_like(batch.y.length)

    def metrics(self, batch: Demonstrations) -> dict[str, Tensor]:
        return {"nll": -batch.y.token_logps}
