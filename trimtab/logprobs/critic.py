"""A value for every state of an answer: a head on the policy's hidden states, or a network of its own.

The critic is a submodule of the policy, so that the Trainer's optimiser, DDP and the seed see it like any other; it is
taken off when the model is copied or saved (:func:`trimtab.logprobs.score.uninstalled`).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

NAME = "trimtab_critic"


class Critic(nn.Module):
    """hidden states [N, H] -> values [N], three layers in float32 (float64 for a float64 model), starting at 0.

    Args:
        width: H.
        trunk: a decoder of the critic's own, or None to read the policy's hidden states, without a gradient to them.
    """

    def __init__(self, width: int, dtype: torch.dtype, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        last = nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        layers = [nn.Linear(width, width, dtype=dtype), nn.ReLU(), nn.Linear(width, width, dtype=dtype), nn.ReLU()]
        self.head = nn.Sequential(*layers, last)

    def forward(self, hidden: Tensor) -> Tensor:
        first: Any = self.head[0]
        found: Tensor = self.head(hidden.to(first.weight.dtype))[:, 0]
        return found


def add_critic(base: Any, kind: Literal["head", "network"], seed: int) -> Critic:
    """Give the transformers model a critic, the same for the same seed; returns it."""
    decoder = getattr(base, base.base_model_prefix)
    weight: Any = next(p for p in decoder.parameters() if p.is_floating_point())
    dtype: torch.dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = copy.deepcopy(decoder).requires_grad_(True) if kind == "network" else None
        critic = Critic(base.config.get_text_config().hidden_size, dtype, trunk).to(weight.device)
    base.add_module(NAME, critic)
    return critic


def critic_of(base: Any) -> Critic | None:
    return getattr(base, NAME, None)
