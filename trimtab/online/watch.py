"""Train judge against test judge: the same held-out answers under both, while the policy learns from one of them.

Early on they agree; where the first still rises and the second falls, the policy has learned to please its judge and nobody else
(over-optimisation; Bai et al., arXiv:2204.05862, whose two preference models learned from two halves of the data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.errors import ConfigError
from trimtab.feedback.records import Conversation, Message
from trimtab.judges.base import Judge, Preference, Question, Scores
from trimtab.online.kept import write_whole
from trimtab.report import Interval, mean_interval
from trimtab.tokens.batch import Example

if TYPE_CHECKING:
    from trimtab.samples import Probe

FILE = "watch.json"  # in a round's folder: the policy before that round; beside these folders: after the last round
BOTH = ("train", "test")


@dataclass
class Watch:
    """What both judges say of one sampled answer to each of the probe's prompts, always under the same noise.

    A judge of answers gives their scores, without the plan's penalties; a judge of pairs the probability that an answer beats
    the start model's to the same prompt, 1/2 where both read alike.

    Args:
        examples: among which the probe's prompts are; what is not there is a message of its own.
        folder: of the rounds.
        every: rounds from one look to the next.
        start: name of the model that training started from, for the KL.
    """

    probe: Probe
    examples: Sequence[Example]
    train: Judge
    test: Judge
    folder: Path
    every: int
    start: str
    prompts: list[Conversation] = field(init=False)

    def __post_init__(self) -> None:
        ids, opened = self.probe.template.prompt_ids, self.probe.template.opened
        known = {tuple(ids(e.record.prompt)) if opened else e.prompt: e.record.prompt for e in self.examples}
        self.prompts = [known.get(asked, (Message("user", text),)) for text, asked in self.probe.prompts]
        if len(self.prompts) < 2:
            raise ConfigError(
                f"test_judge looks at answers to held-out prompts, and there is {len(self.prompts)}. Raise samples or holdout."
            )
        for judge in (self.train, self.test):
            if judge.kind == "ranking":
                raise ConfigError(
                    "test_judge compares rounds, and a judge of rankings gives no number. Name another judge."
                )

    def look(self, after: int, learner: Any, file: Path) -> dict[str, float]:
        """Figures of the policy after so many rounds, from ``file`` where they are known; one process looks, all of them read."""
        if learner.main and not file.exists():
            with torch.random.fork_rng():  # a run that is resumed reads, and must go on as this one
                write_whole(file, json.dumps(self._seen(after, learner)))
        learner.gathered({0: None} if learner.main else {}, 1)
        seen = Seen.read(file)
        figures = {f"watch/{name}": seen.mean(name).value for name in BOTH if seen.mean(name).n}
        return {**figures, "watch/kl": seen.kl, "watch/sqrt_kl": seen.sqrt_kl}

    def _seen(self, after: int, learner: Any) -> dict[str, Any]:
        answers = self.probe.answer(learner.scorer.model)
        first = self.folder / "0001" / FILE
        start = json.loads(first.read_text())["answers"] if first.exists() else answers
        said = {
            name: self._said(judge, answers, start) for name, judge in zip(BOTH, (self.train, self.test), strict=True)
        }
        return {
            "after": after,
            "answers": answers,
            **{name: values for name, (values, _) in said.items()},
            "failed": {name: failed for name, (_, failed) in said.items()},
            "kl": self.probe.kl(answers, learner.scorer, self.start)["value"],
        }

    def _said(
        self, judge: Judge, answers: Sequence[Sequence[int]], start: Sequence[Sequence[int]]
    ) -> tuple[list[float | None], dict[str, int]]:
        """Per answer its number, None where there is none; and why not."""
        texts, before = ([self._text(a) for a in rows] for rows in (answers, start))
        if judge.kind == "pointwise":
            verdicts = judge.judge([Question(p, (a,)) for p, a in zip(self.prompts, texts, strict=True)])
            scores = [j.scores[0] if isinstance(j, Scores) else j for j in verdicts.judgements]
            return [s if isinstance(s, float) else None for s in scores], dict(verdicts.failed)
        changed = [i for i, (a, b) in enumerate(zip(texts, before, strict=True)) if a.strip() != b.strip()]
        verdicts = judge.judge([Question(self.prompts[i], (texts[i], before[i])) for i in changed])
        found: list[float | None] = [0.5] * len(texts)
        for i, judgement in zip(changed, verdicts.judgements, strict=True):
            found[i] = judgement.first if isinstance(judgement, Preference) else None
        return found, dict(verdicts.failed)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.probe.template.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Seen:
    """One look: the numbers of both judges per prompt, None where one failed, and the KL to the start model in nats."""

    after: int
    train: tuple[float | None, ...]
    test: tuple[float | None, ...]
    kl: float

    @classmethod
    def read(cls, file: Path) -> Seen:
        told = json.loads(file.read_text())
        return cls(told["after"], tuple(told["train"]), tuple(told["test"]), told["kl"])

    @property
    def sqrt_kl(self) -> float:
        """In which both judges' scores are close to linear early on; an estimate below 0 counts as 0."""
        return math.sqrt(max(self.kl, 0.0))

    def mean(self, name: str) -> Interval:
        """Mean and its 95 % interval over prompts; without bounds where fewer than two answers were judged."""
        values = [v for v in getattr(self, name) if v is not None]
        if len(values) > 1:
            return mean_interval(values)
        return Interval(values[0] if values else math.nan, math.nan, math.nan, len(values), "")


def looks(folder: Path) -> list[Seen]:
    """All looks of a run's rounds in order."""
    return sorted((Seen.read(f) for f in (*folder.glob(f"*/{FILE}"), *folder.glob(FILE))), key=lambda s: s.after)


def divergence(seen: Sequence[Seen]) -> int | None:
    """After how many rounds the judges first part: the train judge's mean is above what it was at the test judge's best, and
    the test judge's interval lies below that best. None where they do not."""
    seen = [s for s in seen if s.mean("train").n and s.mean("test").n]
    for i, now in enumerate(seen):
        best = max(seen[: i + 1], key=lambda s: s.mean("test").value)
        if now.mean("train").value > best.mean("train").value and now.mean("test").high < best.mean("test").value:
            return now.after
    return None


def account(seen: Sequence[Seen]) -> dict[str, Any]:
    """What the run card says of them."""
    rows = [
        {"after": s.after, **{n: s.mean(n).to_json() for n in BOTH}, "kl": s.kl, "sqrt_kl": s.sqrt_kl} for s in seen
    ]
    return {"looks": rows, "divergence": divergence(seen)}


def in_words(seen: Sequence[Seen]) -> str:
    """One line of it."""
    first, last, at = seen[0], seen[-1], divergence(seen)
    moved = "; ".join(f"{n} judge {first.mean(n)} -> {last.mean(n)}" for n in BOTH)
    part = "the two do not part" if at is None else f"they part after round {at}: the policy pleases its judge alone"
    return f"watch: {moved}; sqrt(KL) {last.sqrt_kl:.3g}; {part}"
