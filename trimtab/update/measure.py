"""What is logged: one vector per name, whose mean is reported. The same vectors give held-out intervals."""

from __future__ import annotations

from typing import Any, assert_never

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Demonstrations, Pairs, Rankings, Rollouts, Scores, Solutions, Thumbs
from trimtab.objectives.base import Objective

Feedback = Pairs | Thumbs | Demonstrations | Rankings | Scores | Solutions


def measure(objective: Objective, batch: Any) -> dict[str, Tensor]:
    """name -> vector, for a scored batch. ``rewards/accuracies`` counts strictly larger rewards only, ties left out.

    Of rankings, it is about every two answers to a prompt of which one was ranked higher.
    """
    common = {name: value for name, value in _common(objective, batch).items() if value.numel()}
    rewards_only = "score" in objective.needs  # a reward model has no log-probs
    found = {name: value for name, value in common.items() if not (rewards_only and name.startswith("logps/"))}
    found.update({name: value.detach() for name, value in objective.metrics(batch).items() if value.numel()})
    return found


def _common(objective: Objective, batch: Feedback) -> dict[str, Tensor]:
    match batch:
        case Pairs():
            chosen, rejected = objective.reward(batch.chosen).detach(), objective.reward(batch.rejected).detach()
            clear = ~batch.tie
            return {
                "rewards/chosen": chosen[clear],
                "rewards/rejected": rejected[clear],
                "rewards/margins": (chosen - rejected)[clear],
                "rewards/accuracies": (chosen > rejected)[clear].to(chosen.dtype),
                # what the policy alone would prefer, per token: comparable before and after training
                "logps/accuracies": (batch.chosen.mean_logp > batch.rejected.mean_logp)[clear].to(chosen.dtype),
                **_sizes(batch.chosen, "chosen", clear),
                **_sizes(batch.rejected, "rejected", clear),
            }
        case Thumbs():
            reward = objective.reward(batch.y).detach()
            up = batch.desirable
            return {
                "rewards/chosen": reward[up],
                "rewards/rejected": reward[~up],
                **_sizes(batch.y, "chosen", up),
                **_sizes(batch.y, "rejected", ~up),
            }
        case Scores():
            return {"rewards/chosen": objective.reward(batch.y).detach(), **_sizes(batch.y, "chosen", slice(None))}
        case Demonstrations() | Solutions():
            return _sizes(batch.y, "chosen", slice(None))
        case Rollouts():
            return _sizes(batch.y, "chosen", batch.rank == 1)
        case Rankings():
            reward = objective.reward(batch.y).detach()
            i, j = ((batch.prompt[:, None] == batch.prompt) & (batch.rank[:, None] < batch.rank)).nonzero().T
            return {
                "rewards/margins": reward[i] - reward[j],
                "rewards/accuracies": (reward[i] > reward[j]).to(reward.dtype),
                **_sizes(batch.y, "chosen", batch.rank == 1),
            }
        case _:
            assert_never(batch)


def _sizes(y: Completions, side: str, rows: Any) -> dict[str, Tensor]:
    return {f"logps/{side}": y.logp.detach()[rows], f"length/{side}": y.length[rows]}


class Tally:
    """Sums and counts per name, so that means over microbatches, steps and ranks are means over rows."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, vectors: dict[str, Tensor]) -> None:
        for name, v in vectors.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + v.sum(dtype=torch.float64).item(), count + v.numel())

    def add_ratio(self, name: str, values: Tensor, sizes: Tensor) -> None:
        """A mean of ``values`` whose denominator is the sum of ``sizes``."""
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + values.sum(dtype=torch.float64).item(), count + sizes.sum().item())

    def merge(self, others: list[dict[str, tuple[float, float]]]) -> None:
        """Replace the contents by the sum of these tallies (one per rank)."""
        self.sums = {}
        for other in others:
            for name, (total, count) in other.items():
                mine, n = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = (mine + total, n + count)

    def means(self) -> dict[str, float]:
        found = {name: total / count for name, (total, count) in self.sums.items() if count}
        if "rewards/margins" not in found and {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found
