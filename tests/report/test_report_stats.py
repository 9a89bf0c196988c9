"""Intervals against values worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trimtab.errors import DataError, TrimtabError
from trimtab.report.stats import Interval, bootstrap_interval, mean_interval, paired_gain, proportion_interval

T_1, T_2 = 12.706204736, 4.302652730  # the 97.5 % points of Student's t with 1 and 2 degrees of freedom


def test_mean_interval_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, standard error 1 / sqrt(3)."""
    found = mean_interval([1, 2, 3])
    assert (found.value, found.n, found.method) == (2, 3, "t")
    assert found.high - 2 == pytest.approx(T_2 / math.sqrt(3), rel=1e-9)
    assert 2 - found.low == pytest.approx(T_2 / math.sqrt(3), rel=1e-9)


def test_mean_interval_narrows_with_a_lower_level() -> None:
    wide, narrow = mean_interval([1, 2, 3]), mean_interval([1, 2, 3], level=0.5)
    # t(0.75, 2 degrees of freedom) is sqrt(2/3) by the closed form t = (2p-1) / sqrt(2p(1-p)).
    assert narrow.high - 2 == pytest.approx(math.sqrt(2 / 3) / math.sqrt(3), rel=1e-9)
    assert narrow.high < wide.high
    assert narrow.level == 0.5


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (5, 10, 0.236593, 0.763407),  # z^2 = 3.841459; centre 1/2
        (0, 10, 0.0, 3.841459 / 13.841459),  # z^2 / (n + z^2)
        (10, 10, 10 / 13.841459, 1.0),
        (1, 1, 1 / 4.841459, 1.0),
    ],
)
def test_wilson_by_hand(successes: int, n: int, low: float, high: float) -> None:
    found = proportion_interval(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-6)
    assert found.value == successes / n
    assert found.low <= found.value <= found.high


def test_wilson_counts_a_tie_as_half() -> None:
    assert proportion_interval(2.5, 5).value == 0.5
    assert proportion_interval(2.5, 5).low == pytest.approx(1 - proportion_interval(2.5, 5).high)


def test_paired_gain_by_hand() -> None:
    """Gains 1, 1, 4: mean 2, s = sqrt(3), standard error 1."""
    found = paired_gain([0, 10, -5], [1, 11, -1])
    assert (found.value, found.n, found.method) == (2, 3, "paired t")
    assert (found.low, found.high) == pytest.approx((2 - T_2, 2 + T_2), rel=1e-9)


def test_paired_gain_counts_prompts_not_answers() -> None:
    """Prompt a gains 0 and 2, prompt b gains 3: prompt means 1 and 3, s = sqrt(2), standard error 1."""
    found = paired_gain([0, 0, 0], [0, 2, 3], clusters=["a", "a", "b"])
    assert (found.value, found.n) == (2, 2)
    assert found.high - 2 == pytest.approx(T_1, rel=1e-9)


def test_pairing_removes_the_spread_between_prompts() -> None:
    before = np.array([0.0, 100.0, -50.0, 7.0])
    assert paired_gain(before, before + 1).low == pytest.approx(1)
    assert not mean_interval(before + 1).excludes(0)


def test_bootstrap_of_two_values_by_hand() -> None:
    """Of 0 and 1 the resampled mean is 0, 1/2 or 1, each extreme with probability 1/4."""
    found = bootstrap_interval([0, 1], np.mean, seed=0)
    assert (found.value, found.low, found.high, found.n, found.method) == (0.5, 0, 1, 2, "bootstrap")


def test_bootstrap_draws_whole_clusters() -> None:
    """Every row five times over is no new evidence: the interval stays exactly that of the single rows."""
    values = np.arange(20.0) ** 1.5
    once = bootstrap_interval(values, np.median, seed=3, n=300)
    five = bootstrap_interval(np.repeat(values, 5), np.median, seed=3, n=300, clusters=list(np.repeat(range(20), 5)))
    naive = bootstrap_interval(np.repeat(values, 5), np.median, seed=3, n=300)
    assert (five.low, five.high, five.n) == (once.low, once.high, 20)
    assert naive.high - naive.low < five.high - five.low


def test_bootstrap_keeps_rows_together_and_repeats_itself() -> None:
    pairs = np.array([[1.0, 2.0], [2.0, 4.0], [5.0, 10.0]])
    ratio = bootstrap_interval(pairs, lambda x: float(x[:, 1].sum() / x[:, 0].sum()), seed=1, n=200)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert bootstrap_interval([1, 5, 9, 2], np.mean, seed=7) == bootstrap_interval([1, 5, 9, 2], np.mean, seed=7)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = sum(
        not bootstrap_interval(generator.normal(3, 1, size=40), np.mean, seed=i, n=200).excludes(3) for i in range(200)
    )
    assert 176 <= hits <= 198  # 190 expected


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([1.0]),
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, math.nan]),
        lambda: mean_interval([1, 2], level=95),
        lambda: proportion_interval(3, 2),
        lambda: proportion_interval(-1, 2),
        lambda: proportion_interval(0, 0),
        lambda: paired_gain([1, 2], [1]),
        lambda: bootstrap_interval([1, 2], np.mean, seed=0, clusters=["a"]),
        lambda: bootstrap_interval([1, 2], np.mean, seed=0, clusters=["a", "a"]),
        lambda: bootstrap_interval([1, 2], np.mean, seed=0, n=0),
    ],
)
def test_what_has_no_interval_is_refused(call: object) -> None:
    with pytest.raises(DataError) as caught:
        call()  # type: ignore[operator]
    assert isinstance(caught.value, TrimtabError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.21, 0.12, 0.30, 60, "t"), "0.21 (0.12 to 0.30, n=60)"),
        (Interval(45.32, 44.7, 45.94, 9, "t"), "45.3 (44.7 to 45.9, n=9)"),
        (Interval(412.0, 380.0, 444.0, 9, "t"), "412 (380 to 444, n=9)"),
        (Interval(-0.0123, -0.0140, -0.0106, 0, "t"), "-0.0123 (-0.0140 to -0.0106)"),
        (Interval(0.5, math.nan, math.nan, 8, ""), "0.5 (n=8)"),
        (Interval(0.5, math.nan, math.nan, 0, ""), "0.5"),
    ],
)
def test_printing_gives_the_digits_the_width_deserves(interval: Interval, text: str) -> None:
    assert str(interval) == text


def test_json_there_and_back() -> None:
    first = mean_interval([1.0, 2.0, 4.0])
    assert Interval.from_json(json.loads(json.dumps(first.to_json()))) == first
    bare = Interval.from_json(0.5)
    assert bare is not None
    assert not bare.bounded
    assert not bare.excludes(0)
    assert json.loads(json.dumps(bare.to_json(), allow_nan=False))["low"] is None


@pytest.mark.parametrize("junk", [None, "0.5", True, [1], {}, {"value": None}, {"value": "x"}, math.nan, 10**400])
def test_from_json_takes_no_junk(junk: object) -> None:
    assert Interval.from_json(junk) is None
