"""Answers of a file, judged: new feedback, and how far the judge agrees with what the file itself says of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.errors import FeedbackKindError
from trimtab.feedback.convert import Conversion
from trimtab.feedback.records import Comparison, Conversation, Demonstration, Origin, Ranking, Record, Score, Thumb
from trimtab.judges import records as judged_as
from trimtab.judges.base import Failure, Judge, Judgement, Preference, Question, Ranks, Scores, Verdicts
from trimtab.report.stats import Interval, bootstrap_interval


@dataclass(frozen=True)
class Labelled:
    """New records, what became of the rest, and the share of the file's own comparisons that the judge decides alike."""

    records: Sequence[Record]
    account: Conversion
    verdicts: Verdicts
    agreement: Interval | None
    compared: int

    def __str__(self) -> str:
        told = [str(self.verdicts), str(self.account)]
        if (a := self.agreement) is not None:
            told.append(
                f"agreement with {self.compared:,} comparisons of the file, ties of the judge counted half: {a.value:.3f} "
                f"(95 % {a.low:.3f} to {a.high:.3f}, prompts drawn)"
            )
        return "\n".join(told)


def label(records: Sequence[Record], judge: Judge, tie_band: float = 0.0) -> Labelled:
    """Ask ``judge`` about every answer in ``records``.

    A judge of pairs gives comparisons with a strength, a judge of answers scores, a judge of rankings rankings.

    Raises:
        FeedbackKindError: records without answers, or a judge of pairs where the file has none.
    """
    asked = questions(records, judge)
    verdicts = judge.judge(asked)
    made: Sequence[Record]
    match judge.kind:
        case "pairwise":
            made, account = judged_as.comparisons(verdicts, tie_band=tie_band)
        case "pointwise":
            made, account = judged_as.scores(verdicts)
        case "ranking":
            made, account = judged_as.rankings(verdicts)
    agreed, owners = _agreement(records, verdicts)
    interval = bootstrap_interval(agreed, np.mean, 0, clusters=owners) if len(set(owners)) > 1 else None
    return Labelled(made, account, verdicts, interval, len(agreed))


def questions(records: Sequence[Record], judge: Judge) -> list[Question]:
    """What the judge is asked: a pair, or all answers to a prompt; in an order that says nothing about their worth."""
    answers: dict[Conversation, dict[str, None]] = defaultdict(dict)
    origins: dict[Conversation, Origin] = {}
    pairs: list[Question] = []
    said: tuple[str, ...]
    for record in records:
        match record:
            case Comparison(prompt, chosen, rejected):
                said, origin = (chosen, rejected), record.origin
                pairs.append(_shuffled(Question(prompt, tuple(sorted(said)), origin=origin)))
            case Ranking(prompt, ranked):
                said, origin = ranked, record.origin
            case Score(prompt, completion) | Thumb(prompt, completion) | Demonstration(prompt, completion):
                said, origin = (completion,), record.origin
            case _:
                raise FeedbackKindError(
                    f"{type(record).__name__.lower()} records hold no answers that could be judged. Sample some first: `trimtab "
                    "train --judge` does both."
                )
        answers[prompt] |= dict.fromkeys(said)
        origins.setdefault(prompt, origin)
    if judge.kind == "pairwise":
        if not pairs:
            raise FeedbackKindError("a judge of pairs needs a file of comparisons. Convert it: `trimtab data convert`.")
        return pairs
    return [_shuffled(Question(p, tuple(sorted(said)), origin=origins[p])) for p, said in answers.items()]


def _shuffled(question: Question) -> Question:
    """Two answers the other way round for every second question, by its content; more stay sorted by their text."""
    turn = len(question.completions) == 2 and question.digest()[0] % 2
    return Question(question.prompt, question.completions[::-1], origin=question.origin) if turn else question


def _agreement(records: Sequence[Record], verdicts: Verdicts) -> tuple[list[float], list[Conversation]]:
    """Per comparison of the file without a tie: 1 where the judge prefers the same answer, 1/2 for neither; and its prompt."""
    found: dict[tuple[Conversation, str, str], float] = {}
    numbers: dict[tuple[Conversation, str], float] = {}
    for q, judgement in verdicts:
        numbers |= {
            (q.prompt, c): v for c, v in zip(q.completions, _numbers(q, judgement), strict=True) if v is not None
        }
        if isinstance(judgement, Preference):
            found[q.prompt, *q.completions] = judgement.first  # type: ignore[index]
    agreed, owners = [], []
    for r in records:
        if not isinstance(r, Comparison) or r.tie:
            continue
        one, other = numbers.get((r.prompt, r.chosen)), numbers.get((r.prompt, r.rejected))
        first, second = found.get((r.prompt, r.chosen, r.rejected)), found.get((r.prompt, r.rejected, r.chosen))
        if first is None and second is not None:
            first = 1 - second
        if first is None and one is not None and other is not None:
            first = 0.5 + (one > other) / 2 - (one < other) / 2
        if first is not None:
            agreed.append(float(first > 0.5) + 0.5 * (first == 0.5))
            owners.append(r.prompt)
    return agreed, owners


def _numbers(question: Question, judgement: Judgement) -> list[float | None]:
    """A number for each answer, more is better; None for what was not judged, or only against another."""
    match judgement:
        case Scores(scores):
            return [None if isinstance(s, Failure) else s for s in scores]
        case Ranks(ranks):
            return [-float(r) for r in ranks]
        case Preference() | Failure():
            return [None] * len(question.completions)
