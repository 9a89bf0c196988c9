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

    def advise(self, batch: Thumbs) -> tuple[str, list[str]]:
        up, down = max(int(batch.desirable.sum()), 1), max(int((~batch.desirable).sum()), 1)
        ratio = self.desirable_weight * up / (self.undesirable_weight * down)
        note = (
            f"{up} thumbs up and {down} down give lambda_D n_D / (lambda_U n_U) = {ratio:.2f}; KTO's paper asks for 1 to 3/2 "
            f"(equation 9; 4/3 in its early versions): e.g. desirable_weight: {1.25 * down * self.undesirable_weight / up:.3g}"
        )
        return one_sided(self, batch.desirable), [] if 1 <= ratio <= 1.5 else [note]

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {"kl": self.baseline(batch).reshape(1)}


def one_sided(method: Objective, up: Tensor) -> str:
    """Why thumbs that all point one way cannot be learned from; "" where there are both kinds."""
    said = f"all {len(up)} thumbs point {'up' if up.any() else 'down'}; {method.name()} needs both kinds"
    return "" if up.any() and not up.all() else said
