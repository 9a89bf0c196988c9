"""The kinds of feedback by name, and the one question everybody asks: of which kind are these records?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from trimtab.errors import FeedbackKindError
from trimtab.feedback.records import Comparison, Demonstration, Prompt, Ranking, Record, Score, Solution, Thumb

KINDS: dict[str, type[Record]] = {
    kind.__name__.lower(): kind for kind in (Comparison, Thumb, Ranking, Score, Solution, Demonstration, Prompt)
}


def name_of(kind: type[Record]) -> str:
    """``"comparison"`` for :class:`Comparison`: the word used in files, options and messages."""
    return kind.__name__.lower()


def counted(number: int, noun: str) -> str:
    """``"1 row"``, ``"1,204 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def kind_of(records: Iterable[Record]) -> type[Record]:
    """The one kind all records share.

    Raises :class:`FeedbackKindError` for no records, and for several kinds: it lists how many there are of each.
    """
    counts = Counter(type(record) for record in records)
    if len(counts) == 1:
        return next(iter(counts))
    if not counts:
        raise FeedbackKindError("There are no records, so they have no kind. Check that the source was read with rows.")
    found = ", ".join(f"{count:,} {name_of(kind)}" for kind, count in counts.most_common())
    raise FeedbackKindError(f"The records are of several kinds: {found}. Handle each kind on its own.")
