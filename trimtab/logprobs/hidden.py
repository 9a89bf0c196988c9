"""What the model makes of a prompt: the mean of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.logprobs.score import base_model, evaluating, plain_attention
from trimtab.tokens.batch import fill


def mean_hidden(model: nn.Module, prompts: Sequence[Sequence[int]], budget: int) -> Tensor:
    """[n, H] mean of the last hidden states over each prompt's tokens, in float32 on the CPU.

    Args:
        prompts: token ids.
        budget: tokens per forward pass.
    """
    base: Any = base_model(model)
    decoder, device = getattr(base, base.base_model_prefix), next(base.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model), plain_attention(model):
        # the longest come first, so a part's first prompt is as long as its padding
        for part in fill([len(prompts[i]) for i in order], budget):
            rows = [prompts[order[j]] for j in part]
            ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for k, row in enumerate(rows):
                ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
            states = decoder(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            seen = mask.to(device)[:, :, None].to(states.dtype)
            means = (states * seen).sum(1) / seen.sum(1)
            for j, mean in zip(part, means.float().cpu(), strict=True):
                found[order[j]] = mean
    return torch.stack(found)
