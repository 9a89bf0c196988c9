"""What a method may promise beyond a higher utility, as numbers that mean the same for every method.

They compare the policy with the start model on pairs of the judge's, by the log-ratio ``log pi(y|x) - log pi_0(y|x)``.
A new measure is a function in :data:`MEASURES`; every trial takes all of them, so results never depend on what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata  # type: ignore[import-untyped]

from trimtab.feedback.records import Comparison
from trimtab.logprobs.score import Scorer
from trimtab.tokens.batch import Example

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A policy at the end of its training, and what it can be measured on; ``asked``: what its prompts end in."""

    policy: Scorer
    start: Scorer
    train_pairs: Sequence[Example]
    held_out_pairs: Sequence[Example]
    asked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shift:
    """[R] log-ratios of the chosen and the rejected answers of pairs, and which pairs are ties."""

    chosen: Array
    rejected: Array
    tie: NDArray[np.bool_]

    @property
    def margin(self) -> Array:
        return self.chosen - self.rejected


def log_ratios(policy: Scorer, start: Scorer, rows: Sequence[Example], asked: tuple[int, ...]) -> list[float]:
    """``log pi(y|x, asked) - log pi_0(y|x)`` of every completion, in nats."""
    logps, lengths = policy.score_all([replace(e, prompt=(*e.prompt, *asked)) for e in rows])
    return [g.sum().item() for g in (logps - start.score_all(rows)[0]).split(lengths.tolist())]


def shift(trained: Trained, pairs: Sequence[Example]) -> Shift:
    """How far the policy has moved on these pairs, in nats."""
    sums = np.array(log_ratios(trained.policy, trained.start, pairs, trained.asked)).reshape(-1, 2)
    ties = [isinstance(e.record, Comparison) and e.record.tie for e in pairs]
    return Shift(sums[:, 0], sums[:, 1], np.array(ties, dtype=bool))


def likelihoods(held_out: Shift, train: Shift) -> dict[str, float]:
    """Mean change of the log-probability of chosen and of rejected answers in nats, and of their margin."""
    clear, seen = ~held_out.tie, ~train.tie
    return {
        "chosen_shift": float(held_out.chosen[clear].mean()),
        "rejected_shift": float(held_out.rejected[clear].mean()),
        "train_chosen_shift": float(train.chosen[seen].mean()),
        "train_rejected_shift": float(train.rejected[seen].mean()),
        "train_margin": float(train.margin[seen].mean()),
    }


def agreement(held_out: Shift, train: Shift) -> dict[str, float]:
    """Share of held-out pairs whose winner got the larger log-ratio."""
    return {"accuracy": float((held_out.margin[~held_out.tie] > 0).mean())}


def ties(held_out: Shift, train: Shift) -> dict[str, float]:
    """How well ties are told from wins by the size of the margin.

    ``tie_auc`` is P(|margin| of a tie < |margin| of a win), without a threshold. ``three_way`` is the share of pairs
    whose outcome (first, second, tie) is right where margins up to a threshold are called a tie; the threshold is the
    best one on the training pairs.
    """
    if not held_out.tie.any() or held_out.tie.all() or not train.tie.any():
        return {}
    place = rankdata(-np.abs(held_out.margin))
    n, m = int(held_out.tie.sum()), int((~held_out.tie).sum())
    auc = (place[held_out.tie].sum() - n * (n + 1) / 2) / (n * m)
    thresholds = np.abs(train.margin)
    best = max(thresholds, key=lambda t: three_way(train, float(t)))
    return {"tie_auc": float(auc), "three_way": three_way(held_out, float(best))}


def three_way(pairs: Shift, threshold: float) -> float:
    """Share of right outcomes where margins up to the threshold are called a tie."""
    called = np.abs(pairs.margin) <= threshold
    return float(np.where(pairs.tie, called, ~called & (pairs.margin > 0)).mean())


MEASURES: tuple[Callable[[Shift, Shift], dict[str, float]], ...] = (likelihoods, agreement, ties)


def measure(trained: Trained) -> dict[str, float]:
    """All measures of a trained policy."""
    held_out, train = shift(trained, trained.held_out_pairs), shift(trained, trained.train_pairs)
    return {name: value for f in MEASURES for name, value in f(held_out, train).items()}
