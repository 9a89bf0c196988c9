"""Intervals of held-out quantities, rows of one prompt resampled together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.report.stats import bootstrap_interval


def held_out_intervals(
    rows: Sequence[dict[str, tuple[float, float]]], prompts: Sequence[Any], seed: int
) -> dict[str, Any]:
    """name -> interval, rows of one prompt resampled together. Thumbs get the AUC of their rewards."""
    found: dict[str, Any] = {}
    for name in sorted({k for row in rows for k in row}):
        have = [(row[name], p) for row, p in zip(rows, prompts, strict=True) if name in row and row[name][1]]
        values, clusters = np.array([v for v, _ in have]), [p for _, p in have]
        if len(set(clusters)) > 1:
            ratio = lambda x: float(x[:, 0].sum() / x[:, 1].sum())  # noqa: E731
            found[name] = bootstrap_interval(values, ratio, seed, clusters=clusters).to_json()
    up = [("rewards/chosen" in row, row) for row in rows]
    if rows and not any("rewards/margins" in row for row in rows) and {k for k, _ in up} == {True, False}:
        scored = np.array([[k, row["rewards/chosen" if k else "rewards/rejected"][0]] for k, row in up], dtype=float)
        found["rewards/auc"] = bootstrap_interval(scored, _auc, seed, clusters=list(prompts)).to_json()
    return found


def _auc(x: Any) -> float:
    """P(reward of a thumbs-up > reward of a thumbs-down), ties counted half."""
    from scipy.stats import rankdata

    up = x[:, 0] > 0
    n, m = int(up.sum()), int((~up).sum())
    if not n or not m:
        return 0.5
    return float((rankdata(x[:, 1])[up].sum() - n * (n + 1) / 2) / (n * m))
