"""Attention over a packed row of groups as one kernel: flex_attention with the groups as its mask. For CUDA.

torch has no backward of it on a CPU, and uncompiled it holds all weights of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trimtab.logprobs.layout import Block


def whole_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    scaling: float | None,
    window: int,
    softcap: float,
) -> Tensor:
    """query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, heads, T, D]. ``window`` and ``softcap``: 0 for none."""
    found: Tensor = _kernel(query.is_cuda)(
        query,
        key,
        value,
        score_mod=_bent(softcap) if softcap else None,
        block_mask=_mask(blocks, query.device, window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found


@cache
def _kernel(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@cache
def _bent(softcap: float) -> Callable[..., Tensor]:
    def bent(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bent


def _mask(blocks: Sequence[Block], device: torch.device, window: int) -> BlockMask:
    """Made in the first layer, kept by the row's first block for the others."""
    kept = blocks[0].flex
    if (device, window) not in kept:
        kept[device, window] = _made(blocks, device, window)
    return kept[device, window]  # type: ignore[no-any-return]


def _made(blocks: Sequence[Block], device: torch.device, window: int) -> BlockMask:
    sizes = torch.tensor([b.stop - b.start for b in blocks])
    group = torch.repeat_interleave(torch.arange(len(blocks)), sizes).to(device)
    owner = torch.cat([torch.repeat_interleave(torch.arange(len(b.sizes())), b.sizes()) for b in blocks]).to(device)
    position = torch.cat([b.positions() for b in blocks]).to(device)
    opening = max(b.seen for b in blocks)  # what all groups begin with, the row's first tokens

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (group[q] == group[k]) & ((owner[k] == 0) | (owner[q] == owner[k]))
        near = position[q] - position[k] < window if window else q >= k
        return (q >= k) & (own | (k < opening)) & near

    n = int(sizes.sum())
    return create_block_mask(seen, None, None, n, n, device=device)
