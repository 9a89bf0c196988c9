"""LiPO: listwise preferences, weighted by what a wrong order costs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option
from trimtab.objectives.info_nca import unscored, worth


@dataclass(frozen=True)
class LiPO(Objective):
    """LiPO-lambda: DPO on every ordered pair of a list, weighted by what swapping the two places would change in DCG.

    r_i      = beta log pi(y_i|x)/pi_ref(y_i|x),   tau_i the place of r_i (1 the largest, no gradient)
    Delta_ij = |2^psi_i - 2^psi_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|
    L        = -sum_{psi_i > psi_j} Delta_ij log sigma(r_i - r_j)
    """

    beta: float = option(0.05, "strength of the pull to the reference", source="paper", above=0)
    by: str = option(
        "scores", "psi: scores in [0, 1], or (K - place)/(K - 1)", source="paper", choices=("scores", "ranks")
    )
    feedback, needs = Rankings, frozenset({"reference"})
    paper = "arXiv:2402.01878"
    use = "Lists of scored answers in which the top matters most."
    avoid = "Lists have two answers: it is then DPO with a weight per pair."
    differs = (
        "There is no official code. Answers of equal reward (all, at first) take places by their labels, best first."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def weight(self, batch: Rankings) -> Tensor:
        """[R, K, K] Delta_ij where psi_i > psi_j, else 0. A place without a completion is NaN: above and below nothing."""
        psi, r = (batch.table(t, torch.nan) for t in (worth(batch, self.by), self.reward(batch.y.detach())))
        above, apart = psi[:, :, None] > psi[:, None, :], (2 ** psi[:, :, None] - 2 ** psi[:, None, :]).abs()
        ahead = (r[:, :, None] > r[:, None, :]) | ((r[:, :, None] == r[:, None, :]) & above)
        discount = 1 / torch.log1p(1 + ahead.sum(1).to(psi))
        return torch.where(above, apart * (discount[:, :, None] - discount[:, None, :]).abs(), 0)

    def loss(self, batch: Rankings) -> Tensor:
        r = batch.table(self.reward(batch.y), 0.0)
        return (self.weight(batch) * softplus(r[:, None, :] - r[:, :, None])).sum((1, 2))

    def advise(self, batch: Rankings) -> tuple[str, list[str]]:
        psi = worth(batch, self.by)
        outside = (
            f"scores run from {psi.min():g} to {psi.max():g}; lipo weighs by 2^score and expects 0 to 1, or by: ranks"
        )
        return unscored(batch, self.by, self.name()) or (outside if psi.min() < 0 or psi.max() > 1 else ""), []
