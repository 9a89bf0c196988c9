"""Log-probs typed in by hand as views, and the gradient by every one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Demonstrations, Pairs, Rankings, Rollouts, Thumbs
from trimtab.objectives.base import Objective

Rows = Sequence[Sequence[float]]  # token log-probs of each completion

# one pair, beta to be chosen: log-ratio 0.5 for the chosen and -0.2 for the rejected, so h = 0.7
CHOSEN, REF_CHOSEN = [[-0.5, -1.0]], [[-0.7, -1.3]]
REJECTED, REF_REJECTED = [[-2.0, -0.25, -0.75]], [[-1.5, -0.5, -0.8]]


def completions(rows: Rows, refs: Rows | None = None, dtype: torch.dtype = torch.float64) -> Completions:
    tokens = torch.tensor([t for r in rows for t in r], dtype=dtype, requires_grad=True)
    ref = None if refs is None else torch.tensor([t for r in refs for t in r], dtype=dtype)
    return Completions(tokens, torch.tensor([len(r) for r in rows], dtype=torch.long), ref)


def pair(tie: bool = False, refs: bool = True) -> Pairs:
    """The pair above."""
    chosen = completions(CHOSEN, REF_CHOSEN if refs else None)
    return Pairs(chosen, completions(REJECTED, REF_REJECTED if refs else None), torch.tensor([tie]))


def pairs_of(h: Sequence[float], tie: bool = False, dtype: torch.dtype = torch.float64) -> Pairs:
    """Single-token pairs with these log-ratio margins, half of each on either side."""
    half = [[x / 2] for x in h]
    chosen = completions(half, [[0.0]] * len(h), dtype)
    return Pairs(chosen, completions([[-x] for (x,) in half], [[0.0]] * len(h), dtype), torch.full((len(h),), tie))


def swapped(batch: Pairs) -> Pairs:
    return Pairs(batch.rejected, batch.chosen, batch.tie)


def shifted(y: Completions, by: Tensor) -> Completions:
    """The same completions with ``by`` [B] added to each one's reference log-prob."""
    per_token = torch.repeat_interleave(by / y.length, y._length)
    return Completions(y.token_logps, y._length, y.ref_token_logps + per_token)


def gradient(objective: Objective, batch: Any, *by: Completions) -> list[list[float]]:
    """d(sum of losses) / d(token log-probs), one list per asked-for set of completions."""
    leaves = [y._token_logps for y in by]
    return [g.tolist() for g in torch.autograd.grad(objective.loss(batch).sum(), leaves)]


def random_pairs(n: int = 7, seed: int = 0, ties: bool = False, scale: float = 1.0) -> Pairs:
    rng = torch.Generator().manual_seed(seed)

    def side() -> Completions:
        length = torch.randint(1, 6, (n,), generator=rng)
        ref = -2 * torch.rand(int(length.sum()), generator=rng, dtype=torch.float64)
        noise = torch.randn(len(ref), generator=rng, dtype=torch.float64)
        return Completions((ref + scale * noise).requires_grad_(), length, ref)

    return Pairs(side(), side(), torch.rand(n, generator=rng) < (0.4 if ties else -1))


def thumbs(
    rho: Sequence[float], up: Sequence[bool], mismatched: Sequence[float], dtype: torch.dtype = torch.float64
) -> Thumbs:
    """Single-token answers with these log-ratios; ``mismatched`` likewise."""
    y = completions([[r] for r in rho], [[0.0]] * len(rho), dtype)
    unmatched = completions([[r] for r in mismatched], [[0.0]] * len(mismatched), dtype)
    return Thumbs(y, torch.tensor(up), unmatched)


def demonstrations(rows: Rows) -> Demonstrations:
    return Demonstrations(completions(rows))


def exactly(x: float) -> Any:
    return pytest.approx(x, rel=1e-10, abs=1e-10)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def same_gradient(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], tolerance: float = 1e-12) -> bool:
    return all(close(torch.tensor(x), torch.tensor(y), tolerance) for x, y in zip(a, b, strict=True))


