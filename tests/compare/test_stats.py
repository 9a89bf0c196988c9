"""Statistics against scipy, and Holm by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from trimtab.compare.stats import by_prompt, check_paired, difference, gain, holm, mean_of, over_seeds, p_value
from trimtab.errors import DataError

RNG = np.random.default_rng(0)


def result(after: Any, before: Any, kl: Any = (0.0,)) -> dict[str, Any]:
    return {"prompts": {"utility": list(after), "utility_start": list(before), "kl": list(kl)}}


OURS = [result(RNG.normal(1.0, 1, 40), RNG.normal(0, 1, 40), RNG.normal(2, 1, 40)) for _ in range(5)]
THEIRS = [result(RNG.normal(0.8, 1, 40), r["prompts"]["utility_start"]) for r in OURS]


def test_gain_is_the_mean_difference() -> None:
    assert gain(result([1.0, 3.0], [0.5, 0.5])) == pytest.approx(1.5)
    assert gain({"failed": "diverged"}) == -np.inf


def test_interval_over_seeds_is_students() -> None:
    values = [gain(r) for r in OURS]
    found = over_seeds(OURS, gain)
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(values), scipy_stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert over_seeds(OURS, mean_of("kl")).value == pytest.approx(np.mean([r["prompts"]["kl"] for r in OURS]))


def test_difference_is_paired() -> None:
    a, b = [gain(r) for r in OURS], [gain(r) for r in THEIRS]
    test = scipy_stats.ttest_rel(a, b)
    interval, found = test.confidence_interval(0.95), difference(OURS, THEIRS, gain)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert p_value(np.subtract(a, b)) == pytest.approx(test.pvalue)


def test_p_value() -> None:
    x = RNG.normal(0.3, 1, 12)
    assert p_value(x) == pytest.approx(scipy_stats.ttest_1samp(x, 0).pvalue)
    assert p_value([0.0, 0.0]) == 1.0
    assert p_value([1.0, 1.0]) == 0.0


def test_bootstrap_by_prompt_is_about_as_wide_as_the_normal_interval() -> None:
    found = by_prompt(OURS, THEIRS)
    gaps = np.concatenate([np.subtract(a["prompts"]["utility"], b["prompts"]["utility"]) for a, b in zip(OURS, THEIRS, strict=True)])  # fmt: skip  # noqa: E501
    assert found.value == pytest.approx(gaps.mean()) and found.n == 200
    assert found.high - found.low == pytest.approx(2 * 1.96 * scipy_stats.sem(gaps), rel=0.1)


def test_holm_by_hand() -> None:
    """Sorted: 0.01, 0.02, 0.03, 0.4. Times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.4; never below the one before."""
    assert holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.02, 0.021]) == pytest.approx([0.04, 0.04])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_keeps_its_promise() -> None:
    """Under the null, at least one of ten p-values is below 0.05 in 5 % of the families, not in 40 %."""
    families = RNG.random((2000, 10))
    raw = (families.min(1) < 0.05).mean()
    assert raw > 0.35
    assert np.mean([min(holm(list(f))) < 0.05 for f in families]) == pytest.approx(0.05, abs=0.02)


def test_results_that_do_not_belong_together_are_refused() -> None:
    check_paired([OURS[0], THEIRS[0], {"failed": "diverged"}])
    with pytest.raises(DataError, match="different answers"):
        check_paired([OURS[0], THEIRS[1]])
