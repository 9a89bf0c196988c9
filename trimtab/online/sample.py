"""Answers of a model, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.logprobs.score import base_model, evaluating, plain_attention


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    precision: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> list[tuple[int, ...]]:
    """One answer per prompt, from the model's own distribution (no top-k, no top-p), end-of-sequence included.

    Args:
        prompts: token ids of each prompt, as :meth:`Template.prompt_ids` gives them.
        temperature: 0 is greedy.

    Returns:
        Token ids per prompt, in order. An answer that did not end in ``max_new_tokens`` has no end-of-sequence token.
    """
    device = next(model.parameters()).device
    stop = _stop_ids(model, tokenizer)
    answers: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    low = precision in (torch.bfloat16, torch.float16)
    with torch.random.fork_rng(), evaluating(model), plain_attention(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with torch.autocast(device.type, dtype=precision if low else None, enabled=low):
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=temperature > 0,
                    **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
                    repetition_penalty=1.0,
                    eos_token_id=sorted(stop),
                    pad_token_id=min(stop),
                    use_cache=True,
                )
            for i, row in zip(part, out[:, width:].tolist(), strict=True):
                end = next((k for k, t in enumerate(row) if t in stop), len(row) - 1)
                answers[i] = tuple(row[: end + 1])
    return [answers[i] for i in range(len(prompts))]


def _stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    stated = base_model(model).generation_config.eos_token_id
    ids = stated if isinstance(stated, list) else [stated]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
