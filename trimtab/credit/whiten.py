"""Whitening: the numbers of a whole batch on one scale, whatever the judge's unit is."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def whiten(values: Tensor, deviation: Literal["sample", "population"] = "population", epsilon: float = 1e-8) -> Tensor:
    """[N] -> [N]: ``(x - mean) / sqrt(var + epsilon)``, one mean and one variance for all of them.

    Numbers that are all alike, a single one included, become exactly 0.

    Args:
        deviation: the variance divides by N (``population``: OpenAI, OpenRLHF) or by N - 1 (``sample``: verl).
        epsilon: added to the variance, so in the square of the values' unit.
    """
    if not len(values):
        return values
    above = values - values.min()  # numbers alike are exactly 0 above the least of them, and not above their mean
    gap = above - above.mean()
    freedom = len(values) if deviation == "population" else max(len(values) - 1, 1)
    return gap * ((gap**2).sum() / freedom + epsilon).rsqrt()


def rescaled(
    values: Tensor, deviation: Literal["sample", "population"] = "population", epsilon: float = 1e-8
) -> Tensor:
    """[N] -> [N]: whitened around their own mean, which stays: only the scale changes (rewards, arXiv:1909.08593's code)."""
    return whiten(values, deviation, epsilon) + values.mean()
