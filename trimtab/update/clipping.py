"""Gradients cut to a norm (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1) without a pass of its own, for AdamW on a CPU.

torch's own function reads all gradients for their norm, then reads and writes all of them, and AdamW reads them again. AdamW's
fused kernel divides as it goes by a number that torch.amp.GradScaler gives it; here the norm does.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm

TINY = 1e-6  # torch's, against a norm of 0


def divides(optimizer: Any) -> TypeGuard[torch.optim.AdamW]:
    """Whether the next step of this optimiser divides the gradients itself: torch's AdamW in its fused kernel, all weights
    in float32 on a CPU."""
    if type(optimizer) is not torch.optim.AdamW:
        return False
    groups = optimizer.param_groups
    return all(group["fused"] for group in groups) and all(
        p.device.type == "cpu" and p.dtype == torch.float32 and not isinstance(p, DTensor)
        for group in groups
        for p in group["params"]
    )


def clip(optimizer: torch.optim.AdamW, most: float) -> Tensor:
    """The norm of all gradients; if it is above ``most``, the next step learns from them times most / norm."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # row by row: a single sum over a large tensor takes twice as long; 0 where nothing has a gradient
    norm = vector_norm(torch.stack([torch.zeros(()), *(vector_norm(vector_norm(g, dim=-1)) for g in gradients)]))
    optimizer.grad_scale = (norm + TINY) / most if norm + TINY > most else None  # type: ignore[attr-defined]
    return norm
