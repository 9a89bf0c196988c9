"""Offline PPO of the HALOs report: the clipped objective on fixed answers with rewards +1 and -1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.credit.gae import at_end, gae, reward_to_go
from trimtab.credit.whiten import whiten
from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class OfflinePPO(Objective):
    """Every token is an action; the behaviour policy is taken to be the reference and never renewed.

    R_t   = +1 or -1 at the last token, 0 before;  A = whitened GAE(gamma, lambda) of R and V;  G = rewards to go
    ratio = pi(y_t|.)/pi_ref(y_t|.)
    L     = mean_t max(-A ratio, -A clip(ratio)) + c_v (1/2) (V - G)^2 + c_kl log ratio
    """

    clip: float = option(0.5, "c: ratio in [1 - c, 1 + c], or [c, 1/c]", source="authors' code", above=0, below=1)
    version: str = option("head", "report: [c, 1/c], -c_kl, G after t", source="code now", choices=("head", "report"))
    gamma: float = option(0.99, "discount", source="authors' code", above=0, at_most=1)
    gae_lambda: float = option(0.95, "lambda of GAE", source="authors' code", at_least=0, at_most=1)
    value_weight: float = option(0.01, "c_v", source="authors' code", at_least=0)
    kl_weight: float = option(0.1, "c_kl", source="authors' code", at_least=0)
    feedback, needs, coupled = Thumbs, frozenset({"reference", "value"}), True
    paper = "contextual.ai/better-cheaper-faster-llm-alignment-with-kto (technical report, 2023)"
    use = "To repeat the comparison of the HALOs report: KTO and DPO against PPO without sampling."
    avoid = "You want a good model: the answers are not the policy's own."
    differs = (
        "The report's text clips to [0.25, 4], its code never did. In version report the KL term raises all answers."
    )
    level = "token"

    def reward(self, y: Completions) -> Tensor:
        return y.log_ratio

    def advantages(self, batch: Thumbs) -> tuple[Tensor, Tensor]:
        """[N] whitened advantages and rewards to go, both without a graph."""
        y, value = batch.y, batch.y.extra("value").detach()
        paid = at_end(y, torch.where(batch.desirable, 1.0, -1.0).to(value))
        advantage, to_go = gae(y, paid, value, self.gamma, self.gae_lambda)[0], reward_to_go(y, paid, self.gamma)
        return whiten(advantage), to_go - paid if self.version == "report" else to_go

    def loss(self, batch: Thumbs) -> Tensor:
        y, (advantage, to_go) = batch.y, self.advantages(batch)
        log_ratio = y.token_log_ratios
        ratio = log_ratio.clamp(-30, 30).exp()  # far outside the clip
        low, high = (1 - self.clip, 1 + self.clip) if self.version == "head" else (self.clip, 1 / self.clip)
        surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
        kl = log_ratio if self.version == "head" else -log_ratio
        error = 0.5 * (y.extra("value") - to_go) ** 2
        return y.sum(surrogate + self.value_weight * error + self.kl_weight * kl)

    def size(self, batch: Thumbs) -> Tensor:
        return batch.y.length
