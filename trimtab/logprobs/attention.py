"""Attention over a packed row of groups, registered with transformers under the name ``trimtab``.

No mask function is registered beside it, so transformers builds no mask: the blocks of the layout, passed through the
model as a keyword argument, say who may attend to whom. Each group is one small scaled-dot-product attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trimtab.errors import ModelError
from trimtab.logprobs.layout import Block, Kept, Part, continued
from trimtab.logprobs.squares import Square, Squares, attend

NAME = "trimtab"
FLEX = False  # one kernel over the whole row, on CUDA: no GPU was at hand to decide; benchmarks/gpu.py measures it
KERNEL = 8  # raise it when a change here moves any number: the reference cache's name carries it
PRODUCTS = True  # on a CPU, where they pay
# Columns of a row's longest square, from and to, with which matrix products are quicker than torch's kernel (docs/decisions.md).
PAYS = {torch.bfloat16: (1, math.inf), torch.float32: (129, 1024)}


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    trimtab_blocks: list[Block] | None = None,
    trimtab_kept: Kept | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D], key and value [1, kv heads, T, D] -> ([1, T, heads, D], None).

    ``sliding_window``, ``softcap`` (Gemma 2) and ``s_aux`` (attention sinks of gpt-oss) arrive from the models that
    have them.
    """
    if trimtab_blocks is None:
        raise ModelError(
            "the trimtab attention got no layout: this model does not hand it down to its layers, or it was called "
            "without one (generation must run under plain_attention(model))"
        )
    goes_on = trimtab_blocks[0].elsewhere
    if trimtab_kept is not None and not trimtab_kept.closed:
        trimtab_kept.layers[module] = key.detach(), value.detach()
    if FLEX and s_aux is None and not dropout and not goes_on:
        from trimtab.logprobs.flex import whole_row

        row = whole_row(query, key, value, trimtab_blocks, scaling, sliding_window or 0, softcap or 0.0)
        return row.transpose(1, 2).contiguous(), None
    key_of = (query.device, sliding_window or 0)
    if key_of not in trimtab_blocks[0].row:  # all layers have the same
        parts = [b.parts(query.device, _window(sliding_window, b)) for b in trimtab_blocks]
        trimtab_blocks[0].row[key_of] = parts, _squares(trimtab_blocks, parts)
    parts, squares = trimtab_blocks[0].row[key_of]
    kept = trimtab_kept.layers[module] if goes_on and trimtab_kept is not None else None
    if _in_products(value, squares.longest) and not (softcap or dropout) and s_aux is None:
        scale = scaling if scaling is not None else query.shape[3] ** -0.5
        return attend(query, key, value, squares, scale, kept), None
    pieces = []
    lengths = [block.stop - block.start for block in trimtab_blocks]
    split = [t.split(lengths, 2) for t in (query, key, value)]
    for block, own, q, k, v in zip(trimtab_blocks, parts, *split, strict=True):
        asked, *sources = (_cut(t, own) for t in (q, k, v))
        before = [_before(block, rows, old) for rows, old in zip(split[1:], kept or (None, None), strict=True)]
        for n, part in enumerate(own):
            seen = ([*far, *t[: part.after], t[n]] for far, t in zip(before, sources, strict=True))
            k_seen, v_seen = (torch.cat(t, 2) if len(t) > 1 else t[0] for t in seen)
            pieces.append(_attend(asked[n], k_seen, v_seen, part.mask, scaling, dropout, softcap, s_aux))
    out = torch.cat(pieces, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """q [1, heads, R, D], k and v [1, kv heads, C, D], mask [R, C] or None for causal -> [1, heads, R, D]."""
    rows, columns = q.shape[2], k.shape[2]
    if mask is None and (rows < columns or softcap or sinks is not None):
        mask = continued(columns - rows, rows, q.device)
    if softcap or sinks is not None:
        assert mask is not None
        return _spelled_out(q, k, v, mask, scaling, dropout, softcap, sinks)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _window(window: int | None, block: Block) -> int:
    """The sliding window, 0 where the block is no longer than it."""
    return window if window and window < block.seen + block.stop - block.start else 0


def _in_products(v: Tensor, longest: int) -> bool:
    """Whether matrix products are quicker than torch's kernel."""
    least, most = PAYS.get(v.dtype, (math.inf, 0))
    return PRODUCTS and v.device.type == "cpu" and least <= longest <= most


def _squares(blocks: Sequence[Block], parts: Sequence[Sequence[Part]]) -> Squares:
    found = []
    for block, own in zip(blocks, parts, strict=True):
        start = block.start
        for part in own:
            first = (slice(block.start, block.start + own[0].rows),) if part.after else ()
            found.append(Square(part, start, (*block.before, *first)))
            start += part.rows
    return Squares(found)


def _cut(t: Tensor, parts: Sequence[Part]) -> Sequence[Tensor]:
    """The rows of each part. Not slices: the gradient of each would be as long as what it was taken from."""
    return t.split([part.rows for part in parts], 2) if len(parts) > 1 else [t]


def _before(block: Block, rows: Sequence[Tensor], kept: Tensor | None) -> list[Tensor]:
    """Keys or values before the block's own: kept ones, or those of the row's first block."""
    if kept is not None:
        return [kept[:, :, s] for s in block.before]
    return list(rows[: len(block.before)])


def _spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in plain operations, for what the fused kernel cannot do."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        # a sink takes probability and gives no value
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights[..., : v.shape[2]] @ v


AttentionInterface.register(NAME, grouped_attention)
