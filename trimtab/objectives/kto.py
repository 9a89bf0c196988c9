"""Kahneman-Tversky Optimization: thumbs up and down, no pairs."""

from dataclasses import dataclass

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
    desirable_weight: float = option(1.0, "lambda_D", source="paper, equation 8", above=0)
    undesirable_weight: float = option(1.0, "lambda_U", source="paper, equation 8", above=0)
    feedback, needs = Thumbs, frozenset({"reference", "mismatched"})
    paper = "arXiv:2402.01306"
    avoid = "You have clean pairs: they say more than two thumbs. Or batches are small: z0 is then noise."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def baseline(self, batch: Thumbs) -> Tensor:
        """z0 in nats, one number for the whole batch; 0 where there is no other row to mismatch with."""
        log_ratio = batch.mismatched.log_ratio.detach()
        return (log_ratio.sum() / max(len(log_ratio), 1)).clamp(min=0)

    def loss(self, batch: Thumbs) -> Tensor:
        advantage = self.reward(batch.y) - self.beta * self.baseline(batch)
        # 1 - sigma(u) = sigma(-u)
        good = self.desirable_weight * torch.sigmoid(-advantage)
        return torch.where(batch.desirable, good, self.undesirable_weight * torch.sigmoid(advantage))

    def advise(self, batch: Thumbs) -> tuple[str, list[str]]:
        up, down = int(batch.desirable.sum()), int((~batch.desirable).sum())
        if not up or not down:
            return f"all {up + down} thumbs point {'up' if up else 'down'}; kto needs both kinds", []
        ratio = self.desirable_weight * up / (self.undesirable_weight * down)
        if 1 <= ratio <= 1.5:
            return "", []
        weight = 1.25 * down * self.undesirable_weight / up
        return "", [
            f"{up} thumbs up and {down} down give lambda_D n_D / (lambda_U n_U) = {ratio:.2f}; the paper asks for 1 to 3/2 "
            f"(equation 9; 4/3 in its early versions): e.g. desirable_weight: {weight:.3g}"
        ]

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {"kl": self.baseline(batch).reshape(1)}
