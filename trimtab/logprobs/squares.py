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


class Plan(NamedTuple):
    """What lies where when a row is attended to.

    The queries of all chunks, [heads, rows, D] each, lie one behind the other, and so do the keys of all squares, [kv heads,
    columns, D]: one gather for all of them, since for short squares a call costs more than what it copies.

    Attributes:
        squares: each with its chunks.
        rows: heads x rows of each chunk.
        columns: kv heads x columns of each square.
        ask: [sum of rows] where in [T x heads] each chunk's queries lie. Behind its last row comes that row again, so that a
            number that is none stays in its group.
        put: [T x heads] where among the chunks' rows each lies: the way back.
        see: [sum of columns] where in [T x kv heads] each square's keys lie; where squares go on from another pass, its tokens
            come before these T.
    """

    squares: list[tuple[Square, list[Chunk]]]
    rows: list[int]
    columns: list[int]
    ask: Tensor
    put: Tensor
    see: Tensor


class Squares:
    """The squares of a row, in its order and without gaps; with a plan for every kind of heads."""

    def __init__(self, squares: Sequence[Square]) -> None:
        self.squares = list(squares)
        self.longest = max(square.columns for square in squares)
        self._plans: dict[Any, Plan] = {}

    def plan(self, heads: int, groups: int, low: torch.dtype, device: torch.device, elsewhere: int) -> Plan:
        """``elsewhere``: tokens of the pass from whose row the squares go on."""
        asked = (heads, groups, low, device, elsewhere)
        if asked not in self._plans:
            self._plans[asked] = self._planned(*asked)
        return self._plans[asked]

    def _planned(self, heads: int, groups: int, low: torch.dtype, device: torch.device, elsewhere: int) -> Plan:
        squares, ask, put, see, so_far = [], [], [], [], 0
        for square in self.squares:
            squares.append((square, square.chunks(low, device)))
            for chunk in square.chunks(low, device):
                at, height = torch.arange(chunk.at.start, chunk.at.stop), chunk.rows.stop - chunk.rows.start
                ask.append(_by_head(_lengthened(at, height), heads))
                put.append((so_far + torch.arange(len(at))[:, None] + height * torch.arange(heads)).flatten())
                so_far += heads * height
            before = [torch.arange(there.start, there.stop) for there in square.before]
            own = torch.arange(square.start, square.start + square.part.rows) + elsewhere
            see.append(_by_head(_lengthened(torch.cat([*before, own]), _up(square.columns)), groups))
        rows, columns = ([len(t) for t in each] for each in (ask, see))
        return Plan(squares, rows, columns, *(torch.cat(each).to(device) for each in (ask, put, see)))


