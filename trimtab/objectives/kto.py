"""Kahneman-Tversky Optimization: thumbs up and down, no pairs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class KTO(Objective):
    """Prospect-theoretic utility of each single answer relative to the policy's divergence from the reference.

    rho(x, y) = log pi(y|x)/pi_ref(y|x)
    z0        = max(0, mean_i rho(x_i, y_j)), j another row of the batch; no gradient
    v         = sigma(beta (rho - z0)) if desirable, sigma(beta (z0 - rho)) if not
    L         = lambda_y (1 - v)                                            (equation 8)
    """

    beta: float = option(0.1, "risk aversion: how soon utility saturates", source="paper, section 4.2", above=0)
    balance: str = option("none", "times weights by class counts", source="eq. 9", choices=("none", "paper", "legacy"))
    desirable_weight: float = option(1.0, "lambda_D", source="paper, equation 8", above=0)
    undesirable_weight: float = option(1.0, "lambda_U", source="paper, equation 8", above=0)
    feedback, needs = Thumbs, frozenset({"reference", "mismatched"})
    paper = "arXiv:2402.01306"
    use = "Single answers with a thumb up or down; the two kinds may be far from equally many."
    avoid = "You have clean pairs: they say more than two thumbs. Or batches are small: z0 is then noise."
    differs = "The authors' code and TRL take z0 from one microbatch; here it is always the whole batch's."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def baseline(self, batch: Thumbs) -> Tensor:
        """z0 in nats, one number for the whole batch; 0 where there is no other row to mismatch with."""
        log_ratio = batch.mismatched.log_ratio.detach()
        return (log_ratio.sum() / max(len(log_ratio), 1)).clamp(min=0)

    def loss(self, batch: Thumbs) -> Tensor:
        advantage = self.reward(batch.y) - self.beta * self.baseline(batch)
        good = self.desirable_weight * torch.sigmoid(-advantage)  # 1 - sigma(u) = sigma(-u)
        return torch.where(batch.desirable, good, self.undesirable_weight * torch.sigmoid(advantage))

    def settle(self, batch: Thumbs) -> Objective:
        if self.balance == "none":
            return self
        up, down = (max(n, 1) for n in batch.counts)  # in the middle of [1, 3/2], or of [1, 4/3]
        weight = (5 / 4 if self.balance == "paper" else 7 / 6) * down / up
        good, bad = self.desirable_weight * max(weight, 1), self.undesirable_weight * max(1 / weight, 1)
        return replace(self, balance="none", desirable_weight=good, undesirable_weight=bad)

    def advise(self, batch: Thumbs) -> tuple[str, list[str]]:
        up, down = batch.counts
        ratio = self.desirable_weight * up / (self.undesirable_weight * max(down, 1))
        note = f"lambda_D n_D / (lambda_U n_U) = {ratio:.2f} ({up} up, {down} down); the paper asks for 1 to 3/2: balance: paper"
        return batch.one_sided(self.name()), [] if 1 <= ratio <= 1.5 else [note]

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {"kl": self.baseline(batch).reshape(1)}
