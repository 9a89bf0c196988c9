"""AdamW for weights that are held in bfloat16: what learns is a float32 copy of them in the optimiser's state.

An update of 1e-5 of a weight is lost in bfloat16, which keeps 8 bits: without the copy a model would not learn at the usual
rates (Micikevicius et al. 2018, "Mixed Precision Training", 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import AdamW, adamw

LOW = (torch.bfloat16, torch.float16)


def held_low(model: nn.Module) -> bool:
    """Whether weights that learn are held in low precision."""
    return any(p.requires_grad and p.dtype in LOW for p in model.parameters())


def full_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of these weights are added up and clipped in float32, whatever the weights are held in."""
    for p in parameters:
        if p.requires_grad and p.dtype in LOW:
            p.grad_dtype = torch.float32


class MasterAdamW(AdamW):
    """As ``torch.optim.AdamW``, with ``master`` [shape of the weight, float32] in the state of every weight."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise NotImplementedError("MasterAdamW takes no closure")
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            states = [self._state(p) for p in weights]
            beta1, beta2 = group["betas"]
            adamw(
                [s["master"] for s in states],
                [p.grad.float() for p in weights],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=bool(group["fused"]),
                foreach=False,
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            for p, state in zip(weights, states, strict=True):
                p.copy_(state["master"])

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            master = p.detach().float()
            if master is p:
                master = p.detach().clone()
            device = p.device if p.is_cuda else torch.device("cpu")
            state |= {"step": torch.zeros((), device=device), "master": master}
            state |= {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base class rounds the state to the type of the weight: here it is put back as it was saved."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.detach().clone().to(p.device)
