"""The gate of an MLP as one operation (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6: SwiGLU, without its products).

autograd keeps silu(g) beside g and u, the widest states of a layer; here it is computed again. The numbers and the gradient
are transformers' own, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from trimtab.logprobs.known_code import MLP, runs


def replacements(model: Any) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        if runs(module, MLP) and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
            yield module, _gated


def _gated(self: Any, x: Tensor) -> Tensor:
    g, u = self.gate_proj(x), self.up_proj(x)
    # an adapter on one of the two may have given it another type
    return self.down_proj(Gate.apply(g, u) if g.dtype == u.dtype else silu(g) * u)  # type: ignore[no-any-return]


FORWARDS = (_gated,)


class Gate(torch.autograd.Function):
    """silu(g) u, of the same shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return silu(g).mul_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(slope * u, g), silu(g).mul_(slope)
