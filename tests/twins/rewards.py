"""Reward models in one flat script: a padded batch, transformers' own head and pooling, the papers' formulas.

Shapes: B texts, T tokens of the longest, R records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.twins.pairs import pad
from trimtab.tokens.batch import Example


def scores(model: Any, examples: Sequence[Example]) -> list[Tensor]:
    """The number of every completion, [K] for each example: at the last token that is not padding (id 0)."""
    ids, attend, _ = pad([(e.prompt, completion) for e in examples for completion in e.completions])
    found = model(input_ids=ids, attention_mask=attend).logits[:, 0]  # [B]
    return list(found.split([len(e.completions) for e in examples]))


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(x))


def bradley_terry(model: Any, pairs: Sequence[Example], eps: float, centring: float) -> Tensor:
    """The record's strength is the margin."""
    losses = []
    for e, (chosen, rejected) in zip(pairs, scores(model, pairs), strict=True):
        d = chosen - rejected - e.record.strength  # type: ignore[attr-defined]
        losses.append(-(1 - eps) * log_sigmoid(d) - eps * log_sigmoid(-d) + centring * (chosen + rejected) ** 2)
    return torch.stack(losses).mean()


def with_ties(model: Any, pairs: Sequence[Example], p0: float) -> Tensor:
    """Rao and Kupper: theta = (1 + p0)/(1 - p0), strengths e^s."""
    theta, losses = (1 + p0) / (1 - p0), []
    for e, (first, second) in zip(pairs, scores(model, pairs), strict=True):
        a, b = first.exp(), second.exp()
        tie = (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))
        losses.append(-torch.log(tie if e.record.tie else a / (a + theta * b)))  # type: ignore[attr-defined]
    return torch.stack(losses).mean()


def k_wise(model: Any, examples: Sequence[Example]) -> Tensor:
    """Every pair of one prompt that is no tie, their mean, the mean over prompts."""
    losses = []
    for e, s in zip(examples, scores(model, examples), strict=True):
        ranks = e.record.ranks  # type: ignore[attr-defined]
        kept = [-log_sigmoid(s[i] - s[j]) for i in range(len(s)) for j in range(len(s)) if ranks[i] < ranks[j]]
        losses.append(sum(kept) / len(kept))
    return torch.stack(losses).mean()  # type: ignore[arg-type]


def regression(model: Any, examples: Sequence[Example], mean: float, std: float) -> Tensor:
    wanted = [(e.record.score - mean) / std for e in examples]  # type: ignore[attr-defined]
    return torch.stack([(s[0] - w) ** 2 for s, w in zip(scores(model, examples), wanted, strict=True)]).mean()


def process(model: Any, examples: Sequence[Example]) -> Tensor:
    """Two-class cross-entropy of each judged step, read off by giving the model the text up to there; over all steps."""
    losses = []
    for e in examples:
        labels = e.record.labels  # type: ignore[attr-defined]
        for end, label in zip(e.marks, labels, strict=True):
            text = torch.tensor([[*e.prompt, *e.completions[0][: end + 1]]])
            s = model(input_ids=text).logits[0, 0]
            losses.append(-label * log_sigmoid(s) - (1 - label) * log_sigmoid(-s))
    return torch.stack(losses).mean()
