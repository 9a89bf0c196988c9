"""Flat scripts for methods on the policy's own answers: one answer at a time, constants as the round left them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.twins.pairs import token_logps
from tests.twins.thumbs import values
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


def by_token(policy: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    logps, mask = token_logps(policy, [(tuple(prompt), tuple(completion))])
    return logps[0][mask[0] > 0]


def dapo(policy: Any, examples: Sequence[Example], clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio_t A, clip(ratio_t) A), the mean over all tokens; A = (r - mean) / (std + 1e-4) among the answers."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for e in examples:
        before = e.columns["behaviour"].split([len(c) for c in e.completions])
        worth = torch.tensor(e.record.scores, dtype=torch.float64)  # type: ignore[attr-defined]
        for i, completion in enumerate(e.completions):
            advantage = (worth[i] - worth.mean()) / (worth.std() + 1e-4)
            logps = by_token(policy, e.prompt, completion)
            ratio = torch.exp(logps - before[i])
            total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage).sum()
            tokens += len(completion)
    return total / tokens


def remax(policy: Any, examples: Sequence[Example], beta: float, clip: float) -> Tensor:
    """-min(ratio_t A_t, clip(ratio_t) A_t); A_t = score - greedy score - beta times the log-ratios from t on."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for e in examples:
        lengths = [len(c) for c in e.completions]
        before, reference, base = (e.columns[k].split(lengths) for k in ("behaviour", "reference", "baseline"))
        for i, completion in enumerate(e.completions):
            logps = by_token(policy, e.prompt, completion)
            for t in range(len(completion)):
                to_go = (before[i] - reference[i])[t:].sum()
                advantage = e.record.scores[i] - base[i][0] - beta * to_go  # type: ignore[attr-defined]
                ratio = torch.exp(logps[t] - before[i][t])
                total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            tokens += len(completion)
    return total / tokens


def ppo(policy: Any, examples: Sequence[Example], clip: float, value_clip: float, value_weight: float) -> Tensor:
    """The clipped objective by token and the clipped error of the critic; advantages as the round left them."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for e in examples:
        lengths = [len(c) for c in e.completions]
        names = ("behaviour", "advantage", "returns", "value")
        before, advantage, returns, old = (e.columns[k].split(lengths) for k in names)
        rows = [(e.prompt, c) for c in e.completions]
        for i, (found, (prompt, completion)) in enumerate(zip(values(policy, rows), rows, strict=True)):
            logps = by_token(policy, prompt, completion)
            for t in range(len(completion)):
                ratio, now = torch.exp(logps[t] - before[i][t]), found[len(prompt) - 1 + t]
                gain = torch.minimum(ratio * advantage[i][t], ratio.clamp(1 - clip, 1 + clip) * advantage[i][t])
                held = old[i][t] + (now - old[i][t]).clamp(-value_clip, value_clip)
                error = torch.maximum((now - returns[i][t]) ** 2, (held - returns[i][t]) ** 2)
                total = total - gain + value_weight / 2 * error
            tokens += len(completion)
    return total / tokens
