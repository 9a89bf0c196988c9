"""A person as judge, through a file: questions are written into it, blinded, and answers are read from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any, Literal

from trimtab.errors import DataError
from trimtab.judges.base import Failure, Judge, Judgement, Preference, Question, Ranks

WAITING = "waiting for an answer"


@dataclass
class HumanJudge(Judge):
    """Questions that the file does not hold yet are added to it, a line each; those without an answer are failures for now.

    The answers A, B, ... stand in an order drawn from the seed and the question, the lines in a drawn order too, and nothing
    says which is which. In ``"answer"`` the person writes ``A > B``, ``A = B``, or ``B > A = C`` for more than two; ``A`` alone
    and ``tie`` will do for a pair. Run again with the same seed to read them.

    Args:
        file: .jsonl, made where it is not there.
        kind: ``pairwise`` for preferences between two, ``ranking`` for places of any number.
    """

    file: Path
    kind: Literal["pairwise", "ranking"] = "pairwise"
    seed: int = field(default=0, kw_only=True)

    @property
    def identity(self) -> str:
        return f"a person, {self.file.name}, {self.kind}, {self.seed}"

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        answers = self._answers()
        ids = [q.digest(self.seed).hex() for q in questions]
        new = {i: q for i, q in zip(ids, questions, strict=True) if i not in answers}
        if new:
            with self.file.open("a", encoding="utf-8") as file:
                file.write("".join(self._line(i, new[i]) for i in sorted(new)))  # by hash: a drawn order
        for i, q in zip(ids, questions, strict=True):
            yield self._judgement(q, answers.get(i, ""))

    def _answers(self) -> dict[str, str]:
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.exists() else []
        found = {}
        for number, line in enumerate(lines, start=1):
            try:
                row: Any = json.loads(line)
                found[str(row["id"])] = str(row["answer"])
            except (ValueError, KeyError, TypeError) as e:
                raise DataError(
                    f'{self.file} row {number}: it cannot be read ({e}); expected one JSON object with "id" and "answer". '
                    "Put the line in order, or delete it: its question is then asked again."
                ) from None
        if lines and not lines[-1].endswith("\n"):
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n")
        return found

    def _order(self, question: Question) -> list[int]:
        """Which completion stands under A, B, ..."""
        order = list(range(len(question.completions)))
        Random(question.digest(self.seed, "order")).shuffle(order)
        return order

    def _line(self, key: str, question: Question) -> str:
        shown = {ascii_uppercase[i]: question.completions[k] for i, k in enumerate(self._order(question))}
        row = {"id": key, "prompt": [asdict(m) for m in question.prompt], **shown, "answer": ""}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _judgement(self, question: Question, answer: str) -> Judgement:
        if not answer.strip():
            return Failure(WAITING, f'{self.file}: fill in "answer", and run again.')
        letters = ascii_uppercase[: len(question.completions)]
        groups = read_order(answer, letters)
        if groups is None:
            return Failure(
                "answer that cannot be read", f'{self.file} says "{answer}"; expected such as {" > ".join(letters)}.'
            )
        places = {x: 1 + sum(map(len, groups[:n])) for n, group in enumerate(groups) for x in group}
        ranks = [0] * len(letters)
        for letter, k in zip(letters, self._order(question), strict=True):
            ranks[k] = places[letter]
        match self.kind:
            case "ranking":
                return Ranks(tuple(ranks))
            case "pairwise":
                tie = ranks[0] == ranks[1]
                return Preference(0.5 if tie else float(ranks[0] < ranks[1]), float(tie))


def read_order(answer: str, letters: str) -> list[list[str]] | None:
    """``B > A = C`` as [[B], [A, C]], the best first; None where a letter is missing, doubled or unknown."""
    text = re.sub(r"\s", "", answer).upper()
    if len(letters) == 2:
        a, b = letters[0], letters[1]
        text = {a: f"{a}>{b}", b: f"{b}>{a}", "TIE": f"{a}={b}"}.get(text, text)
    groups = [group.split("=") for group in text.split(">")]
    return groups if sorted(x for group in groups for x in group) == sorted(letters) else None