def attend(
    q: Tensor, k: Tensor, v: Tensor, squares: Squares, scaling: float, kept: tuple[Tensor, Tensor] | None
) -> Tensor:
    """softmax(scaling q k^T + mask) v, square by square.

    Args:
        q: [1, heads, T, D], in float32 or in the type of v.
        k, v: [1, kv heads, T, D] and [1, kv heads, T, E]; the products run in the type of v, one of :data:`ROWS`.
        squares: of the row.
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
        squares: Squares,
        scaling: float,
    ) -> Tensor:
        heads, groups, low = q.shape[1], k.shape[1], v.dtype
        plan = squares.plan(heads, groups, low, q.device, 0 if old_k is None else old_k.shape[2])
        kept: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            asked = _by_token(q).to(low).index_select(0, plan.ask)
            keys, values = (
                (_by_token(t) if old is None else torch.cat([_by_token(old), _by_token(t)]))
                .to(low)
                .index_select(0, plan.see)
                for t, old in ((k, old_k), (v, old_v))
            )
            keys.mul_(scaling)  # there are fewer of them
            found = values.new_empty(len(asked), v.shape[3])
            pieces = zip(asked.split(plan.rows), found.split(plan.rows), strict=True)
            for (_, chunks), *seen in zip(
                plan.squares, keys.split(plan.columns), values.split(plan.columns), strict=True
            ):
                k_seen, v_seen = (t.view(groups, -1, t.shape[1]) for t in seen)
                for chunk, (asking, into) in zip(chunks, pieces, strict=False):  # the next squares take the others
                    weights = _weights(asking, k_seen, chunk, heads)
                    torch.bmm(weights, _first(v_seen, chunk.width), out=into.view(groups, -1, v.shape[3]))
                    if k_seen.shape[1] <= KEPT[low]:
                        kept.append(weights)
            found = found.index_select(0, plan.put)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(asked, keys, values, *kept)
        ctx.plan, ctx.groups, ctx.scaling, ctx.types, ctx.own = plan, groups, scaling, (q.dtype, k.dtype), old_k is None
        return found.view(1, q.shape[2], heads, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asked, keys, values, *rest = ctx.saved_tensors  # once: gradient checkpointing allows no more
        kept, plan, groups, low = iter(rest), ctx.plan, ctx.groups, grad.dtype
        _, tokens, heads, wide = grad.shape
        deep, most = keys.shape[1], max(keys.shape[1], wide)
        slopes = grad.reshape(-1, wide).index_select(0, plan.ask)
        back = torch.empty_like(asked)
        # of keys, and of values
        to_seen = grad.new_zeros(2, groups, tokens, most, dtype=torch.promote_types(low, torch.float32))
        pieces = zip(*(t.split(plan.rows) for t in (asked, slopes, back)), strict=True)
        for (square, chunks), *seen in zip(
            plan.squares, keys.split(plan.columns), values.split(plan.columns), strict=True
        ):
            k_seen, v_seen = (t.view(groups, -1, t.shape[1]) for t in seen)
            n, before = square.part.rows, square.seen
            for chunk, (asking, slope, into) in zip(chunks, pieces, strict=False):  # as above
                width = chunk.width
                weights = _weights(asking, k_seen, chunk, heads) if k_seen.shape[1] > KEPT[low] else next(kept)
                slope.view(heads, -1, wide)[:, chunk.at.stop - chunk.at.start :].zero_()
                slope = slope.view(groups, -1, wide)
                inner = torch.bmm(slope, _first(v_seen, width).transpose(1, 2))
                inner = torch._softmax_backward_data(inner, weights, -1, low)
                torch.bmm(inner, _first(k_seen, width), out=into.view(groups, -1, deep))
                learnt = grad.new_empty(2, groups, width, most)
                torch.bmm(inner.transpose(1, 2), asking.view(groups, -1, deep), out=learnt[0, :, :, :deep])
                torch.bmm(weights.transpose(1, 2), slope, out=learnt[1, :, :, :wide])
                own = min(width - before, n)
                to_seen[:, :, square.start : square.start + own].add_(learnt[:, :, before : before + own])
                if ctx.own:
                    for there, here in square.pieces:
                        to_seen[:, :, there].add_(learnt[:, :, here])
        to_seen[0].mul_(ctx.scaling)
        to_q = back.index_select(0, plan.put).to(ctx.types[0]).view(tokens, heads, deep)
        # as they lie behind the products of a model
        to_k, to_v = (
            t.transpose(0, 1)[..., :size].to(kind, memory_format=torch.contiguous_format)
            for t, size, kind in zip(to_seen, (deep, wide), (ctx.types[1], low), strict=True)
        )
        return *(t.transpose(0, 1)[None] for t in (to_q, to_k, to_v)), None, None, None, None


def _by_token(t: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T x heads, D], as the products of a model leave it."""
    return t[0].transpose(0, 1).reshape(-1, t.shape[3])


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """Where the rows of these tokens lie in [T x heads], head by head."""
    return (tokens * heads + torch.arange(heads)[:, None]).flatten()


def _lengthened(t: Tensor, n: int) -> Tensor:
    """[m] -> [n], the last again and again."""
    return torch.cat([t, t[-1:].expand(n - len(t))])


def _weights(asking: Tensor, keys: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """[kv heads, heads of a key x rows, width]"""
    groups, _, deep = keys.shape
    scores = torch.bmm(asking.view(groups, -1, deep), _first(keys, chunk.width).transpose(1, 2))
    scores.view(heads, -1, chunk.width)[:, :, chunk.masked :].add_(chunk.mask)
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
