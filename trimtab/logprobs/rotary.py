"""Rotary position embeddings as one operation with a gradient of its own (Su et al. 2021, "RoFormer", eq. 34).

transformers' takes five operations for queries and as many for keys, and under autocast leaves both in float32 for attention to
round. Here they are rounded at once: the numbers that attention sees are the same. An attention layer's own code runs, with this
function in the place of the one it calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.logprobs.known_code import HALF, ROTARY, is_code

NAME = "apply_rotary_pos_emb"
FORWARDS: set[Any] = set()


def replacements(model: Any) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        if (forward := _rewired(type(module).forward)) is not None:
            yield module, forward


@cache
def _rewired(forward: Any) -> Any:
    """The same code, calling :func:`rotated`; None where it does not call what is known."""
    known = getattr(forward, "__globals__", {})
    if NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()) or not (
        is_code(known.get(NAME), ROTARY) and is_code(known.get("rotate_half"), HALF)
    ):
        return None
    ours = FunctionType(forward.__code__, {**known, NAME: rotated}, NAME, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    FORWARDS.add(ours)
    return ours


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [B, heads, T, D], k [B, kv heads, T, D], cos and sin [B, T, D] -> q and k, turned by their positions."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _one(q, cos, sin), _one(k, cos, sin)


def _one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if cos.dtype not in (torch.float32, torch.float64) or x.dtype not in (cos.dtype, low):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return Rotation.apply(x, cos, sin)  # type: ignore[no-any-return]


class Rotation(torch.autograd.Function):
    """(x1 cos - x2 sin, x2 cos + x1 sin) of the halves of x [..., D], computed in the type of cos, in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turn(x, cos, first, second, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turn(slope, cos, second, first, -1), None, None


def _turn(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, way: int) -> Tensor:
    a, b = (wide := x.to(cos.dtype)).chunk(2, -1)
    found = wide * cos
    into_a, into_b = found.chunk(2, -1)
    into_a.addcmul_(b, first, value=-way)
    into_b.addcmul_(a, second, value=way)
    return found.to(x.dtype)
