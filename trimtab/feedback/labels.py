"""Label codes. What 0, 1 and 2 mean differs between data sets, so a code is read only by a layout that defines it.

``labels={"1": "first", "2": "second", "0": "tie"}`` or ``{"1": "desirable", "0": "undesirable"}`` says it for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import DataError, nearest
from trimtab.feedback.rows import Problem, Row, need

THUMB = ("desirable", "undesirable")
PAIR = ("first", "second", "tie")
DROP = "drop"
SAME = {"chosen_first": "first", "chosen_second": "second"}


@dataclass(frozen=True)
class Label:
    """A label column: ``meanings`` are the words a reader understands, ``defined`` the codes its layout fixes."""

    role: str
    meanings: tuple[str, ...]
    defined: Mapping[str, str] = field(default_factory=dict)


# TRL and LLaMA-Factory define true as thumbs up; 0 and 1 are not booleans until somebody says so.
THUMB_LABEL = Label("label", THUMB, {"true": "desirable", "false": "undesirable"} | {word: word for word in THUMB})
PAIR_LABEL = Label("preference", PAIR, {word: word for word in PAIR})


def code_of(value: Any) -> str:
    """One spelling per code: ``True`` and ``"true"`` are ``"true"``; ``1``, ``1.0`` and ``"1.0"`` are ``"1"``."""
    if isinstance(value, bool):
        return str(value).lower()
    spelled = str(value).strip().lower()
    try:
        value = float(spelled)
    except ValueError:
        return spelled
    return str(int(value)) if value.is_integer() else spelled


def translator(
    label: Label, column: str, rows: Iterable[Row], labels: Mapping[str, str] | None, source: str
) -> tuple[Callable[[Row], Row], list[str]]:
    """A function that replaces the code in a row by its meaning, and notes about options without effect.

    ``column`` is what the file calls the label. Raises :class:`DataError` with the count of every code when one has no
    meaning: a wrong guess here would train the opposite of what people said.
    """
    given = {code_of(code): _meaning(code, word, label) for code, word in (labels or {}).items()}
    known = {**label.defined, **given}
    values = [row[label.role] for row in rows if row.get(label.role) is not None]
    counts = Counter(code_of(value) for value in values if isinstance(value, str | int | float))
    if set(counts) - set(known):
        raise DataError(_unknown(label, column, counts, set(known), source))

    def translate(row: Row) -> Row:
        value = need(row, label.role)
        if not isinstance(value, str | int | float):
            raise Problem(f'wrong type in "{column}"', f'"{column}" is {type(value).__name__}, expected one label.')
        if known[code_of(value)] == DROP:
            code = code_of(value)
            raise Problem(f'label {code}, mapped to "drop"', f'"{column}" is {code}, which labels= maps to "drop".')
        return {**row, label.role: known[code_of(value)]}

    idle = sorted(set(given) - set(counts))
    return translate, [f'labels= names codes that "{column}" never holds: {", ".join(idle)}'] if idle else []


def _meaning(code: str, word: str, label: Label) -> str:
    word = SAME.get(word, word)
    if word not in (*label.meanings, DROP):
        known = [*label.meanings, DROP]
        raise DataError(
            f'labels={{"{code}": "{word}"}} is not a meaning here. Known: {", ".join(known)}.{nearest(word, known)}'
        )
    return word


def _unknown(label: Label, column: str, counts: Counter[str], known: set[str], source: str) -> str:
    shown = ", ".join(f"{code!r} {count:,}" for code, count in counts.most_common(8))
    more = f", and {len(counts) - 8:,} other codes" if len(counts) > 8 else ""
    # Zero is often the tie or the thumb down, so the example puts it last; it stays an example, never a default.
    open_codes = sorted(set(counts) - known, key=lambda code: (code == "0", code))[: len(label.meanings)]
    example = ", ".join(f'"{code}": "{word}"' for code, word in zip(open_codes, label.meanings, strict=False))
    return (
        f'{source}: the codes in "{column}" mean different things in different data sets. '
        f"Rows per code: {shown}{more}. "
        f"Say what each one means, for example labels={{{example}}}; "
        f"known meanings: {', '.join(label.meanings)}, {DROP}."
    )
