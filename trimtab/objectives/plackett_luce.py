"""Plackett-Luce DPO: maximum likelihood of whole rankings."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option


def places(batch: Rankings) -> Tensor:
    """[R, K] 1 + how many are better; NaN where a prompt has fewer completions: neither better nor worse than any."""
    rank = batch.table(batch.rank.to(batch.y.length), torch.nan)
    return torch.where(rank.isnan(), rank, 1 + (rank[:, None, :] < rank[:, :, None]).sum(2))


@dataclass(frozen=True)
class PlackettLuce(Objective):
    """The best is chosen among all, the second among the rest, and so on; with two completions it is DPO.

    r_k = beta log pi(y_k|x)/pi_ref(y_k|x),   y_1 the best of K
    L   = -sum_k [r_k - log sum_{j >= k} exp(r_j)]
    """

    beta: float = option(0.1, "strength of the pull to the reference", source="paper, section 6", above=0)
    feedback, needs, untied = Rankings, frozenset({"reference"}), True
    paper = "arXiv:2305.18290"
    use = "Full rankings of several answers to each prompt, without ties."
    avoid = "Places far down the ranking are noisy: each counts as much as the first one (lipo weighs them)."
    differs = (
        "Ties have no probability in the model: training data with ties is refused, not broken at random; in rounds, lists with "
        "ties are left out."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def loss(self, batch: Rankings) -> Tensor:
        r, place = batch.table(self.reward(batch.y), 0.0), places(batch)
        left = place[:, None, :] >= place[:, :, None]
        rest = torch.where(left, r[:, None, :], torch.finfo(r.dtype).min).logsumexp(2)
        return torch.where(place.isnan(), 0, rest - r).sum(1)

    def advise(self, batch: Rankings) -> tuple[str, list[str]]:
        place = places(batch)
        equal = (place[:, :, None] == place[:, None, :]).sum((1, 2))
        tied = int((equal > torch.bincount(batch.prompt)).sum())
        said = f"{tied} of {len(batch)} rankings have ties, for which {self.name()} has no probability"
        return said if tied else "", []
