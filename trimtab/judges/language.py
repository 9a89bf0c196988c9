"""A language model as judge: of pairs in both orders, or of single answers by a written or by a likelihood-weighted score."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from trimtab.errors import ConfigError
from trimtab.feedback.records import Conversation, Message
from trimtab.judges.backend import Backend, Weights, through, unreadable
from trimtab.judges.base import Failure, Judge, Judgement, Kind, Preference, Question, Scores
from trimtab.judges.prompt import (
    PROMPTS,
    SLOTS,
    JudgePrompt,
    Unusable,
    control_pattern,
    load_principles,
    load_prompt,
    neutral,
    neutral_question,
)

SCORE = re.compile(r"score:\s*[*_<\[(]*\s*(-?\d+(?:\.\d+)?)(?!\w|\.\d)", re.IGNORECASE)


@dataclass
class LanguageJudge(Judge):
    """Asks ``backend`` with ``prompt``, and reads the reply as the prompt says (:class:`JudgePrompt`).

    A pair is asked about in both orders and the probabilities are averaged (RLAIF, arXiv:2309.00267, section 3.1); where one
    order fails the pair fails, since the other alone would be biased. Options are renormalised over themselves.

    Args:
        prompt: name of a shipped prompt, or the user's own file.
        clamp: (0.4, 0.6) as in Constitutional AI: bounds of a label made after a chain of thought, and of no other.
        samples: written scores that are averaged (self-rewarding: 3).
        principles: file with a principle in each line, of which each label draws one; None for the shipped ones.
        batch: questions at a time; what was judged before an error is kept.
    """

    backend: Backend
    prompt: JudgePrompt | str | Path = "pairwise"
    clamp: tuple[float, float] | None = field(default=None, kw_only=True)
    samples: int = field(default=1, kw_only=True)
    principles: str | Path | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    batch: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        self.notes, self.control = self.backend.notes, control_pattern(self.backend.control)
        self.form = self.prompt if isinstance(self.prompt, JudgePrompt) else load_prompt(self.prompt)
        if self.principles is not None and not self.form.has_principle:
            raise ConfigError(f"principles have no effect: the prompt {self.form.name} does not name $principle.")
        self.constitution = (
            load_principles(self.principles or PROMPTS / "principles.txt") if self.form.has_principle else ("",)
        )
        if self.clamp is not None:
            low, high = self.clamp
            if not self.form.reason or self.form.kind != "pairwise":
                raise ConfigError(
                    f"clamp is for labels made after a chain of thought, and the prompt {self.form.name} asks for no reasons. "
                    "Remove it, or use a prompt with the part reason."
                )
            if not 0 <= low < high <= 1:
                raise ConfigError(f"clamp is ({low}, {high}); expected two probabilities, the lower one first.")
        if self.samples < 1 or (self.samples > 1 and (self.form.score is None or not self.backend.temperature)):
            raise ConfigError(
                f"samples is {self.samples}; more than 1 needs a written score and a temperature above 0."
            )

    @property
    def kind(self) -> Kind:
        return self.form.kind

    @property
    def identity(self) -> str:
        form, how = self.form, (self.clamp, self.samples, self.constitution, self.seed)
        return f"language model {self.backend.identity} {form.name} {form.version} {form.digest} {how}"

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        for start in range(0, len(questions), self.batch):
            part = [self._clean(q) for q in questions[start : start + self.batch]]
            yield from through(part, self._judged)

    def _clean(self, question: Question) -> Question | Failure:
        try:
            clean = neutral_question(question, self.control)
        except Unusable as e:
            return Failure(e.reason, e.detail)
        if clean != question:
            self.notes["control tokens of a chat template broken up"] += 1
        return clean

    def _judged(self, questions: list[Question]) -> list[Judgement]:
        opened = [self._opening(q, shown) for q in questions for shown in self._shown(q)]
        if self.form.options is not None:
            labels = iter(self._weigh(opened, tuple(self.form.options)))
            return [self._preference(next(labels), next(labels)) for _ in questions]
        scores = iter(self._written(opened) if self.form.score is not None else self._weighted(opened))
        return [Scores(tuple(next(scores) for _ in q.completions)) for q in questions]

    def _shown(self, question: Question) -> list[tuple[int, ...]]:
        """Which completions are shown, and where, each time that the judge is asked."""
        return [(0, 1), (1, 0)] if self.kind == "pairwise" else [(i,) for i in range(len(question.completions))]

    def _opening(self, question: Question, shown: tuple[int, ...]) -> tuple[Conversation, str]:
        drawn = int.from_bytes(question.digest(self.seed, "principle")) % len(self.constitution)
        opening, ending = self.form.ask(question, shown, self.constitution[drawn])
        return (Message("user", opening),), ending

    def _preference(self, shown_first: Weights | Failure, shown_second: Weights | Failure) -> Judgement:
        orders, tie = [], 0.0
        for given, own in ((shown_first, "first"), (shown_second, "second")):
            if isinstance(given, Failure):
                return given
            share = self._meant(given)
            orders.append(share[own] + share["tie"] / 2)
            tie += share["tie"] / 2
        first = fmean(orders)
        if self.clamp is not None:
            first = min(max(first, self.clamp[0]), self.clamp[1])
        return Preference(first, tie, (orders[0], orders[1]))

    def _meant(self, given: Weights) -> dict[str, float]:
        """What the options mean -> its probability among them."""
        assert self.form.options is not None
        share = dict.fromkeys(SLOTS, 0.0)
        for option, p in given.items():
            share[self.form.options[option]] += p / sum(given.values())
        return share

    def _weigh(self, opened: Sequence[tuple[Conversation, str]], options: Sequence[str]) -> list[Weights | Failure]:
        asked: list[Conversation | Failure] = [conversation for conversation, _ in opened]
        if self.form.reason:
            reasons = self.backend.write([conversation for conversation, _ in opened], self.seed, self._reasons)
            asked = [
                why if isinstance(why, Failure) else (*said, Message("assistant", why), Message("user", ending))
                for (said, ending), why in zip(opened, reasons, strict=True)
            ]
        return through(asked, lambda live: self.backend.weigh(live, options))

    def _weighted(self, opened: Sequence[tuple[Conversation, str]]) -> list[float | Failure]:
        assert self.form.weighted is not None
        low, high = self.form.weighted
        found = self._weigh(opened, [str(n) for n in range(low, high + 1)])
        means = [
            w if isinstance(w, Failure) else sum(int(n) * p for n, p in w.items()) / sum(w.values()) for w in found
        ]
        return [m if isinstance(m, Failure) else 2 * (m - low) / (high - low) - 1 for m in means]

    def _written(self, opened: Sequence[tuple[Conversation, str]]) -> list[float | Failure]:
        asked = [conversation for conversation, _ in opened]
        samples = [self.backend.write(asked, self.seed + k, self._score) for k in range(self.samples)]
        return [self._mean(said) for said in zip(*samples, strict=True)]

    def _mean(self, said: Sequence[float | Failure]) -> float | Failure:
        """Of the samples that could be read; the others are counted, and all of them together are a failure."""
        failed, numbers = [s for s in said if isinstance(s, Failure)], [s for s in said if not isinstance(s, Failure)]
        if not numbers:
            return failed[0]
        self.notes.update(f"sample left out: {f.reason}" for f in failed)
        return fmean(numbers)

    def _reasons(self, text: str, cut: bool) -> str:
        if not text.strip():
            raise unreadable(text)
        return neutral(text.strip(), self.control)

    def _score(self, text: str, cut: bool) -> float:
        assert self.form.score is not None
        number = read_score(text, *self.form.score)
        if cut and number is not None:
            raise Unusable(
                "reply cut before its end", f"it said: {text[-200:]}"
            )  # a score quoted on the way may not count
        if number is None:
            raise unreadable(text)
        return number


def read_score(text: str, low: float, high: float) -> float | None:
    """The number after the last ``Score:``, decimals allowed; None where there is none or it is off the scale."""
    found = SCORE.findall(text)
    number = float(found[-1]) if found else math.nan
    return number if low <= number <= high else None
