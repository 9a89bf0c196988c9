"""What a judge is: asked about answers to a prompt, it gives a judgement for each question, or a failure with its reason.

A failure is never a low score, a loss or a tie: it is counted and left out. Three kinds of judgement:

    pointwise   a number for each answer; higher is better, the unit is the judge's own
    pairwise    the probability that the first of two answers is the better one, where it can be had in both orders
    ranking     a place for each answer
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trimtab.errors import ConfigError, JudgeError
from trimtab.feedback.records import Conversation, Origin

Kind = Literal["pointwise", "pairwise", "ranking"]
PATIENCE = 20  # answers that must have been judged, or not, before a judge is stopped in the middle


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to it that are to be judged."""

    prompt: Conversation
    completions: tuple[str, ...]
    origin: Origin = field(default=Origin(), compare=False, kw_only=True)

    def digest(self, *more: object) -> bytes:
        """16 bytes that depend on every character of the question, and on what else is named."""
        said = [[m.role, m.content] for m in self.prompt]
        return hashlib.blake2b(json.dumps([said, self.completions, *more]).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Failure:
    """Why there is no judgement: ``reason`` is what it is counted under, ``detail`` says more to the reader."""

    reason: str
    detail: str = field(default="", compare=False)


@dataclass(frozen=True)
class Scores:
    """A number for each answer, or why there is none."""

    scores: tuple[float | Failure, ...]


@dataclass(frozen=True)
class Preference:
    """P(the first answer is better), ties counted half; ``tie`` is the probability that neither is.

    ``orders``: the same probability with the first answer shown first and shown second; None for a judge that sees no order.
    """

    first: float
    tie: float = 0.0
    orders: tuple[float, float] | None = None


@dataclass(frozen=True)
class Ranks:
    """The place of each answer: 1 is best, equal places are ties."""

    ranks: tuple[int, ...]


Judgement = Scores | Preference | Ranks | Failure


def failures(judgement: Judgement) -> list[Failure]:
    """What failed in it: one for each answer of a pointwise judgement, at most one otherwise."""
    match judgement:
        case Failure():
            return [judgement]
        case Scores():
            return [s for s in judgement.scores if isinstance(s, Failure)]
        case Preference() | Ranks():
            return []


@dataclass(frozen=True)
class Verdicts:
    """Questions, the judgement of each in the same order, and what was noted on the way (retries, cache hits, ...)."""

    questions: tuple[Question, ...]
    judgements: tuple[Judgement, ...]
    notes: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[tuple[Question, Judgement]]:
        return zip(self.questions, self.judgements, strict=True)

    @property
    def asked(self) -> int:
        """How many judgements were asked for: answers of a pointwise judge, questions of another."""
        return sum(_size(j) for j in self.judgements)

    @property
    def failed(self) -> Counter[str]:
        """Reason -> how many were not judged."""
        return Counter(f.reason for j in self.judgements for f in failures(j))

    @property
    def position(self) -> dict[str, float]:
        """How the place where an answer is shown moves a pairwise judge; empty where no pair was judged in both orders.

        ``bias``: share of pairs where both orders prefer the same place; ``consistency``: share where both orders prefer
        the same answer or neither; ``first_place``: mean probability given to the answer shown first, 1/2 without bias.
        """
        both = [j.orders for j in self.judgements if isinstance(j, Preference) and j.orders is not None]
        if not both:
            return {}
        signs = [(_sign(a), _sign(b)) for a, b in both]
        return {
            "bias": sum(a * b < 0 for a, b in signs) / len(both),
            "consistency": sum(a == b for a, b in signs) / len(both),
            "first_place": sum(a + 1 - b for a, b in both) / (2 * len(both)),
        }

    @property
    def outcome(self) -> dict[str, float]:
        """Wins, ties and losses of the first answers, and ``win_rate`` = (wins + ties / 2) / judged (MT-bench's rule).

        An answer wins where both orders say so; where they do not agree it is a tie. Empty where no pair was judged.
        """
        pairs = [j for j in self.judgements if isinstance(j, Preference)]
        if not pairs:
            return {}
        said = [{_sign(p) for p in j.orders or (j.first,)} for j in pairs]
        wins, losses = said.count({1}), said.count({-1})
        ties = len(pairs) - wins - losses
        return {"wins": wins, "ties": ties, "losses": losses, "win_rate": (wins + ties / 2) / len(pairs)}

    def to_json(self) -> dict[str, Any]:
        """What the run card says of them."""
        counts = {"asked": self.asked, "failed": dict(self.failed), "notes": dict(self.notes)}
        return {**counts, "position": self.position, "outcome": self.outcome}

    def __str__(self) -> str:
        told = [f"{self.asked - self.failed.total():,} of {self.asked:,} judged{listed('; failed: ', self.failed)}"]
        told += [listed("", self.notes)] if self.notes else []
        if place := self.position:
            told.append(
                f"both orders prefer the same answer in {place['consistency']:.0%} of the pairs, the same place in "
                f"{place['bias']:.0%}; the place shown first gets {place['first_place']:.2f} on average"
            )
        return "; ".join(told) + "."


@dataclass
class Judge(ABC):
    """Base of all judges. A judge says its ``kind`` and ``identity``, and judges in :meth:`judgements`.

    Args:
        stop_after: share of failures above which :meth:`judge` gives up; 1 never does.
    """

    stop_after: float = field(default=0.5, kw_only=True)
    notes: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What it gives: a number for each answer, a preference between two, or a ranking."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Everything that a judgement depends on besides the question: what a cache is keyed by."""

    @abstractmethod
    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        """One judgement per question, in order, each as soon as it is known: what was given is not lost by a later error.

        A pointwise judge may give a :class:`Failure` for a whole question."""

    def judge(self, questions: Sequence[Question]) -> Verdicts:
        """Judge all questions; equal answers to one question are judged once.

        Raises:
            JudgeError: more than the share ``stop_after`` failed, or the judge cannot be asked at all.
            ConfigError: a pairwise judge was asked about other than two answers.
        """
        if self.kind == "pairwise" and (wrong := [q for q in questions if len(q.completions) != 2]):
            raise ConfigError(
                f"a pairwise judge compares two answers, and a question has {len(wrong[0].completions)}. Ask about pairs, "
                "or use RoundRobin, which compares each answer with each other one."
            )
        pointwise, before = self.kind == "pointwise", Counter(self.notes)
        asked = [_without_doubles(q) if pointwise else q for q in questions]
        found, size, failed = list[Judgement](), 0, list[Failure]()
        for question, judgement in zip(questions, self.judgements(asked), strict=True):
            found.append(_spread(question, judgement) if pointwise else judgement)
            size += _size(found[-1])
            failed += failures(found[-1])
            if size >= PATIENCE:
                self._stop(size, failed)
        self._stop(size, failed)
        return Verdicts(tuple(questions), tuple(found), self.notes - before)

    def _stop(self, asked: int, failed: Sequence[Failure]) -> None:
        if len(failed) > self.stop_after * asked:
            detail = f" The last one: {failed[-1].detail}" if failed[-1].detail else ""
            raise JudgeError(
                f"the judge failed on {len(failed)} of {asked} so far ({listed('', Counter(f.reason for f in failed))}), and "
                f"stop_after allows {self.stop_after:.0%}.{detail} Nothing of it was recorded as a loss, and what was judged is "
                "in the cache, where there is one. Put the judge in order and run again, or raise stop_after."
            )


def _size(judgement: Judgement) -> int:
    return len(judgement.scores) if isinstance(judgement, Scores) else 1


def _sign(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)


def listed(head: str, counts: Counter[str]) -> str:
    """``head`` and how often each of these was counted, the most frequent first; nothing where there is none."""
    return head + ", ".join(f"{n:,} × {what}" for what, n in counts.most_common()) if counts else ""


def _without_doubles(question: Question) -> Question:
    distinct: dict[str, str] = {}
    for completion in question.completions:
        distinct.setdefault(completion.strip(), completion)
    return replace(question, completions=tuple(distinct.values()))


def _spread(question: Question, judgement: Judgement) -> Scores:
    """The numbers of the different answers for all of them; what is no finite number is a failure."""
    distinct = _without_doubles(question).completions
    match judgement:
        case Failure():
            return Scores((judgement,) * len(question.completions))
        case Scores():
            known = dict(zip((c.strip() for c in distinct), map(_finite, judgement.scores), strict=True))
            return Scores(tuple(known[c.strip()] for c in question.completions))
        case Preference() | Ranks():
            raise TypeError(f"a pointwise judge gave {judgement}")


def _finite(score: float | Failure) -> float | Failure:
    ok = isinstance(score, Failure) or math.isfinite(score)
    return score if ok else Failure("the score is no finite number", f"it is {score}")
