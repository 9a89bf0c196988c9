"""Each answer against each other one: a pairwise judge that gives every answer a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from trimtab.errors import ConfigError
from trimtab.judges.base import Failure, Judge, Judgement, Preference, Question, Scores


@dataclass
class RoundRobin(Judge):
    """The score of an answer is its mean probability of winning, over the other answers to the same prompt (K > 1).

    With the answer itself as an opponent (P = 1/2; SPPO, arXiv:2405.00675) it is ((K - 1) score + 1/2) / K. A comparison that
    failed is left out of both means and counted; an answer without any has failed.

    Args:
        only_last: compare with the last answer only, which the others are to beat (Nash-MD's mixture).
    """

    inner: Judge
    only_last: bool = False
    kind = "pointwise"

    def __post_init__(self) -> None:
        if self.inner.kind != "pairwise":
            raise ConfigError(
                f"RoundRobin compares answers in pairs, and this judge is {self.inner.kind}. Use it as it is."
            )
        self.stop_after, self.notes = self.inner.stop_after, self.inner.notes

    @property
    def identity(self) -> str:
        return f"{'the last one against' if self.only_last else 'round robin of'} {self.inner.identity}"

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        places = [
            [(i, j) for i, j in combinations(range(n), 2) if j == n - 1 or not self.only_last]
            for n in (len(q.completions) for q in questions)
        ]
        pairs = [
            replace(q, completions=(q.completions[i], q.completions[j]))
            for q, part in zip(questions, places, strict=True)
            for i, j in part
        ]
        found = self.inner.judgements(pairs)
        for q, part in zip(questions, places, strict=True):
            won: list[list[float]] = [[] for _ in q.completions]
            failed = Failure("there is no other answer to compare it with")
            for i, j in part:
                match next(found):
                    case Preference(first):
                        won[i].append(first)
                        won[j].append(1 - first)
                    case Failure() as failed:
                        self.notes[f"comparison left out of a round robin: {failed.reason}"] += 1
                    case other:
                        raise TypeError(f"a pairwise judge gave {other}")
            yield Scores(tuple(sum(w) / len(w) if w else failed for w in won))
