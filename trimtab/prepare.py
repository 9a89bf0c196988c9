"""From a feedback file to examples: read, convert, decide about ties, keep prompts out for evaluation, tokenise.

Everything that changes the number of rows is counted here and ends up in the run card.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, TemplateSyntaxError

from trimtab.config import RunConfig
from trimtab.errors import ConfigError, DataError, FeedbackKindError, TrimtabError
from trimtab.feedback.convert import PATHS, convert, settle_ties
from trimtab.feedback.read import Reading, read
from trimtab.feedback.records import Comparison, Conversation, Prompt, Record
from trimtab.feedback.shift import Embed, Shift, embedder, prompt_shift
from trimtab.logprobs.scored import Completions
from trimtab.models import end_tokens, load_tokenizer
from trimtab.objectives import Objective, methods
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template, TokenReport, tokenize


@dataclass
class Prepared:
    """Examples ready to train on, and the story of how they came to be."""

    train: list[Example]
    held_out: list[Example]
    reading: Reading
    conversions: list[str]
    tokens: TokenReport
    objective: Objective  # with what followed from the labels
    notes: list[str] = field(default_factory=list)
    shift: Shift | None = None

    def card(self, file: str) -> dict[str, Any]:
        """The data card of the run."""
        dropped = dict(self.reading.dropped)
        for reason, n in self.tokens.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + n
        return {
            "file": file,
            "shape": self.reading.shape,
            "sha256": self.reading.sha256,
            "rows": self.reading.rows,
            "records": len(self.reading.records),
            "train": len(self.train),
            "held_out": len(self.held_out),
            "dropped": dropped,
            "conversions": self.conversions,
            "notes": [*self.reading.notes, *self.notes],
            "repaired": self.tokens.repaired,
            "tokens": {
                **self.tokens.lengths,
                "truncated_rows": self.tokens.truncated_rows,
                "tokens_lost": self.tokens.tokens_lost,
                "eos_lost": self.tokens.eos_lost,
            },
            **({"prompt_shift": self.shift.to_json()} if self.shift else {}),
        }


def read_records(config: RunConfig) -> tuple[Reading, list[Record], list[str]]:
    """The file's records after the conversions that the configuration asks for, each told in a sentence."""
    reading = read(
        config.data,
        shape=config.shape,
        columns=config.columns,
        labels=config.labels,
        bad_rows=config.bad_rows,
        split=config.split,
        limit=config.limit,
    )
    if config.convert is None:
        return reading, list(reading.records), []
    asked = {"pairs": config.pairs, "tie_threshold": config.tie_threshold, "threshold": config.score_threshold}
    records, told = convert(reading.records, to=config.convert, **{k: v for k, v in asked.items() if v is not None})
    if not records:
        raise DataError(f"{config.data}: nothing is left after the conversion to {config.convert}. {told}")
    return reading, records, [str(told)]


def make_template(config: RunConfig) -> Template:
    """The template of the configured model, with the user's chat template where one is named."""
    tokenizer = load_tokenizer(config.model)
    if config.chat_template:
        path = Path(config.chat_template)
        if not path.is_file():
            raise ConfigError(f"chat_template: {path} is not a file. Name a file that holds a Jinja template.")
        try:
            tokenizer.chat_template = path.read_text()
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(tokenizer.chat_template)
        except UnicodeDecodeError:
            raise ConfigError(f"chat_template: {path} is not text. Name a file that holds a Jinja template.") from None
        except TemplateSyntaxError as e:
            if "generation" not in str(e.message):  # a tag that transformers adds to the language
                raise ConfigError(
                    f"chat_template: {path} line {e.lineno}: {e.message}. Correct the template."
                ) from None
    return Template(tokenizer, config.template, config.eos, end_tokens(config.model))


def prepare(config: RunConfig, objective: Objective, template: Template) -> Prepared:
    """Read, convert, split and tokenise; refuses what the method cannot learn from before any weight is loaded."""
    reading, records, conversions = read_records(config)
    _refuse_wrong_kind(config, objective, records)
    records = _settle_ties(config, objective, records, conversions)
    train, held_out = split_by_prompt(records, config.holdout, config.seed)
    examples, report = tokenize(
        [*train, *held_out],
        template,
        max_length=config.max_length,
        truncation=config.truncation,
        max_truncated=config.max_truncated,
        together=objective.jointly,
    )
    kept_out = {r.prompt for r in held_out}
    prepared = Prepared(
        [e for e in examples if e.record.prompt not in kept_out],
        [e for e in examples if e.record.prompt in kept_out],
        reading,
        conversions,
        report,
        objective,
    )
    if objective.control_tokens:
        good, bad = template.add_control(*objective.control_tokens)
        prepared.train, prepared.held_out = (_marked(e, good, bad) for e in (prepared.train, prepared.held_out))
    if not prepared.train:
        raise DataError(
            f"{config.data}: all {len(prepared.held_out):,} usable rows are held out (holdout {config.holdout:g}, by prompt) "
            "and none is left to train on. Lower holdout."
        )
    labels = _unscored(objective, prepared.train)
    prepared.objective = objective.settle(labels)
    refusal, notes = prepared.objective.advise(labels)
    if refusal:
        raise DataError(f"{config.data}: {refusal}. {_other_ways(records, objective)}")
    prepared.notes += notes
    if config.match_prompts not in ("none", "policy"):  # the policy is not loaded yet
        match_prompts(config, prepared, embedder(config.match_prompts))
    return prepared


