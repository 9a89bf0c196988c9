"""The values of one row: text, conversations, numbers; and what is wrong with them, in a sentence.

A row is a mapping of column to value. Every function either returns what was asked for or raises :class:`Problem`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trimtab.feedback.records import (
    Comparison,
    Conversation,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Record,
    Score,
    Solution,
    Thumb,
)

Row = Mapping[str, Any]

# TRL, LLaMA-Factory and sharegpt call the same four speakers by these names.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class Problem(Exception):
    """Why a row cannot be used: ``reason`` is counted, the message is the sentence shown after file and row."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def need(row: Row, column: str) -> Any:
    """The value of a column that this row must have; ``None`` counts as absent, as it does in parquet."""
    value = row.get(column)
    if value is None:
        raise Problem(f'missing column "{column}"', f'"{column}" is missing or null. Fill it in, or drop the row.')
    return value


def text(row: Row, column: str) -> str:
    """The value of a column that must be a string."""
    value = need(row, column)
    if not isinstance(value, str):
        raise _wrong_type(column, value, "a string")
    return value


def number(row: Row, column: str) -> float:
    """A finite number, or a string that spells one (csv). True and False are labels, not numbers."""
    return as_number(need(row, column), column)


def as_number(value: Any, column: str) -> float:
    """:func:`number` for a value that is already at hand."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong_type(column, value, "a number")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise _wrong_type(column, value, "a number") from None
    _finite(**{column: result})
    return result


def flag(row: Row, *columns: str) -> bool:
    """The first of the columns that is present, as a boolean: True or False, or their names (csv). Absent is False."""
    for column in columns:
        value = row.get(column)
        if value is None or value == "":
            continue
        named = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(named, bool):
            raise _wrong_type(column, value, "true or false")
        return named
    return False


def items(row: Row, column: str) -> list[Any]:
    """The value of a column that must be a list."""
    value = need(row, column)
    if not isinstance(value, list):
        raise _wrong_type(column, value, "a list")
    return value


def conversation(value: Any, column: str) -> Conversation:
    """Messages from a string (one user message), from ``role``/``content`` dicts, or from ``from``/``value`` dicts.

    >>> conversation([{"from": "human", "value": "hi"}], "conversations")
    (Message(role='user', content='hi'),)
    """
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list | tuple):
        raise _wrong_type(column, value, "a string or a list of messages")
    return tuple(_message(item, column) for item in value)


def reply(value: Any, column: str) -> tuple[Conversation, str]:
    """``(messages before it, completion)`` from a string, one message, or a conversation that ends in a reply."""
    if isinstance(value, str):
        return (), value
    turns = conversation([value] if isinstance(value, dict) else value, column)
    if not turns or turns[-1].role != "assistant":
        last = f'from "{turns[-1].role}"' if turns else "absent"
        raise Problem(
            "last message not from the assistant",
            f'the last message of "{column}" is {last}. It must be the assistant\'s reply: drop what follows it.',
        )
    return turns[:-1], turns[-1].content


def _message(item: Any, column: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong_type(column, item, "a list of messages")
    speaker, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Problem(
            "unknown role",
            f'"{column}" holds a message from {speaker!r}. Known: system, user, assistant, tool (or human, gpt, ...).',
        )
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)  # the parts form of chat templates, text only
    if not isinstance(content, str):
        raise _wrong_type(f"content of a message in {column}", content, "a string (text only)")
    return Message(role, content)


def _wrong_type(column: str, value: Any, expected: str) -> Problem:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return Problem(f'wrong type in "{column}"', f'"{column}" is {type(value).__name__} {shown}, expected {expected}.')


def check(record: Record) -> Record:
    """The record itself, or the :class:`Problem` that makes it useless for training whatever layout it came from."""
    last = record.prompt[-1] if record.prompt else None
    if not any(m.content.strip() for m in record.prompt) or (last and last.role == "user" and not last.content.strip()):
        raise Problem(
            "empty prompt", "the prompt is empty. A completion without a prompt teaches nothing: drop the row."
        )
    for message in record.prompt:
        if message.role not in ROLES.values():
            raise Problem("unknown role", f'a message is from "{message.role}". Known: system, user, assistant, tool.')
    match record:
        case Comparison():
            _finite(strength=record.strength)
            _not_empty(chosen=record.chosen, rejected=record.rejected)
            if record.target is not None:
                _not_empty(target=record.target)
            if not record.tie and record.chosen.strip() == record.rejected.strip():
                raise identical(record.chosen)
        case Thumb() | Demonstration():
            _not_empty(completion=record.completion)
        case Score():
            _finite(score=record.score)
            _not_empty(completion=record.completion)
        case Ranking():
            _check_ranking(record)
        case Solution():
            _check_solution(record)
        case Prompt():
            pass
        case _:
            raise TypeError(f"{type(record).__name__} is not a kind of feedback")
    return record


def identical(chosen: str) -> Problem:
    """The problem of a pair that does not differ; ``chosen`` is one of the two."""
    return Problem(
        "chosen equals rejected",
        f'"chosen" equals "rejected" after stripping whitespace (both {len(chosen.strip()):,} characters). '
        'A pair must differ: drop the row, or label it "tie": true.',
    )


def _finite(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise Problem(
                "not a finite number", f'"{name}" is {value}. Only finite numbers can be compared: drop the row.'
            )


def _not_empty(**completions: str) -> None:
    for name, completion in completions.items():
        if not completion.strip():
            raise Problem("empty completion", f'"{name}" is empty. There is nothing to train on: drop the row.')


def _check_ranking(record: Ranking) -> None:
    for completion in record.ranked:
        _not_empty(completion=completion)
    if len(record.ranked) != len(record.ranks) or len(record.ranked) < 2:
        raise Problem(
            "ranks do not fit completions",
            f"there are {len(record.ranked)} completions and {len(record.ranks)} ranks. "
            "A ranking needs two or more completions and one rank for each.",
        )
    if record.scores is not None and len(record.scores) != len(record.ranked):
        raise Problem(
            "scores do not fit completions",
            f"there are {len(record.ranked)} completions and {len(record.scores)} scores. Give one score for each.",
        )
    for score in record.scores or ():
        _finite(scores=score)
    if min(record.ranks) < 1:
        raise Problem("rank below 1", f"the lowest rank is {min(record.ranks)}. Ranks count from 1, the best.")
    places: dict[str, int] = {}
    for completion, rank in zip(record.ranked, record.ranks, strict=True):
        if places.setdefault(completion.strip(), rank) != rank:
            raise Problem(
                "one completion at two ranks", "the same completion has two different ranks. Keep one of them."
            )


def _check_solution(record: Solution) -> None:
    for step in record.steps:
        _not_empty(steps=step)
    if len(record.steps) != len(record.labels) or not record.steps:
        raise Problem(
            "labels do not fit steps",
            f"there are {len(record.steps)} steps and {len(record.labels)} labels. Give one label for each step.",
        )
    for label in record.labels:
        if not 0 <= label <= 1:
            raise Problem(
                "label outside 0 to 1",
                f'"labels" holds {label:g}. A step is right (1), wrong (0), or right in that share of attempts.',
            )
