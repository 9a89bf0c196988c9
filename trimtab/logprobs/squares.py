"""Attention on a CPU in batched matrix products, as one operation with a gradient of its own.

torch's fused kernel is slow in bfloat16, and its backward in every type. Three things make this one fast (docs/decisions.md):
lengths are rounded up to :data:`UNIT`, since softmax and products take several numbers at a time and oneDNN writes a kernel
for every shape; a long square is cut into rows, which need no columns behind their last; and the heads that share a key are
one product. The weights, [heads, rows, columns], are kept for the backward where a square is short, and computed again where it
is long: then no more than those of :data:`ROWS` rows exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.logprobs.layout import Part, total

UNIT = 16
# Rows of one product: fewer columns for nothing against more calls. bfloat16 is quick, so that its calls cost more.
ROWS = {torch.bfloat16: 192, torch.float32: 96}
KEPT = {torch.bfloat16: 1024, torch.float32: 512}  # columns of a square whose weights are kept


class Chunk(NamedTuple):
    """Some rows of a square, and what is added to their scores.

    Attributes:
        rows: among those of the square, rounded up.
        width: columns that they may see, rounded up.
        at: where they lie in T.
        masked: the first column that ``mask`` is added to.
        mask: 0 or -inf, [rows, width - masked].
    """

    rows: slice
    width: int
    at: slice
    masked: int
    mask: Tensor


@dataclass
class Square:
    """A part of a row whose queries lie from ``start``, and see the keys of ``before`` and then their own.

    All layers of a model have the same squares: what is found out about one is kept.
    """

    part: Part
    start: int
    before: tuple[slice, ...]
    cut: dict[tuple[torch.dtype, torch.device], list[Chunk]] = field(default_factory=dict, repr=False)

    @cached_property
    def seen(self) -> int:
        return total(self.before)

    @cached_property
    def columns(self) -> int:
        return self.seen + self.part.rows

    @cached_property
    def pieces(self) -> list[tuple[slice, slice]]:
        """Where each piece of what comes before lies in its row, and where among the columns."""
        found, at = [], 0
        for there in self.before:
            n = there.stop - there.start
            found.append((there, slice(at, at + n)))
            at += n
        return found

    def chunks(self, low: torch.dtype, device: torch.device) -> list[Chunk]:
        if (low, device) not in self.cut:
            self.cut[low, device] = list(_chunks(self, low, device))
        return self.cut[low, device]


def attend(
    q: Tensor, k: Tensor, v: Tensor, squares: Sequence[Square], scaling: float, kept: tuple[Tensor, Tensor] | None
) -> Tensor:
    """softmax(scaling q k^T + mask) v, square by square.

    Args:
        q: [1, heads, T, D], in float32 or in the type of v.
        k, v: [1, kv heads, T, D] and [1, kv heads, T, E]; the products run in the type of v, one of :data:`ROWS`.
        squares: in the order of the row, without gaps.
        kept: keys and values of another pass, in which ``before`` lies; without a gradient. None: it lies in this row.

    Returns:
        [1, T, heads, E] in the type of v.
    """
    old_k, old_v = kept or (None, None)
    return _Attention.apply(q, k, v, old_k, old_v, squares, scaling)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        old_k: Tensor | None,
        old_v: Tensor | None,
        squares: Sequence[Square],
        scaling: float,
    ) -> Tensor:
        heads, tokens, low = q.shape[1], q.shape[2], v.dtype
        out = v.new_empty(1, tokens, heads, v.shape[3])
        saved: list[Tensor] = []
        asking, found_at = q[0], out[0].transpose(0, 1)
        sources = tuple((t[0], (t if old is None else old)[0]) for t, old in ((k, old_k), (v, old_v)))
        with torch.autocast(q.device.type, enabled=False):
            for square in squares:
                keys, values = (_columns(own, far, square, low) for own, far in sources)
                saved += [keys, values]
                for chunk in square.chunks(low, q.device):
                    asked = _rows(asking, chunk, low, scaling)
                    weights = _weights(asked, keys, chunk)
                    found = torch.bmm(weights, _first(values, chunk.width)).view(heads, asked.shape[1], -1)
                    found_at[:, chunk.at] = _first(found, chunk.at.stop - chunk.at.start)
                    saved.append(asked)
                    if keys.shape[1] <= KEPT[low]:
                        saved.append(weights)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*saved)
        ctx.squares, ctx.scaling, ctx.types, ctx.own = squares, scaling, (q.dtype, k.dtype), old_k is None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: gradient checkpointing allows no more
        saved = iter(kept)
        heads, tokens, low = grad.shape[2], grad.shape[1], grad.dtype
        groups, _, deep = kept[0].shape
        to_q = grad.new_empty(heads, tokens, deep, dtype=ctx.types[0])
        more = torch.promote_types(low, torch.float32)
        to_k, to_v = (grad.new_zeros(groups, tokens, n, dtype=more) for n in (deep, grad.shape[3]))
        slopes = grad[0].transpose(0, 1)
        for square in ctx.squares:
            keys, values = next(saved), next(saved)
            n, before = square.part.rows, square.seen
            for chunk in square.chunks(low, grad.device):
                at, width = chunk.at, chunk.width
                asked = next(saved)
                again = keys.shape[1] > KEPT[low]
                weights = _weights(asked, keys, chunk) if again else next(saved)
                slope = _rows(slopes, chunk, low).view(groups, -1, grad.shape[3])
                inner = torch.bmm(slope, _first(values, width).transpose(1, 2))
                inner = torch._softmax_backward_data(inner, weights, -1, low)
                back = torch.bmm(inner, _first(keys, width)).view(heads, -1, deep)
                torch.mul(_first(back, at.stop - at.start), ctx.scaling, out=to_q[:, at])
                own = min(width - before, n)
                for into, a, b in ((to_k, inner, asked.view(groups, -1, deep)), (to_v, weights, slope)):
                    learnt = torch.bmm(a.transpose(1, 2), b)
                    into[:, square.start : square.start + own].add_(learnt[:, before : before + own])
                    if ctx.own:
                        for there, here in square.pieces:
                            into[:, there].add_(learnt[:, here])
        return to_q[None], to_k[None].to(ctx.types[1]), to_v[None].to(low), None, None, None, None


def _weights(asked: Tensor, keys: Tensor, chunk: Chunk) -> Tensor:
    """[kv heads, heads of a key x rows, width]"""
    heads, height, deep = asked.shape
    scores = torch.bmm(asked.view(keys.shape[0], -1, deep), _first(keys, chunk.width).transpose(1, 2))
    scores.view(heads, height, chunk.width)[:, :, chunk.masked :].add_(chunk.mask)
    return scores.softmax(-1)


def _first(t: Tensor, n: int) -> Tensor:
    """t[:, :n]"""
    return t if n == t.shape[1] else t[:, :n]


def _up(n: int) -> int:
    return -(-n // UNIT) * UNIT


def _chunks(square: Square, low: torch.dtype, device: torch.device) -> Iterator[Chunk]:
    n, before = square.part.rows, square.seen
    end = _up(n)
    height = _up(-(-end // max(1, round(end / ROWS[low]))))
    for a in range(0, end, height):
        z = min(a + height, end)
        width, at = _up(before + min(z, n)), slice(square.start + a, square.start + min(z, n))
        if square.part.mask is None:  # causal: every column before the rows' own is seen
            masked = before + a
            mask = _causal(max(z - a, width - masked), low, device)[: z - a, : width - masked]
        else:
            masked, mask = 0, _added(square.part, low)[a:z, :width]
        yield Chunk(slice(a, z), width, at, masked, mask)


def _rows(t: Tensor, chunk: Chunk, low: torch.dtype, scaling: float = 1.0) -> Tensor:
    """[heads, rows, D] of [heads, T, D], a scaled copy; zeros behind the last."""
    height, n = chunk.rows.stop - chunk.rows.start, chunk.at.stop - chunk.at.start
    found = t.new_empty(t.shape[0], height, t.shape[2], dtype=low)
    into = _first(found, n).copy_(t[:, chunk.at])
    if scaling != 1.0:
        into.mul_(scaling)
    if n < height:
        found[:, n:].zero_()
    return found


def _columns(own: Tensor, far: Tensor, square: Square, low: torch.dtype) -> Tensor:
    """[kv heads, columns, D]: what comes before, then the square's own; zeros behind the last."""
    n, before = square.part.rows, square.seen
    found = own.new_empty(own.shape[0], _up(before + n), own.shape[2], dtype=low)
    for there, here in square.pieces:
        found[:, here].copy_(far[:, there])
    return _filled(found, before + n, own[:, square.start : square.start + n], before)


def _filled(into: Tensor, n: int, t: Tensor, before: int = 0) -> Tensor:
    """into[:, before:n] = t, and zeros behind."""
    if n == into.shape[1] and not before:
        return into.copy_(t)
    into[:, before:n].copy_(t)
    if n < into.shape[1]:
        into[:, n:].zero_()
    return into


@lru_cache(64)
def _causal(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((n, n), -torch.inf, dtype=dtype, device=device).triu_(1)


def _added(part: Part, dtype: torch.dtype) -> Tensor:
    """[rows, columns], rounded up, 0 or -inf; the rows behind the last see all, for a softmax of nothing is not a number."""
    if dtype not in part.added:
        assert part.mask is not None
        n, width = part.mask.shape
        added = torch.zeros(_up(n), _up(width), dtype=dtype, device=part.mask.device)
        added[:n] = -torch.inf
        added[:n, :width].masked_fill_(part.mask, 0)
        part.added[dtype] = added
    return part.added[dtype]
