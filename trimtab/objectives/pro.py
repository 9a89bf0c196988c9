"""PRO: each answer against all worse ones, the further apart the sharper."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option
from trimtab.objectives.info_nca import unscored, worth
from trimtab.objectives.plackett_luce import places
from trimtab.objectives.rrhf import of_the_best


@dataclass(frozen=True)
class PRO(Objective):
    """Preference ranking optimization: the answer at each place is chosen among itself and all worse ones.

    s_k = (1/|y_k|) log pi(y_k|x),   tau_ki = score_k - score_i,   T_k = max_i tau_ki,   i over answers worse than k
    L   = -sum_k log[exp(s_k T_k) / (exp(s_k T_k) + sum_i exp(s_i tau_ki))] - w (K - 1)^2 log pi(y_1|x)
    """

    sft_weight: float = option(0.05, "w: weight of the best answer's likelihood", source="authors' script", at_least=0)
    by: str = option(
        "scores", "tau: differences of scores, or 1 for every worse rank", source="paper", choices=("scores", "ranks")
    )
    feedback, with_sft, length_control = Rankings, True, True
    paper = "arXiv:2306.17492"
    use = "Lists of answers scored by a reward model, the best good enough to imitate, and no memory for a reference."
    avoid = "Score differences are large (over 10): the softmax is then a switch. Scale them."
    differs = (
        "The paper writes temperatures 1/tau. Its code adds 1e-10 inside the log, which takes over below s tau = -23."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.mean_logp

    def loss(self, batch: Rankings) -> Tensor:
        s = batch.table(self.reward(batch.y), 0.0)
        value = batch.table(worth(batch, "scores"), torch.nan) if self.by == "scores" else -places(batch)
        gap = value[:, :, None] - value[:, None, :]
        tau = torch.where(gap > 0, gap if self.by == "scores" else 1, 0)
        own = s * tau.amax(2)
        others = torch.where(gap > 0, s[:, None, :] * tau, torch.finfo(s.dtype).min).logsumexp(2)
        k = torch.bincount(batch.prompt).to(s)
        return softplus(others - own).sum(1) - self.sft_weight * (k - 1) ** 2 * of_the_best(batch, batch.y.logp)

    def advise(self, batch: Rankings) -> tuple[str, list[str]]:
        return unscored(batch, self.by, self.name()), []
