"""Learning from single answers in one flat script: thumbs up and down (KTO), demonstrations (SFT).

Like pairs.py: plain PyTorch, padded batches, full logits; slow, obvious, and equal to trimtab in loss and gradient.
Shapes: R rows, one completion each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.twins.pairs import Row, token_logps
from trimtab.tokens.batch import Example


def rows_of(examples: Sequence[Example]) -> list[Row]:
    return [(e.prompt, e.completions[0]) for e in examples]


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Each prompt with the completion of the next row, cyclically, that answers another prompt."""
    found = []
    for i, (prompt, _) in enumerate(rows):
        later = [rows[(i + step) % len(rows)] for step in range(1, len(rows))]
        others = [completion for other, completion in later if other != prompt]
        if others:
            found.append((prompt, others[0]))
    return found


def log_ratios(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """[R] rho = log pi(y|x) - log pi_ref(y|x)"""
    with torch.no_grad():
        ref = token_logps(reference, rows)[0].sum(1)
    return token_logps(policy, rows)[0].sum(1) - ref


def kto(
    policy: Any,
    reference: Any,
    examples: Sequence[Example],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """mean of lambda_y (1 - v):  v = sigma(beta (rho - z0)) for a thumb up, sigma(beta (z0 - rho)) for a thumb down."""
    rows = rows_of(examples)
    rho = log_ratios(policy, reference, rows)
    # the reference point: how far the policy has moved on answers that do not belong to the prompt; no gradient
    with torch.no_grad():
        others = mismatched(rows)
        z0 = log_ratios(policy, reference, others).mean().clamp(min=0) if others else torch.zeros(())
    losses = []
    for i, e in enumerate(examples):
        if e.record.desirable:  # type: ignore[attr-defined]
            losses.append(desirable_weight * (1 - torch.sigmoid(beta * (rho[i] - z0))))
        else:
            losses.append(undesirable_weight * (1 - torch.sigmoid(beta * (z0 - rho[i]))))
    return torch.stack(losses).mean()


def sft(policy: Any, examples: Sequence[Example], normalise: str) -> Tensor:
    """-log-probs of the demonstrations: per token of the batch, per sequence, or per sequence after a mean in each."""
    logps, mask = token_logps(policy, rows_of(examples))
    match normalise:
        case "token":
            return -logps.sum() / mask.sum()
        case "sequence_sum":
            return -logps.sum(1).mean()
        case "sequence_mean":
            return -(logps.sum(1) / mask.sum(1)).mean()
        case _:
            raise ValueError(normalise)


def train(policy: Any, batches: Sequence[Sequence[Example]], learning_rate: float, **how: Any) -> list[float]:
    """One optimiser step per batch; ``how``: ``reference`` and KTO's options, or ``normalise`` for SFT."""
    optimizer, found = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0), []
    for batch in batches:
        optimizer.zero_grad()
        value = sft(policy, batch, **how) if "normalise" in how else kto(policy, examples=batch, **how)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found
