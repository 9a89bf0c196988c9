"""Rewards as a product: score the completions of any file with a policy/reference pair, or with a reward model."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.config import RunConfig, load_yaml
from trimtab.errors import ConfigError, DataError, FeedbackKindError, ModelError
from trimtab.feedback.kinds import kind_of, name_of
from trimtab.feedback.read import write
from trimtab.feedback.records import Comparison, Score, Solution
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import (
    FIRST_WINS,
    STEP_RIGHT,
    check_weights,
    is_reward_model,
    load_model,
    load_reward_model,
    load_tokenizer,
    what_it_says,
)
from trimtab.prepare import make_template, read_records
from trimtab.report.credit import credit_page, credits
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template, TokenReport, tokenize

BETA = 0.1  # scale of implicit rewards where none is given


def score_file(
    config: RunConfig, reference: str | None, out: Path, beta: float | None = None, tokens: bool = False
) -> str:
    """Write the reward of every completion, in the file's order; returns what was found, in a sentence.

    ``config.model`` is the policy. The reward is ``beta * log(policy/reference)`` in nats, both in float32.
    A reward model is its own reward; each token is worth what it adds to the number, and ``reference`` and ``beta`` are
    refused. A preference model writes the comparisons again, with the probability that the first answer wins as strength;
    a process reward model solutions, with the probability that each step is right as labels.
    ``reference``: None is the model that a run folder's own configuration names.
    ``out``: .jsonl or .jsonl.gz for one ``score`` record per completion, with ``tokens`` each token's part of it beside;
    .html for a page in which each token has the colour of its part.
    """
    if not out.name.endswith((".jsonl", ".jsonl.gz", ".html")) or not out.expanduser().parent.is_dir():
        raise DataError(
            f"{out}: rewards are written as .jsonl, .jsonl.gz or .html into a folder that exists. Change --out."
        )
    if tokens and out.suffix == ".html":
        raise ConfigError('The option "tokens" has no effect here: the page always shows tokens. Remove it.')
    if is_reward_model(config.model):
        for name, value in (("beta", beta), ("reference", reference)):
            if value is not None:
                raise ConfigError(
                    f'The option "{name}" has no effect here: {config.model} is a reward model, which gives the reward '
                    "itself. Remove it."
                )
        if what_it_says(config.model) == FIRST_WINS:
            return _judge_pairs(config, out, tokens)
    else:
        reference, beta = reference or _start_of(config.model), BETA if beta is None else beta
    if reference == config.model:
        raise ConfigError(f"policy and reference are both {reference}: every reward would be 0. Name two models.")
    template = make_template(config)
    if reference is not None and load_tokenizer(reference).get_vocab() != template.tokenizer.get_vocab():
        raise ModelError(
            f"the tokenizers of {config.model} and {reference} differ, so their log-probs are of different tokens. "
            "Name the model that the policy started from as --reference."
        )
    _, records, _ = read_records(config)
    examples, report = tokenize(
        records, template, max_length=config.max_length, truncation=config.truncation, max_truncated=1.0
    )
    if reference is None or beta is None:
        rewards = completion_rewards(config.model, examples, config, template)
    else:
        policy, other = (completion_logps(m, examples, config) for m in (config.model, reference))
        rewards = [beta * (a - b) for a, b in zip(policy, other, strict=True)]
    sums = [r.sum().item() for r in rewards]
    steps = isinstance(records[0], Solution) and reference is None and what_it_says(config.model) == STEP_RIGHT
    texts = [(e.record, c) for e in examples for c in e.record.completions]
    if tokens or out.suffix == ".html":
        parts = iter(r.tolist() for r in rewards)
        rows = [(e, list(credits(e, [next(parts) for _ in e.completions], template.tokenizer))) for e in examples]
    if out.suffix == ".html":
        about = {"policy": config.model, "reference": reference, "beta": beta}
        out.write_text(credit_page(rows, template.tokenizer, **about), encoding="utf-8")
    elif tokens:
        opened: Any = gzip.open(out, "wt", encoding="utf-8") if out.suffix == ".gz" else out.open("w", encoding="utf-8")  # noqa: SIM115
        with opened as file:
            for (record, text), credit in zip(texts, (c for _, answers in rows for c in answers), strict=True):
                line = Score(record.prompt, text, credit.reward).to_json()
                file.write(
                    json.dumps({**line, "tokens": credit.pieces, "credit": credit.rewards}, ensure_ascii=False) + "\n"
                )
    elif steps:
        judged = [torch.sigmoid(r.cumsum(0)[list(e.marks)]) for e, r in zip(examples, rewards, strict=True)]
        write([replace(e.record, labels=tuple(p.tolist())) for e, p in zip(examples, judged, strict=True)], out)  # type: ignore[call-arg]
    else:
        write([Score(r.prompt, c, s, origin=r.origin) for (r, c), s in zip(texts, sums, strict=True)], out)
    told = f"{out}: {len(sums):,} completions scored{_left_out(report)}"
    if examples and isinstance(examples[0].record, Comparison):
        left = iter(sums)
        known = [(e.record, [next(left) for _ in e.completions]) for e in examples]
        right = [r[0] > r[1] for record, r in known if not record.tie]  # type: ignore[attr-defined]
        told += f"; the preferred one has the higher reward in {sum(right)} of {len(right)} comparisons"
    return told


def _judge_pairs(config: RunConfig, out: Path, tokens: bool) -> str:
    """Every comparison with the probability that its first answer wins as strength, the mean over both orders."""
    if tokens or out.suffix == ".html":
        what = "tokens" if tokens else "out"
        raise ConfigError(
            f"{what}: {config.model} is a preference model, which says which of two answers wins and not what a token "
            "adds. Write a .jsonl file without tokens."
        )
    template = make_template(config)
    _, records, _ = read_records(config)
    if (kind := kind_of(records)) is not Comparison:
        raise FeedbackKindError(
            f"{config.data} holds records of kind {name_of(kind)}, and {config.model} is a preference model, which compares "
            "two answers. Name a file of comparisons, or pass convert: comparison."
        )
    examples, report = tokenize(
        records, template, max_length=config.max_length, truncation=config.truncation, max_truncated=1.0, together=True
    )
    rewards = completion_rewards(config.model, examples, config, template)
    number = torch.stack([r.sum() for r in rewards]).view(-1, 2)  # in the file's order, and turned
    wins = (torch.sigmoid(number[:, 0]) + torch.sigmoid(-number[:, 1])) / 2
    pairs = [replace(e.record, strength=p) for e, p in zip(examples, wins.tolist(), strict=True)]  # type: ignore[call-arg]
    write(pairs, out)
    right = [p.strength > 0.5 for p in pairs if not p.tie]  # type: ignore[attr-defined]
    same = int(((number[:, 0] > 0) != (number[:, 1] > 0)).sum())
    return (
        f"{out}: {len(pairs):,} comparisons judged{_left_out(report)}; the preferred one wins in {sum(right)} of {len(right)}; "
        f"both orders agree in {same} of {len(pairs)}"
    )


def _left_out(report: TokenReport) -> str:
    told = ", ".join(f"{n} × {r}" for r, n in report.dropped.items())
    return f"; left out: {told}" if told else ""


def _start_of(policy: str) -> str:
    """The model that a run folder says it started from."""
    file = Path(policy).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{policy} holds no config.yaml, which in a run folder names the model it started from. Pass --reference MODEL."
        )
    return str(load_yaml(str(file)).get("model"))


def completion_logps(name: str, examples: list[Example], config: RunConfig) -> list[torch.Tensor]:
    """Token log-probs of every completion, in order, under a model in float32."""
    logps = _scored(load_model(name), examples, config)
    return list(logps.split([len(c) for e in examples for c in e.completions]))


def completion_rewards(name: str, examples: list[Example], config: RunConfig, template: Template) -> list[torch.Tensor]:
    """What every token adds to the reward model's number, in order; the first one has what the prompt says, too."""
    model = load_reward_model(name, template.tokenizer, ends=template.eos_ids)
    after = _scored(model, examples, config)[:, 1].double()
    return [s.diff(prepend=s.new_zeros(1)) for s in after.split([len(c) for e in examples for c in e.completions])]


def _scored(model: torch.nn.Module, examples: list[Example], config: RunConfig) -> torch.Tensor:
    check_weights(model)
    mode = choose_layout(model, sorted(examples, key=lambda e: e.tokens)[:4], config.layout).mode
    install(model, torch.float32, mode)
    return Scorer(model, mode, config.token_budget).score_all(examples)[0].cpu()
