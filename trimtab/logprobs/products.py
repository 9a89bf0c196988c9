"""The products of linear maps by oneDNN on a CPU, where it is quicker than what torch takes by itself (docs/decisions.md).

In float32 torch calls MKL, which runs its AVX-512 code on Intel's processors only; on others oneDNN is twice as fast. In bfloat16
torch calls oneDNN with the weight as it lies, which every product lays out anew; passes that learn nothing can do that once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

PACKED, SMALL = 1024, 2**15  # tokens and numbers of a weight from which laying it out takes less time than it saves

ONEDNN = True  # where it is quicker
_packs: dict[nn.Module, Tensor] | None = None  # while weights_packed() lasts


def replacements(model: Any) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        if type(module).forward is nn.Linear.forward and _has_onednn():
            yield module, _linear


def _linear(self: Any, x: Tensor) -> Tensor:
    """[..., K] -> [..., M]"""
    w = self.weight
    if x.device.type != "cpu" or isinstance(w, DTensor) or w.dtype != torch.float32:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    packing = _packs is not None and type(w) in (nn.Parameter, Tensor) and w.numel() >= SMALL
    if packing and low == torch.bfloat16 and not torch.is_grad_enabled():
        assert _packs is not None
        return _from_pack(self, x, _packs)
    if low is not None or x.dtype != w.dtype or not serves(x):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    # the view is made outside: some models overwrite what comes out
    return Linear.apply(x.flatten(0, -2), w, self.bias).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


FORWARDS = (_linear,)


class Linear(torch.autograd.Function):
    """x w^T + b, x [N, K], w [M, K], b [M] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        to_x, to_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_w else None, w if to_x else None)
        found = times(x, w)
        return found if b is None else found.add_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (to_x, to_w, to_b) = ctx.saved_tensors, ctx.needs_input_grad
        return times(g, w.T) if to_x else None, times(g.T, x.T) if to_w else None, g.sum(0) if to_b else None


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, a [N, K], b [M, K] of one type; without a graph."""
    if not serves(a):
        return a @ b.T
    return _onednn(a.contiguous(), _dense(b))  # it would copy the first itself, where nobody counts it


def serves(a: Tensor) -> bool:
    """Whether oneDNN is quicker for products with these rows, [..., K]."""
    return (
        ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu" and a.shape[:-1].numel() > 1 and _mkl_is_slow()
    )


def _dense(t: Tensor) -> Tensor:
    """oneDNN takes a transposed slice of a wider matrix as the second, too, a hundred times more slowly."""
    return t if t.is_contiguous() or t.T.is_contiguous() else t.contiguous()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _has_onednn() -> bool:
    """Whether this torch has the operations, which torch.compile uses and nobody else: they may go."""
    if not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))


@cache
def _mkl_is_slow() -> bool:
    """Whether the processor has AVX-512 and is not Intel's."""
    about = _processor()
    if not _has_onednn() or torch.backends.cpu.get_cpu_capability() != "AVX512" or not about:
        return False
    return torch.backends.mkl.is_available() and "GenuineIntel" not in about


@cache
def bfloat16_is_quicker() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: by AMX, or by AVX-512 if it is not Intel's, whose cores take
    bfloat16 at half the rate of float32 there (docs/decisions.md)."""
    about = _processor()
    return "amx_bf16" in about or ("avx512_bf16" in about and "GenuineIntel" not in about)


def _processor() -> str:
    """What Linux says about the processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


@contextmanager
def weights_packed(tokens: int) -> Iterator[None]:
    """Weights that autocast would round to bfloat16 are rounded and laid out once while this lasts, where so many tokens pay for
    it. Only where the weights do not change meanwhile; they take half of their own memory once more."""
    global _packs
    if _packs is not None or tokens < PACKED or not _has_onednn():
        yield
        return
    _packs = {}
    try:
        yield
    finally:
        _packs = None


def _from_pack(module: Any, x: Tensor, packs: dict[nn.Module, Tensor]) -> Tensor:
    if module not in packs:
        packs[module] = torch.ops.mkldnn._reorder_linear_weight(module.weight.to(torch.bfloat16), PACKED)
    bias = None if module.bias is None else module.bias.to(torch.bfloat16)
    return _onednn(x.to(torch.bfloat16), packs[module], bias)