def prepare_prompts(config: RunConfig, objective: Objective, template: Template) -> Prepared:
    """The prompts of a file of any kind, for answers that will be sampled; a share of them is kept for evaluation."""
    reading, records, _ = read_records(config)
    prompts, told = convert(records, to="prompt") if not isinstance(records[0], Prompt) else (list(records), "")
    train, held_out = split_by_prompt(prompts, config.holdout, config.seed)
    examples, report = tokenize([*train, *held_out], template, max_length=config.max_length - config.sample_tokens)
    kept_out = {r.prompt for r in held_out}
    left = [e for e in examples if e.record.prompt not in kept_out]
    if not left:
        raise DataError(f"{config.data}: no prompt is left to train on. Lower holdout ({config.holdout:g}).")
    others = [e for e in examples if e.record.prompt in kept_out]
    return Prepared(left, others, reading, [str(told)] if told else [], report, objective)


def match_prompts(config: RunConfig, prepared: Prepared, embed: Embed) -> None:
    """Give thumbs down weights with which their prompts are distributed as those of thumbs up."""
    train, held_out = prepared.train, prepared.held_out
    shift = prompt_shift(
        [e.record for e in train],
        [e.record for e in held_out],
        embed,
        low=config.min_density_ratio,
        high=config.max_density_ratio,
        seed=config.seed,
    )
    prepared.train = [replace(e, weight=w) for e, w in zip(train, shift.weights, strict=True)]
    prepared.held_out = [replace(e, weight=w) for e, w in zip(held_out, shift.others, strict=True)]
    prepared.shift = shift
    prepared.notes.append(str(shift))


def _marked(examples: Sequence[Example], good: int, bad: int) -> list[Example]:
    """The same rows with their control token before the answer."""
    marks = [good if e.record.desirable else bad for e in examples]  # type: ignore[attr-defined]
    return [replace(e, completions=((m, *e.completions[0]),)) for e, m in zip(examples, marks, strict=True)]


def split_by_prompt(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out a share of the prompts, so that no prompt stands on both sides."""
    prompts: list[Conversation] = list(dict.fromkeys(r.prompt for r in records))
    random.Random(seed).shuffle(prompts)
    kept_out = set(prompts[: round(share * len(prompts))])
    return [r for r in records if r.prompt not in kept_out], [r for r in records if r.prompt in kept_out]


def _refuse_wrong_kind(config: RunConfig, objective: Objective, records: Sequence[Record]) -> None:
    found, wanted = type(records[0]), objective.feedback.record
    if found is not wanted:
        kind, name = wanted.__name__.lower(), type(objective).name()
        way = (
            f"; or pass convert: {kind} (`trimtab data convert` says what is lost)" if (found, wanted) in PATHS else ""
        )
        raise FeedbackKindError(
            f"{config.data} holds {len(records):,} records of kind {found.__name__.lower()}, but {name} learns from kind "
            f"{kind}. Methods for this data: {_methods_for(records)}{way}."
        )


def _other_ways(records: Sequence[Record], objective: Objective) -> str:
    """What else these records could be used for, conversions tried out."""
    kind, ways = type(records[0]), []
    for start, end in ((kind, kind), *PATHS):
        able = [n for n, c in methods().items() if c.feedback.record is end and c is not type(objective)]
        if start is not kind or not able or end is Prompt:  # no judge is known here
            continue
        with suppress(TrimtabError):
            if end is kind or convert(records, to=end.__name__.lower())[0]:
                ways.append(", ".join(able) + ("" if end is kind else f" with convert: {end.__name__.lower()}"))
    return f"Other methods that can use it: {'; '.join(ways) or 'none'}. Or add what is missing."


def _methods_for(records: Sequence[Record]) -> str:
    kind = type(records[0])
    ties = any(getattr(r, "tie", False) for r in records)
    return (
        ", ".join(n for n, c in methods().items() if c.feedback.record is kind and (c.ties or not ties)) or "none yet"
    )


def _settle_ties(
    config: RunConfig, objective: Objective, records: list[Record], conversions: list[str]
) -> list[Record]:
    pairs = [r for r in records if isinstance(r, Comparison)]
    ties = sum(r.tie for r in pairs)
    if config.ties and not ties:
        raise ConfigError(f'The option "ties" has no effect here: {config.data} has no tie. Remove it.')
    if not ties or objective.ties:
        return records
    match config.ties:
        case None:
            raise DataError(
                f"{ties} of {len(pairs)} comparisons in {config.data} are ties, and {type(objective).name()} cannot learn from "
                f"ties. Choose a method that can ({_methods_for(records)}), or pass ties: drop, or ties: split."
            )
        case how:
            left, told = settle_ties(pairs, ties=how)
            if not left:
                raise DataError(f"{config.data}: nothing is left with ties: {how}. {told}")
    conversions.append(str(told))
    return list(left)


def _unscored(objective: Objective, examples: Sequence[Example]) -> Any:
    lengths = torch.tensor([len(c) for e in examples for c in e.completions])
    return objective.feedback.of(Completions(torch.full((int(lengths.sum()),), torch.nan), lengths), examples)