def softplus(x: float) -> float:
    """log(1 + e^x) in the math module."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def scored(rows: Rows, dtype: torch.dtype = torch.float64) -> Completions:
    """Answers with the number of a reward model after each token."""
    tokens = torch.tensor([t for r in rows for t in r], dtype=dtype, requires_grad=True)
    nan, length = torch.full_like(tokens, torch.nan).detach(), torch.tensor([len(r) for r in rows], dtype=torch.long)
    return Completions(nan, length, extras={"score": tokens})


def scored_pairs(d: Sequence[float], tie: bool = False, dtype: torch.dtype = torch.float64) -> Pairs:
    """Pairs whose scores differ by ``d``, half on either side."""
    half = [[x / 2] for x in d]
    return Pairs(scored(half, dtype), scored([[-x] for (x,) in half], dtype), torch.full((len(d),), tie))


def score_gradient(objective: Objective, batch: Any, *by: Completions) -> list[list[float]]:
    """d(sum of losses) / d(number after each token), one list per asked-for set of completions."""
    leaves = [y._extras["score"] for y in by]
    return [g.tolist() for g in torch.autograd.grad(objective.loss(batch).sum(), leaves)]


def rankings(
    answers: Sequence[Rows],
    ranks: Sequence[Sequence[int]] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Rankings:
    """Token log-probs of each prompt's answers, best first unless ``ranks`` say otherwise; the reference's are 0."""
    rows = [row for prompt in answers for row in prompt]
    y = completions(rows, [[0.0] * len(row) for row in rows], dtype)
    prompt = torch.tensor([i for i, prompt in enumerate(answers) for _ in prompt])
    rank = [r for i, prompt in enumerate(answers) for r in (ranks[i] if ranks else range(1, len(prompt) + 1))]
    score = None if scores is None else torch.tensor([s for prompt in scores for s in prompt], dtype=dtype)
    return Rankings(y, prompt, torch.tensor(rank), score)


def rankings_of(rho: Sequence[Sequence[float]], *labels: Any, **more: Any) -> Rankings:
    """Single-token answers with these log-ratios, one list for each prompt."""
    return rankings([[[x] for x in prompt] for prompt in rho], *labels, **more)


def together_as_apart(objective: Objective) -> bool:
    """Whether prompts with 3, 2 and 4 answers cost together what each costs alone, with the same gradient."""
    answers = [
        [[-1.0, -0.5], [-0.3], [-2.0, -0.1, -0.4]],
        [[-0.2], [-0.7, -1.0]],
        [[-1.5], [-0.6, -0.6], [-0.1, -3.0], [-0.8]],
    ]
    ranks, scores = [[2, 1, 3], [1, 2], [4, 1, 2, 3]], [[0.5, 0.9, 0.1], [0.8, 0.3], [0.0, 1.0, 0.7, 0.2]]
    whole = rankings(answers, ranks, scores)
    alone = [rankings([a], [r], [s]) for a, r, s in zip(answers, ranks, scores, strict=True)]
    slopes = [g for batch in alone for g in gradient(objective, batch, batch.y)[0]]
    same = close(objective.loss(whole), torch.cat([objective.loss(batch) for batch in alone]))
    return same and gradient(objective, whole, whole.y)[0] == exactly(slopes)


def rollouts(
    behaviour: Sequence[Rows], scores: Sequence[Sequence[float]], refs: Sequence[Rows] | None = None, **columns: Rows
) -> Rollouts:
    """Answers as they were sampled, prompt by prompt; ``columns``: one row of tokens for each answer."""
    flat = [r for rows in behaviour for r in rows]
    y = completions(flat, None if refs is None else [r for rows in refs for r in rows])
    prompt = torch.tensor([i for i, rows in enumerate(behaviour) for _ in rows])
    score = torch.tensor([s for row in scores for s in row], dtype=torch.float64)
    rank = torch.tensor([1 + sum(o > s for o in row) for row in scores for s in row])
    known = {k: torch.tensor([t for r in rows for t in r], dtype=torch.float64) for k, rows in columns.items()}
    known["behaviour"] = y._token_logps.detach().clone()
    return Rollouts(y, prompt, rank, score, columns=known)


def credited(objective: Objective, batch: Rollouts, policy: Rows | None = None) -> Rollouts:
    """The same answers with what the method makes of their scores, under a policy that has moved on."""
    columns = {**batch.columns, **{k: v.detach() for k, v in objective.credit(batch, batch.memory)[0].items()}}
    y = batch.y if policy is None else completions(policy)
    if policy is not None and batch.y._ref is not None:
        y = Completions(y._token_logps, y._length, batch.y._ref, batch.y._extras)
    return replace(batch, y=y, columns=columns)
