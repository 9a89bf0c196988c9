"""Intervals: no figure in a report stands without one.

Four cases cover what a run measures: a mean over prompts, a share of pairs, a statistic without a formula, and a gain
measured twice on the same prompts. Each returns an :class:`Interval`, which prints itself with as many digits as its
width deserves. What is resampled or counted is the *prompt*: many answers to one prompt are one observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped]

from trimtab.errors import DataError

Array = NDArray[np.float64]
_special: Any = special  # scipy ships no types


@dataclass(frozen=True)
class Interval:
    """A value, the interval around it, how many independent observations it rests on, and how it was computed.

    ``low`` and ``high`` are NaN and ``n`` is 0 where nothing is known about the spread (see :meth:`from_json`).
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95

    @property
    def bounded(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, point: float) -> bool:
        """Whether ``point`` lies outside: the only sense in which a report says "differs from"."""
        return self.bounded and (self.low > point or self.high < point)

    @property
    def decimals(self) -> int | None:
        """Decimals that give the width of the interval two digits; ``None`` where the width says nothing."""
        width = self.high - self.low
        if not (self.bounded and width > 0):
            return None
        return min(12, max(0, 1 - math.floor(math.log10(width))))

    def to_json(self) -> dict[str, Any]:
        """Plain types for ``json.dump``; an unknown bound is ``null``, because JSON has no NaN."""
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object) -> Interval | None:
        """The inverse of :meth:`to_json`, forgiving: a bare number has no bounds, anything else is ``None``."""
        if isinstance(data, Interval):
            return data
        if not isinstance(data, dict):
            value = _number(data)
            return None if math.isnan(value) else cls(value, math.nan, math.nan, 0, "")
        value, low, high = (_number(data.get(key)) for key in ("value", "low", "high"))
        if math.isnan(value):
            return None
        if low > high:
            low, high = high, low
        count, level = _number(data.get("n")), _number(data.get("level"))
        method = data.get("method")
        return cls(
            value,
            low,
            high,
            int(count) if math.isfinite(count) and count > 0 else 0,
            method if isinstance(method, str) else "",
            level if 0 < level < 1 else 0.95,
        )

    def __str__(self) -> str:
        digits = self.decimals
        form = ".3g" if digits is None else f".{digits}f"

        def show(x: float) -> str:
            return format(x, form)

        inside = [f"{show(self.low)} to {show(self.high)}"] if self.bounded else []
        inside += [f"n={self.n}"] if self.n else []
        return show(self.value) + (f" ({', '.join(inside)})" if inside else "")


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean with Student's t interval: ``mean ± t * s / sqrt(n)``, for two or more independent values."""
    x = _finite(values, "mean_interval")
    _check_level(level)
    if x.size < 2:
        raise DataError(f"mean_interval: {x.size} value(s) have no spread to measure; give at least 2.")
    mean = float(x.mean())
    half = float(_special.stdtrit(x.size - 1, (1 + level) / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half, int(x.size), "t", level)


def proportion_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Share ``successes / n`` with Wilson's interval, which stays inside [0, 1] and is not empty at 0 and at 1.

    ``successes`` may be fractional: a tie is commonly counted as half a success.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"proportion_interval: {successes} successes of {n}; expected 0 <= successes <= n and n >= 1.")
    share, z = successes / n, float(_special.ndtri((1 + level) / 2))
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exact at the ends: rounding must not push the bound past the value itself.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high, int(n), "Wilson", level)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[Any], float],
    seed: int,
    n: int = 2000,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of ``statistic(values)``; with ``clusters``, whole clusters are drawn, not single rows.

    ``values`` is resampled along its first axis, so paired columns stay together. ``clusters`` names the prompt of each
    row; the ``n`` of the result then counts prompts, since answers to one prompt are not independent.
    """
    x = _finite(values, "bootstrap_interval")
    _check_level(level)
    if n < 1:
        raise DataError(f"bootstrap_interval: n={n} resamples; give at least 1 (2000 is usual).")
    groups = _groups(clusters, len(x), "bootstrap_interval")
    if len(groups) < 2:
        raise DataError(f"bootstrap_interval: {len(groups)} independent group(s) of rows; give at least 2.")
    generator = np.random.default_rng(seed)
    draws = np.empty(n)
    for i in range(n):
        picked = generator.integers(len(groups), size=len(groups))
        draws[i] = statistic(x[np.concatenate([groups[j] for j in picked])])
    if not np.isfinite(draws).all():
        raise DataError("bootstrap_interval: the statistic is not finite on every resample; the data are too few.")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(x)), float(low), float(high), len(groups), "bootstrap", level)


def paired_gain(
    before: ArrayLike, after: ArrayLike, level: float = 0.95, clusters: Sequence[Hashable] | None = None
) -> Interval:
    """Mean of ``after - before`` over the same prompts, with the t interval of the differences.

    Pairing removes the spread between easy and hard prompts. With ``clusters``, differences are first averaged within
    each prompt; the value is then the mean over prompts and ``n`` counts prompts.
    """
    old, new = _finite(before, "paired_gain"), _finite(after, "paired_gain")
    if old.shape != new.shape:
        raise DataError(f"paired_gain: {old.size} values before and {new.size} after; they must be the same prompts.")
    gain = new - old
    if clusters is not None:
        gain = np.array([gain[rows].mean() for rows in _groups(clusters, len(gain), "paired_gain")])
    found = mean_interval(gain, level)
    return Interval(found.value, found.low, found.high, found.n, "paired t", level)


def _groups(clusters: Sequence[Hashable] | None, rows: int, caller: str) -> list[NDArray[np.intp]]:
    """Row indices of each cluster, in order of first appearance; without clusters every row is its own."""
    if clusters is None:
        return list(np.arange(rows, dtype=np.intp).reshape(-1, 1))
    if len(clusters) != rows:
        raise DataError(f"{caller}: {len(clusters)} cluster names for {rows} rows; give one name for each row.")
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(clusters):
        members.setdefault(name, []).append(row)
    return [np.array(found, dtype=np.intp) for found in members.values()]


def _finite(values: ArrayLike, caller: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise DataError(f"{caller}: {int((~np.isfinite(x)).sum())} of {x.size} values are NaN or infinite.")
    return x


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(f"level={level} is not a probability between 0 and 1; 0.95 is usual.")


def _number(data: object) -> float:
    """A finite float, or NaN for whatever is not a number."""
    if isinstance(data, bool) or not isinstance(data, int | float):
        return math.nan
    try:
        value = float(data)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan
