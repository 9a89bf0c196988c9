"""The kinds of feedback, as frozen types: a tie cannot be mistaken for a win, nor a thumb for a score.

A prompt is a conversation: a tuple of :class:`Message`. A plain string prompt is one user message; the tokens layer
decides whether a chat template is applied. A completion is the text of the assistant message that answers the prompt.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``role`` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Origin:
    """Where a record was read: the file (or data set name) and its row, counted from 1."""

    file: str = ""
    row: int = 0

    def __str__(self) -> str:
        return f"{self.file} row {self.row:,}" if self.file else f"row {self.row:,}"


@dataclass(frozen=True)
class Record:
    """What every kind of feedback shares: the prompt, and where it came from (not part of equality)."""

    prompt: Conversation
    origin: Origin = field(default=Origin(), compare=False, kw_only=True)

    @property
    def completions(self) -> tuple[str, ...]:
        """The completions this record speaks about, in a fixed order."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """The canonical line of a feedback file: ``{"kind": ..., "prompt": [...], ...}``, without the origin."""
        body = {k: v for k, v in asdict(self).items() if k != "origin" and v is not None}
        return {"kind": type(self).__name__.lower(), **body}


@dataclass(frozen=True)
class Prompt(Record):
    """Nothing but a prompt: food for samplers."""


@dataclass(frozen=True)
class Demonstration(Record):
    """A completion to imitate."""

    completion: str

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.completion,)


@dataclass(frozen=True)
class Comparison(Record):
    """``chosen`` was preferred to ``rejected``; with ``tie=True`` neither was, and the two names only fix an order.

    ``strength`` is how sure or how strong the preference was, in the unit of the data set (a rating step, a
    probability); ``None`` when unknown. ``target`` is a completion to stay close to where a method regularises towards
    one that is neither of the two (SLiC-HF).
    """

    chosen: str
    rejected: str
    tie: bool = False
    strength: float | None = None
    target: str | None = None

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected) if self.target is None else (self.chosen, self.rejected, self.target)


@dataclass(frozen=True)
class Thumb(Record):
    """Thumbs up (``desirable=True``) or down on one completion."""

    completion: str
    desirable: bool

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.completion,)


@dataclass(frozen=True)
class Ranking(Record):
    """K completions of one prompt, ``ranks[k]`` the place of ``completions[k]``: 1 is best, equal ranks are ties.

    ``scores[k]`` is what it was judged to be worth, where that is known; higher is better, the unit is the judge's own.
    """

    ranked: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None

    @property
    def completions(self) -> tuple[str, ...]:
        return self.ranked


@dataclass(frozen=True)
class Score(Record):
    """A number for one completion; higher is better, the unit is the judge's own."""

    completion: str
    score: float

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.completion,)


STEP = "\n"  # between two steps of a solution


@dataclass(frozen=True)
class Solution(Record):
    """A completion in steps, each of them judged.

    ``labels[i]`` is 1 where everything up to step i is right and 0 where it is not, or the share of attempts that went on
    from there and came out right.
    """

    steps: tuple[str, ...]
    labels: tuple[float, ...]

    @property
    def completions(self) -> tuple[str, ...]:
        return (STEP.join(self.steps),)
