"""Root-mean-square norms as one operation with a gradient of its own (Zhang and Sennrich 2019, "Root Mean Square Layer
Normalization", eq. 4).

transformers' takes five operations, and autograd keeps three copies of the states for them; under autocast, every product
behind the norm then rounds the float32 result anew, and keeps that. Here the states are kept alone, and where nothing but
products reads the result it is rounded once. The numbers of the forward pass are the same, bit by bit.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The code that is replaced, word for word: most models of transformers have copies of these three.
NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
LAYER = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, position_ids=position_ids,
    past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""
MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def fuse(model: Any) -> None:
    """Replace the norms whose code is :data:`NORM`; :func:`unfuse` undoes it."""
    for module in model.modules():
        if _is(module, NORM):
            module.forward = MethodType(_normed, module)
    for layer in model.modules():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm) if _feeds_products(layer) else ():
            if "forward" in vars(norm):
                norm.forward = MethodType(_normed_for_products, norm)


def unfuse(model: Any) -> None:
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_normed, _normed_for_products):
            del module.forward


def _feeds_products(layer: Any) -> bool:
    """Whether both norms of a layer are read by matrix products alone: experts and their routers are not."""
    return (
        _is(layer, LAYER)
        and _is(layer.mlp, MLP)
        and all(hasattr(layer.self_attn, projection) for projection in PROJECTIONS)
    )


def _is(module: Any, code: str) -> bool:
    return _code(type(module).forward) == _parsed(code)


@lru_cache(256)
def _code(forward: Any) -> str:
    """What a function does, without its signature, comments and types; "" where its source is not there."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    body = getattr(found, "body", [])
    told = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return "\n".join(map(ast.dump, body[1:] if told else body))


@lru_cache(8)
def _parsed(code: str) -> str:
    return "\n".join(map(ast.dump, ast.parse(f"def f():\n{textwrap.indent(code, ' ')}").body[0].body))  # type: ignore[attr-defined]


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
        with torch.autocast(x.device.type, enabled=False):
            g, unit = g.to(x.dtype), x * scale
            along = g * unit
            slope = along.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
            back = (g * w).addcmul_(unit, (along @ w).div_(x.shape[-1])[..., None], value=-1)
            return back.mul_(scale), slope, None, None
