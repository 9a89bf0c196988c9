"""Binary cross-entropy of thumbs: BCO without its shift."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.base import Objective, option


def class_means(batch: Thumbs, rows: Tensor) -> Tensor:
    """[R] ``rows``, scaled so that their mean is the mean over good rows plus the mean over bad rows."""
    up = batch.whole.desirable
    count = torch.where(batch.desirable, up.sum(), (~up).sum())
    # held-out rows come one by one: as if there were as many good rows as bad ones
    return rows * len(up) / count if batch.learning else 2 * rows


@dataclass(frozen=True)
class BCE(Objective):
    """A classifier of good and bad answers whose logit is the implicit reward; its loss bounds DPO's from above.

    r(y) = beta log pi(y|x)/pi_ref(y|x)
    L    = -E_D+[log sigma(r)] - E_D-[w(x) log sigma(-r)],   w(x) = p(good|x)/p(bad|x), see match_prompts
    """

    beta: float = option(0.1, "scale of the logit", source="trainer of BCO's authors in TRL", above=0)
    average: str = option("class", "each kind's mean, added; row: all's mean", source="paper", choices=("class", "row"))
    feedback, needs, weighs = Thumbs, frozenset({"reference"}), True
    paper = "arXiv:2404.04656"
    use = "A baseline for bco: what its shift is worth."
    avoid = "Rewards of both kinds drift to one side, as they usually do: bco's shift follows them."
    differs = "On pairs this is what TRL calls bco_pair since 0.29, and what NCA's authors call biased NCA."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def logit(self, batch: Thumbs) -> Tensor:
        return self.reward(batch.y)

    def loss(self, batch: Thumbs) -> Tensor:
        logit, weight = self.logit(batch), 1 if batch.weight is None else batch.weight
        rows = torch.where(batch.desirable, softplus(-logit), weight * softplus(logit))  # -log sigma(u) = softplus(-u)
        return class_means(batch, rows) if self.average == "class" else rows

    def advise(self, batch: Thumbs) -> tuple[str, list[str]]:
        return batch.one_sided(self.name()), []

    def bound(self, batch: Thumbs) -> dict[str, Tensor]:
        """BCE >= DPO (theorem 1) of every good row against every bad one: for methods that see the batch as a whole."""
        x, y = self.logit(batch)[batch.desirable][:, None], -self.logit(batch)[~batch.desirable]
        bce, dpo = softplus(-x) + softplus(-y), softplus(-x - y)
        error = softplus(torch.logaddexp(-x, -y) - dpo)  # log(1 + (e^-x + e^-y)/(1 + e^-(x+y))), their difference
        return {"bound/bce": bce.flatten(), "bound/dpo": dpo.flatten(), "bound/error": error.flatten()}

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {} if batch.weight is None else {"density_weight": batch.weight[~batch.desirable]}
