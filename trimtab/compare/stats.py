"""Paired statistics over seeds.

A seed is one whole replicate: its own prompts, answers, judgements, order of the data and held-out prompts. So the
seeds are what is independent, and a t interval over them covers all of that. Methods are compared seed by seed, where
they share everything but the method. The bootstrap by prompt says how much of the uncertainty is due to the held-out
prompts alone; it takes the trained models as they are, and is no substitute for seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special  # type: ignore[import-untyped]

from trimtab.errors import DataError
from trimtab.report.stats import Interval, bootstrap_interval, mean_interval, paired_gain

Result = dict[str, Any]  # of one trial; lists of them are ordered by seed
Value = Callable[[Result], float]


def mean_of(name: str) -> Value:
    """The mean over held-out prompts of one of a result's quantities."""
    return lambda result: float(np.mean(result["prompts"][name]))


def gain(result: Result) -> float:
    """Mean true utility gain over the start model; minus infinity for a run that diverged."""
    if "failed" in result:
        return -math.inf
    return mean_of("utility")(result) - mean_of("utility_start")(result)


def over_seeds(results: Sequence[Result], value: Value) -> Interval:
    """Mean and t interval over seeds."""
    return mean_interval([value(r) for r in results])


def difference(ours: Sequence[Result], theirs: Sequence[Result], value: Value) -> Interval:
    """Mean of ours minus theirs, with the paired t interval over seeds."""
    return paired_gain([value(r) for r in theirs], [value(r) for r in ours])


def by_prompt(ours: Sequence[Result], theirs: Sequence[Result] | None, seed: int = 0) -> Interval:
    """The gain, or ours minus theirs, with a bootstrap over held-out prompts: the models are taken as they are."""
    rows = [np.array(r["prompts"]["utility"]) for r in ours]
    base = [np.array(r["prompts"]["utility" if theirs else "utility_start"]) for r in theirs or ours]
    gaps = np.concatenate([a - b for a, b in zip(rows, base, strict=True)])
    return bootstrap_interval(gaps, lambda x: float(x.mean()), seed)


def check_paired(results: Sequence[Result]) -> None:
    """Results of one seed begin at the same answers, or they cannot be compared: :class:`DataError`."""
    starts = {tuple(r["prompts"]["utility_start"]) for r in results if "failed" not in r}
    if len(starts) > 1:
        raise DataError(
            "Results of one seed started from different answers: they were made on different machines or with different "
            "budgets. Remove them and run all of them again."
        )


def p_value(values: Sequence[float]) -> float:
    """Two-sided p of the t test that the mean of these independent values is 0."""
    x = np.asarray(values, dtype=float)
    spread = x.std(ddof=1)
    if spread == 0:
        return 1.0 if x.mean() == 0 else 0.0
    return float(2 * special.stdtr(len(x) - 1, -abs(x.mean()) / spread * math.sqrt(len(x))))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: those below alpha may be called significant, all together wrong with P <= alpha."""
    order, adjusted, largest = np.argsort(p), [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted
