"""Implicit rewards as a product: score the completions of any file with a policy/reference pair."""

from __future__ import annotations

from pathlib import Path

import torch

from trimtab.config import RunConfig, load_yaml
from trimtab.errors import ConfigError, DataError, ModelError
from trimtab.feedback.read import write
from trimtab.feedback.records import Comparison, Score
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import check_weights, load_model, load_tokenizer
from trimtab.prepare import make_template, read_records
from trimtab.tokens.batch import Example
from trimtab.tokens.template import tokenize


def score_file(config: RunConfig, reference: str | None, out: Path, beta: float) -> str:
    """Write one ``score`` record per completion, in the file's order; returns what was found, in a sentence.

    ``config.model`` is the policy. The reward is ``beta * log(policy/reference)`` in nats, both in float32.
    ``reference``: None is the model that a run folder's own configuration names.
    """
    if not out.name.endswith((".jsonl", ".jsonl.gz")) or not out.expanduser().parent.is_dir():
        raise DataError(f"{out}: rewards are written as .jsonl or .jsonl.gz into a folder that exists. Change --out.")
    reference = reference or _start_of(config.model)
    if reference == config.model:
        raise ConfigError(f"policy and reference are both {reference}: every reward would be 0. Name two models.")
    template = make_template(config)
    if load_tokenizer(reference).get_vocab() != template.tokenizer.get_vocab():
        raise ModelError(
            f"the tokenizers of {config.model} and {reference} differ, so their log-probs are of different tokens. "
            "Name the model that the policy started from as --reference."
        )
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


def _start_of(policy: str) -> str:
    """The model that a run folder says it started from."""
    file = Path(policy).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{policy} holds no config.yaml, which in a run folder names the model it started from. Pass --reference MODEL."
        )
    return str(load_yaml(str(file)).get("model"))


def _logps(name: str, examples: list[Example], config: RunConfig) -> torch.Tensor:
    model = load_model(name)
    check_weights(model)
    mode = choose_layout(model, sorted(examples, key=lambda e: e.tokens)[:4], config.layout).mode
    install(model, torch.float32, mode)
    return Scorer(model, mode, config.token_budget).score_all(examples)[0].cpu()
