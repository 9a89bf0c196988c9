"""Root-mean-square norms as one operation with a gradient of its own (Zhang and Sennrich 2019, "Root Mean Square Layer
Normalization", eq. 4).

transformers' takes five operations, and autograd keeps three copies of the states for them; under autocast, every product
behind the norm then rounds the float32 result anew, and keeps that. Here the states are kept alone, and where nothing but
products reads the result it is rounded once. The numbers of the forward pass are the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.logprobs.known_code import LAYER, MLP, NORM, runs

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def replacements(model: Any) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        if runs(module, NORM):
            yield module, _normed
    for layer in model.modules():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm) if _feeds_products(layer) else ():
            if runs(norm, NORM):
                yield norm, _normed_for_products


def _feeds_products(layer: Any) -> bool:
    """Whether both norms of a layer are read by matrix products alone: experts and their routers are not."""
    return (
        runs(layer, LAYER)
        and runs(layer.mlp, MLP)
        and all(hasattr(layer.self_attn, projection) for projection in PROJECTIONS)
    )


def _normed(self: Any, states: Tensor) -> Tensor:
    """[..., H] -> [..., H]; float64, in which models are checked, and 16 bits take the model's own way."""
    if states.dtype != torch.float32 or self.weight.dtype != torch.float32:
        return type(self).forward(self, states)  # type: ignore[no-any-return]
    return RootMeanSquare.apply(states, self.weight, self.variance_epsilon, None)  # type: ignore[no-any-return]


def _normed_for_products(self: Any, states: Tensor) -> Tensor:
    """The same, rounded as autocast would round it for each product."""
    device = states.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if low is None or states.dtype != torch.float32 or self.weight.dtype != torch.float32:
        return _normed(self, states)
    return RootMeanSquare.apply(states, self.weight, self.variance_epsilon, low)  # type: ignore[no-any-return]


FORWARDS = (_normed, _normed_for_products)


class RootMeanSquare(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + eps) over the last dimension, x [..., H], w [H]; rounded to ``low`` where that is a type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, low: torch.dtype | None) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, scale)
        found = (x * scale).mul_(w)
        return found if low is None else found.to(low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, w, scale = ctx.saved_tensors
        own, rows = g.dtype != x.dtype, scale.flatten()  # own: the copy may be overwritten
        with torch.autocast(x.device.type, enabled=False):
            g = g.to(x.dtype)
            along = (g * x).flatten(0, -2)
            slope = rows @ along if ctx.needs_input_grad[1] else None
            pull = (along @ w).mul_(rows.square()).div_(-x.shape[-1]).view(scale.shape)
            back = g.mul_(w) if own else g * w
            return back.addcmul_(x, pull).mul_(scale), slope, None, None
