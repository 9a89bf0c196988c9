"""Flat scripts for methods on the policy's own answers: one answer at a time, constants as the round left them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.twins.pairs import token_logps
from trimtab.tokens.batch import Example


def rloo(policy: Any, examples: Sequence[Example], beta: float, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio) A) of whole answers, A = R less the mean R of the others, R = score - beta log-ratio."""
    total, answers = torch.zeros((), dtype=torch.float64), 0
    for e in examples:
        before, reference = (e.columns[k].split([len(c) for c in e.completions]) for k in ("behaviour", "reference"))
        worth = [s - beta * (b - r).sum() for s, b, r in zip(e.record.scores, before, reference, strict=True)]  # type: ignore[attr-defined]
        for i, completion in enumerate(e.completions):
            others = [w for j, w in enumerate(worth) if j != i]
            advantage = worth[i] - sum(others) / len(others)
            logp = token_logps(policy, [(e.prompt, completion)])[0].sum()
            ratio = torch.exp(logp - before[i].sum())
            total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            answers += 1
    return total / answers
