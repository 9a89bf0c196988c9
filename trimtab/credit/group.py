"""Advantages of an answer among the others to the same prompt. ``group`` [B] says which prompt each belongs to.

All of them are 0 where the rewards of a group are equal, and where an answer is alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """[B] ``R_i - mean_{j != i} R_j`` (RLOO, arXiv:2402.14740 eq. 7)."""
    reward, others = _above_least(reward, group), _sum(torch.ones_like(reward), group) - 1
    mean = (_sum(reward, group) - reward) / others.clamp(min=1)
    return torch.where(others > 0, reward - mean, 0)


def centred(reward: Tensor, group: Tensor) -> Tensor:
    """[B] ``R_i - mean_j R_j`` (Dr. GRPO, arXiv:2503.20783)."""
    reward = _above_least(reward, group)
    return reward - _sum(reward, group) / _sum(torch.ones_like(reward), group)


def standardised(
    reward: Tensor, group: Tensor, deviation: Literal["sample", "population"] = "sample", epsilon: float = 1e-4
) -> Tensor:
    """[B] ``(R_i - mean) / (std + epsilon)`` (GRPO, arXiv:2402.03300)."""
    gap, count = centred(reward, group), _sum(torch.ones_like(reward), group)
    freedom = (count - 1).clamp(min=1) if deviation == "sample" else count
    return gap / ((_sum(gap**2, group) / freedom).sqrt() + epsilon)


def _above_least(reward: Tensor, group: Tensor) -> Tensor:
    """[B] the same less each group's least: equal rewards become exactly 0, where (0.7 + 0.7 + 0.7) / 3 is not 0.7."""
    least = reward.new_zeros(int(group.max()) + 1 if len(group) else 0)
    return reward - least.scatter_reduce(0, group, reward, "amin", include_self=False)[group]


def _sum(values: Tensor, group: Tensor) -> Tensor:
    """[B] the sum over each answer's group."""
    total = values.new_zeros(int(group.max()) + 1 if len(group) else 0).index_add(0, group, values)
    return total[group]
