"""Implicit rewards as a product: score the completions of any file with a policy/reference pair."""

from __future__ import annotations

from pathlib import Path

import torch

from trimtab.config import RunConfig
from trimtab.feedback.read import write
from trimtab.feedback.records import Comparison, Score
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import check_weights, load_model
from trimtab.prepare import make_template, read_records
from trimtab.tokens.batch import Example
from trimtab.tokens.template import tokenize


def score_file(config: RunConfig, reference: str, out: Path, beta: float) -> str:
    """Write one ``score`` record per completion, in the file's order; returns what was found, in a sentence.

    ``config.model`` is the policy. The reward is ``beta * log(policy/reference)`` in nats, both in float32.
    """
    template = make_template(config)
    _, records, _ = read_records(config)
    examples, report = tokenize(
        records, template, max_length=config.max_length, truncation=config.truncation, max_truncated=1.0
    )
    rewards = beta * (_logps(config.model, examples, config) - _logps(reference, examples, config))
    sums = [r.sum().item() for r in rewards.split([len(c) for e in examples for c in e.completions])]
    texts = [(e.record, c) for e in examples for c in e.record.completions]
    write([Score(r.prompt, c, s, origin=r.origin) for (r, c), s in zip(texts, sums, strict=True)], out)
    told = f"{out}: {len(sums):,} completions scored"
    if report.dropped:
        told += f"; left out: {', '.join(f'{n} × {r}' for r, n in report.dropped.items())}"
    if examples and isinstance(examples[0].record, Comparison):
        pairs = zip(sums[::2], sums[1::2], examples, strict=True)
        right = [a > b for a, b, e in pairs if not e.record.tie]  # type: ignore[attr-defined]
        told += f"; the preferred one has the higher reward in {sum(right)} of {len(right)} comparisons"
    return told


def _logps(name: str, examples: list[Example], config: RunConfig) -> torch.Tensor:
    model = load_model(name)
    check_weights(model)
    mode = choose_layout(model, sorted(examples, key=lambda e: e.tokens)[:4], config.layout).mode
    install(model, torch.float32, mode)
    return Scorer(model, mode, config.token_budget).score_all(examples)[0].cpu()
