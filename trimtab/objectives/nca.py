"""NCA on pairs: the likelihood of the chosen answer itself has a target."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


def data_or_noise(rewards: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """[R, K] -> [R]: is an answer data or noise?  -sum_k data_k log sigma(r_k) - sum_k noise_k log sigma(-r_k)."""
    return -(data * logsigmoid(rewards) + noise * logsigmoid(-rewards)).sum(1)


@dataclass(frozen=True)
class NCA(DPO):
    """Noise contrastive alignment: absolute rewards, so that the chosen answer does not become less likely.

    L = -log sigma(r(y_w)) - 1/2 log sigma(-r(y_w)) - 1/2 log sigma(-r(y_l)),   r(y_w) -> log 2
    """

    beta: float = option(0.01, "strength of the pull to the reference", source="authors' README", above=0)
    noise: str = option(
        "both",
        "answers that count as noise; rejected alone is the biased NCA, without the 1/2",
        source="paper",
        choices=("both", "rejected"),
    )
    paper = "arXiv:2402.05369"
    use = "DPO lowers the likelihood of chosen answers and that hurts (reasoning, code)."
    avoid = (
        "Only the order matters to you, or the reference is far from the answers: it depends on absolute log-ratios."
    )
    differs = "On pairs InfoNCA is DPO. TRL's bco_pair from 0.29 is noise: rejected (its reward shift was dropped)."

    def loss(self, batch: Pairs) -> Tensor:
        rewards = torch.stack([self.reward(batch.chosen), self.reward(batch.rejected)], 1)
        noise = (0.5, 0.5) if self.noise == "both" else (0.0, 1.0)
        return data_or_noise(rewards, rewards.new_tensor((1.0, 0.0)), rewards.new_tensor(noise))
