"""The demonstration's files: 360 prompts in a fixed order, and scored answers to all but the last 60 of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from ..errors import DataError
from ..feedback.records import Message, Origin, Score

PROMPTS = Path(__file__).with_name("prompts.txt")
FEEDBACK = Path(__file__).with_name("everyday.jsonl.gz")
HELD_OUT = 60


def prompts() -> tuple[str, ...]:
    """Every prompt of the demonstration, in the order of ``prompts.txt``."""
    return tuple(PROMPTS.read_text(encoding="utf-8").splitlines())


def training_prompts() -> tuple[str, ...]:
    """The first 300 prompts: those with feedback."""
    return prompts()[:-HELD_OUT]


def held_out_prompts() -> tuple[str, ...]:
    """The last 60 prompts, three per subject. No feedback exists on them: measure the true reward there."""
    return prompts()[-HELD_OUT:]


def training_records() -> list[Score]:
    """The scored answers, in the order of the file: four lines per training prompt, one after the other."""
    records = []
    with gzip.open(FEEDBACK, "rt", encoding="utf-8") as lines:
        for row, line in enumerate(lines, start=1):
            body = json.loads(line)
            if body.get("kind") != "score":
                raise DataError(f"{FEEDBACK.name} row {row:,}: expected a score, found {body.get('kind')!r}.")
            records.append(
                Score(
                    prompt=tuple(Message(turn["role"], turn["content"]) for turn in body["prompt"]),
                    completion=body["completion"],
                    score=float(body["score"]),
                    origin=Origin(FEEDBACK.name, row),
                )
            )
    return records
