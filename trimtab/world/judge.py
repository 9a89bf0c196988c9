"""Judges: feedback whose noise, ties, biases and gaps are parameters, drawn from the true utility.

A judge sees the score ``s = u + length_bias * words`` of an answer and feels ``z = s + temperature * Gumbel noise``.
One draw of z serves pairs, rankings, scores and demonstrations: they are views of one judgement, the thumbs of another.

- Of two answers the larger z wins, which is the Bradley-Terry model ``P(a beats b) = sigma((s_a - s_b) / temperature)``.
- Two answers whose z differ by no more than ``band`` are a tie: the Rao-Kupper model,
  ``P(a beats b) = sigma((s_a - s_b - band) / temperature)``. The band follows from the ``tie_rate`` that is asked for.
- Answers sorted by z are a Plackett-Luce ranking, and z their scores; a pair's strength is the difference of its z.
- A thumb goes up where ``s + temperature * logistic noise`` is above the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from trimtab.errors import ConfigError
from trimtab.feedback.records import Comparison, Demonstration, Message, Origin, Ranking, Record, Score, Thumb
from trimtab.world.grammar import ATTRIBUTES, read_prompt, swap_claim
from trimtab.world.utility import utility, word_count

Array = NDArray[np.float64]
Judged = Sequence[tuple[str, Sequence[str]]]  # prompts, each with the answers to it
KINDS = tuple(ATTRIBUTES)
PRAISED = KINDS[: len(KINDS) // 2]  # prompts that prompt_shift gives the thumbs up to; the others get the thumbs down


@dataclass(frozen=True)
class Judge:
    """How feedback is made out of the true utility.

    Attributes:
        temperature: of the Bradley-Terry noise; 0 prefers the better answer always (equal ones: the first).
        tie_rate: expected share of comparisons that are ties.
        flip: probability that a comparison or a thumb is turned round, a ranking reversed.
        length_bias: what each word adds to the judge's score.
        threshold: score above which a thumb goes up; None is the median over all answers judged.
        prompt_shift: selection of thumbs by prompt: the share of thumbs up on the second half of the kinds of prompt,
            and of thumbs down on the first half, that is lost.
        keep_desirable: share of the thumbs up that is kept.
        edits: share of the pairs whose second answer is the first with one word changed.
    """

    temperature: float = 1.0
    tie_rate: float = 0.0
    flip: float = 0.0
    length_bias: float = 0.0
    threshold: float | None = None
    prompt_shift: float = 0.0
    keep_desirable: float = 1.0
    edits: float = 0.0

    def __post_init__(self) -> None:
        bounds = {
            "tie_rate": (0, 0.95),
            "flip": (0, 1),
            "prompt_shift": (0, 1),
            "keep_desirable": (0, 1),
            "edits": (0, 1),
        }
        for name, (low, high) in (bounds | {"temperature": (0, np.inf), "length_bias": (-np.inf, np.inf)}).items():
            if not low <= getattr(self, name) <= high or not np.isfinite(getattr(self, name)):
                raise ConfigError(f"judge: {name} is {getattr(self, name)}; expected {low} to {high}.")

    def feedback(self, kind: type[Record], judged: Judged, seed: int) -> list[Record]:
        """Records of this kind about these answers."""
        views: dict[type[Record], Any] = {
            Comparison: self.pairs,
            Demonstration: self.demonstrations,
            Ranking: self.rankings,
            Score: self.scores,
            Thumb: self.thumbs,
        }
        if kind not in views:
            raise ConfigError(f"a judge gives no records of kind {kind.__name__.lower()}.")
        return list(views[kind](judged, seed))

    # --- the views ----------------------------------------------------------------------------------------------------

    def pairs(self, judged: Judged, seed: int) -> list[Comparison]:
        """The first answer to a prompt against the second, the third against the fourth, and so on.

        Two answers of the same words are no pair.
        """
        rows = self._couples(judged, seed)
        scores = np.array([[self.score(p, a), self.score(p, b)] for p, a, b, _ in rows]).reshape(-1, 2)
        felt = scores + self.temperature * np.array([noise for *_, noise in rows]).reshape(-1, 2)
        band, turned = self.band(scores[:, 0] - scores[:, 1]), _draws("flip pairs", seed, len(rows)) < self.flip
        found = []
        for i, (prompt, a, b, _) in enumerate(rows):
            gap = float(felt[i, 0] - felt[i, 1])
            tie = abs(gap) <= band if self.tie_rate else False
            first = tie or (gap >= 0) != bool(turned[i])
            said = (a, b) if first else (b, a)
            found.append(Comparison(_said(prompt), *said, tie=tie, strength=abs(gap), origin=_origin(i)))
        return found

    def demonstrations(self, judged: Judged, seed: int) -> list[Demonstration]:
        """The winner of every pair that has one."""
        pairs = [p for p in self.pairs(judged, seed) if not p.tie]
        return [Demonstration(p.prompt, p.chosen, origin=p.origin) for p in pairs]

    def rankings(self, judged: Judged, seed: int) -> list[Ranking]:
        """All answers to a prompt: the place is 1 plus the number of answers that are better by more than the band.

        Scores are between 0 and 1: sigma of z minus the median z of all answers.
        """
        felt, band = self._felt(judged, seed)
        middle = np.median(np.concatenate(felt)) if felt else 0.0
        found = []
        for i, ((prompt, answers), z) in enumerate(zip(judged, felt, strict=True)):
            ranks = tuple(1 + int((z > own + band).sum()) for own in z)
            scores = tuple(expit(z - middle).tolist())
            found.append(Ranking(_said(prompt), tuple(answers), ranks, scores, origin=_origin(i)))
        return found

    def scores(self, judged: Judged, seed: int) -> list[Score]:
        """z of every answer, brought to mean 0 and deviation 1 over all of them."""
        felt = np.concatenate(self._felt(judged, seed)[0])
        rows = [(prompt, answer) for prompt, answers in judged for answer in answers]
        scaled = ((felt - felt.mean()) / felt.std()).tolist()
        return [Score(_said(p), a, z, origin=_origin(i)) for i, ((p, a), z) in enumerate(zip(rows, scaled, strict=True))]

    def thumbs(self, judged: Judged, seed: int) -> list[Thumb]:
        """A thumb for every answer, as far as the selection lets it through."""
        rows = [(prompt, answer) for prompt, answers in judged for answer in answers]
        scores = np.array([self.score(p, a) for p, a in rows])
        threshold = float(np.median(scores)) if self.threshold is None else self.threshold
        u = _draws("thumbs", seed, len(rows))
        up = scores - threshold + self.temperature * (np.log(u) - np.log1p(-u)) > 0
        up ^= _draws("flip thumbs", seed, len(rows)) < self.flip
        praised = np.array([read_prompt(p).kind in PRAISED for p, _ in rows])
        kept = (up == praised) | (_draws("shift", seed, len(rows)) >= self.prompt_shift)
        kept &= ~up | (_draws("keep", seed, len(rows)) < self.keep_desirable)
        return [
            Thumb(_said(rows[i][0]), rows[i][1], bool(up[i]), origin=_origin(i)) for i in np.flatnonzero(kept).tolist()
        ]

    # --- the model behind them ------------------------------------------------------------------------------------------

    def score(self, prompt: str, answer: str) -> float:
        """What the judge sees: the true utility and the bias."""
        return utility(prompt, answer) + self.length_bias * word_count(answer)

    def probabilities(self, gaps: Any, band: float) -> tuple[Array, Array, Array]:
        """P(first wins), P(second wins), P(tie) for differences ``s_first - s_second``, before any label is flipped."""
        x = np.asarray(gaps, dtype=float)
        if self.temperature == 0:
            first, second = (x > band).astype(float), (-x > band).astype(float)
        else:
            first, second = expit((x - band) / self.temperature), expit((-x - band) / self.temperature)
        return first, second, 1 - first - second

    def band(self, gaps: Array) -> float:
        """Half the width of the band of ties that gives these differences the expected share ``tie_rate``."""
        if not self.tie_rate or not len(gaps):
            return 0.0
        if self.temperature == 0:
            return float(np.quantile(np.abs(gaps), self.tie_rate, method="higher"))
        excess = lambda band: float(self.probabilities(gaps, band)[2].mean()) - self.tie_rate  # noqa: E731
        widest = float(np.abs(gaps).max()) + 10 * self.temperature
        return float(brentq(excess, 0.0, widest))

    def _felt(self, judged: Judged, seed: int) -> tuple[list[Array], float]:
        """z of the answers to every prompt, turned round where the judge's list is, and the band of ties among them."""
        scores = [np.array([self.score(p, a) for a in answers]) for p, answers in judged]
        noise = _gumbel([len(s) for s in scores], seed)
        band = self.band(np.array([s[i] - s[j] for s in scores for i in range(len(s)) for j in range(i)]))
        signs = np.where(_draws("flip rankings", seed, len(scores)) < self.flip, -1, 1)
        return [(s + self.temperature * n) * sign for s, n, sign in zip(scores, noise, signs, strict=True)], band

    def _couples(self, judged: Judged, seed: int) -> list[tuple[str, str, str, tuple[float, float]]]:
        """Prompt, two answers to it, the noise of either."""
        noise = _gumbel([len(answers) for _, answers in judged], seed)
        edited = iter(_draws("edits", seed, sum(len(answers) // 2 for _, answers in judged)) < self.edits)
        rng, found = Random(f"edits {seed}"), []
        for (prompt, answers), felt in zip(judged, noise, strict=True):
            for k in range(0, len(answers) - 1, 2):
                a, b = answers[k], answers[k + 1]
                if next(edited):
                    b = swap_claim(read_prompt(prompt), a, rng) or b
                if a != b:
                    found.append((prompt, a, b, (float(felt[k]), float(felt[k + 1]))))
        return found


def _draws(purpose: str, seed: int, n: int) -> Array:
    """Uniform numbers in (0, 1), a stream of its own for every purpose."""
    generator = np.random.default_rng([seed, *purpose.encode()])
    return np.maximum(generator.random(n), 1e-300)


def _gumbel(sizes: Sequence[int], seed: int) -> list[Array]:
    noise = -np.log(-np.log(_draws("feeling", seed, sum(sizes))))
    return np.split(noise, np.cumsum(sizes)[:-1]) if sizes else []


def _said(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


def _origin(row: int) -> Origin:
    return Origin("controlled world", row + 1)
