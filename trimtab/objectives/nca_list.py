"""NCA on K scored answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Rankings
from trimtab.objectives.info_nca import InfoNCA
from trimtab.objectives.nca import data_or_noise


@dataclass(frozen=True)
class NCAList(InfoNCA):
    """Each answer's own reward has a target, so that good answers do not become less likely.

    p = softmax(s_1 / tau, .., s_K / tau),   r_k = beta log pi(y_k|x)/pi_ref(y_k|x)
    L = -sum_k [p_k log sigma(r_k) + (1/K) log sigma(-r_k)]
    """

    avoid = "Only the order of the answers matters to you: it depends on absolute log-ratios."
    differs = "The authors' code returns one number, whose two terms are means over different axes."

    def loss(self, batch: Rankings) -> Tensor:
        _, log_p = self.logs(batch)
        noise = batch.table(1 / torch.bincount(batch.prompt)[batch.prompt].to(log_p), 0.0)
        return data_or_noise(batch.table(self.reward(batch.y), 0.0), log_p.exp(), noise)
