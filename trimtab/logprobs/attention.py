"""Attention over a packed row of groups, registered with transformers under the name ``trimtab``.

No mask function is registered beside it, so transformers builds no mask: the blocks of the layout, passed through the
model as a keyword argument, say who may attend to whom. Each group is one small scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trimtab.errors import ModelError
from trimtab.logprobs.layout import Block, Kept, Part

NAME = "trimtab"
FLEX = False  # one kernel over the whole row, on CUDA: no GPU was at hand to decide; benchmarks/gpu.py measures it
KERNEL = 4  # raise it when a change here moves any number: the reference cache's name carries it
PLAIN = 1024  # tokens of a group up to which bfloat16 attention on a CPU is spelled out in matrix products


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
    goes_on = trimtab_blocks[0].read is not None
    if trimtab_kept is not None and not trimtab_kept.closed:
        trimtab_kept.layers[module] = key.detach(), value.detach()
    if FLEX and s_aux is None and not dropout and not goes_on:
        from trimtab.logprobs.flex import whole_row

        row = whole_row(query, key, value, trimtab_blocks, scaling, sliding_window or 0, softcap or 0.0)
        return row.transpose(1, 2).contiguous(), None
    pieces = []
    lengths = [block.stop - block.start for block in trimtab_blocks]
    for block, q, k, v in zip(trimtab_blocks, *(t.split(lengths, 2) for t in (query, key, value)), strict=True):
        if block.read is not None:
            assert trimtab_kept is not None
            k, v = (
                torch.cat([old[:, :, block.read], new], 2)
                for old, new in zip(trimtab_kept.layers[module], (k, v), strict=True)
            )
        window = sliding_window if sliding_window and sliding_window < k.shape[2] else 0
        parts = block.parts(q.device, window)
        rows, keys, values = (_cut(t, parts) for t in (q, k, v))
        for n, part in enumerate(parts):
            k_seen, v_seen = (torch.cat([t[0], t[n]], 2) if part.after else t[n] for t in (keys, values))
            pieces.append(_attend(rows[n], k_seen, v_seen, part.mask, scaling, dropout, softcap, s_aux))
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
    if softcap or sinks is not None:
        return _spelled_out(q, k, v, _square(mask, q), scaling, dropout, softcap, sinks)
    if v.dtype == torch.bfloat16 and v.device.type == "cpu" and not dropout and v.shape[2] <= PLAIN:
        return _plain_bfloat16(q, k, v, _square(mask, q), scaling)
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


def _cut(t: Tensor, parts: Sequence[Part]) -> Sequence[Tensor]:
    """The rows of each part. Not slices: the gradient of each would be as long as what it was taken from."""
    return t.split([part.rows for part in parts], 2) if len(parts) > 1 else [t]


def _square(mask: Tensor | None, q: Tensor) -> Tensor:
    return _causal(q.shape[2], q.device) if mask is None else mask


@lru_cache(16)
def _causal(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _plain_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Two batched matrix products and a softmax: on a CPU with bf16 products this beats torch's fused kernel.

    The heads that share a key are one product; the weights are [heads, G, G] in bf16, so only for short groups.
    """
    heads, groups, rows, width = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings leave float32 under autocast
    together = (q * (scaling if scaling is not None else width**-0.5)).reshape(groups, -1, width)
    scores = (together @ k[0].transpose(1, 2)).view(heads, rows, -1)
    scores.detach().masked_fill_(
        ~mask, -torch.inf
    )  # unseen by autograd: where the weight is 0, the softmax's gradient is
    weights = scores.softmax(-1).view(groups, -1, k.shape[2])
    return (weights @ v[0]).view(1, heads, rows, width)


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
