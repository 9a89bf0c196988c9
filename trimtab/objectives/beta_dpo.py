"""beta-DPO: beta follows the margins of the batch, and pairs of unusual margin are left out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class BetaDPO(DPO):
    """A batch of clear pairs gets a larger beta than one of close pairs; evaluation uses beta itself, on all pairs.

    h = log u(y_w)/u(y_l),   u(y) = pi(y|x)/pi_ref(y|x);   M0, sigma: running mean and deviation of M = h
    b = max(0.001, beta [1 + alpha (mean of M over the kept pairs - M0)]), no gradient
    L = -(n/k) log sigma(b h) of k pairs of n, drawn with p ~ exp(-(M - M0)^2 / 2 sigma^2); 0 of the others
    """

    alpha: float = option(0.6, "how strongly beta follows M; towards 0: not at all", source="authors' README", above=0)
    filtered_share: float = option(0.2, "1 - k/n; towards 0: none", source="authors' README", above=0, below=1)
    gap: str = option("log_ratio", "M: h or beta h (reward)", source="authors' code", choices=("log_ratio", "reward"))
    update_rate: float = option(0.1, "share of a batch in M0 and sigma", source="paper: m = 0.9", above=0, below=1)
    filter_seed: int = option(0, "seed of the draw", source="ours", at_least=0)
    paper = "arXiv:2407.08639"
    use = "Pairs of mixed quality: some margins are outliers, and no single beta suits all batches."
    avoid = "Batches are small: mean and deviation of their margins are then noise."
    differs = "M is beta h in the paper. The authors start M0 and sigma at 0 and update them in evaluation too."

    def gaps(self, batch: Pairs) -> Tensor:
        h = batch.chosen.detach().log_ratio - batch.rejected.detach().log_ratio
        return h if self.gap == "log_ratio" else self.beta * h

    def remember(self, batch: Pairs, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        gap, step = self.gaps(batch), memory.get("step", torch.zeros((), dtype=torch.long))
        now = {"gap_mean": gap.mean(), "gap_std": gap.std(correction=min(1, len(gap) - 1))}
        return {"step": step + 1, **{k: torch.lerp(memory.get(k, v), v, self.update_rate) for k, v in now.items()}}

    def drawn(self, batch: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        gap, memory = self.gaps(batch), batch.memory or self.remember(batch, {})
        step, mean, std = (memory[k] for k in ("step", "gap_mean", "gap_std"))
        race = torch.Generator().manual_seed(1_000_003 * self.filter_seed + int(step))
        gumbel = -torch.empty(len(gap), dtype=torch.float64).exponential_(generator=race).log()
        order, k = gap.argsort(), max(1, int(len(gap) * (1 - self.filtered_share) + 1e-9))  # noise by M, not by row
        kept = order[(gumbel.to(gap) - ((gap[order] - mean) / (std + 1e-6)) ** 2 / 2).topk(k).indices]
        beta = (self.beta * (1 + self.alpha * (gap[kept].mean() - mean))).clamp(min=1e-3)
        return kept, {"beta_used": beta, "gap_mean": mean, "gap_std": std, "mask_count": torch.tensor(1.0 * k)}

    def loss(self, batch: Pairs) -> Tensor:
        if not batch.learning:
            return super().loss(batch)
        (kept, now), h = self.drawn(batch), batch.chosen.log_ratio - batch.rejected.log_ratio
        return -torch.zeros_like(h).index_fill(0, kept, len(h) / len(kept)) * logsigmoid(now["beta_used"] * h)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return {k: v[None] for k, v in self.drawn(batch)[1].items()} if batch.learning else {}
