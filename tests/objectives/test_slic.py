"""SLiC-HF against arithmetic: the hinge, the anchor, and what it is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of, random_pairs
from trimtab.errors import ConfigError
from trimtab.objectives.rso import RSO
from trimtab.objectives.slic import SLiC


def test_golden() -> None:
    """log pi: chosen -1.5, rejected -3.0; delta 2, lambda 0.1, no target: it is the chosen.
    L = max(0, 2 + 1.5 - 3) + 0.1 * 1.5 = 0.65; by a chosen token -1 - 0.1, by a rejected one +1.
    """
    batch, method = pair(refs=False), SLiC(delta=2.0, nll_weight=0.1)
    assert method.loss(batch).item() == exactly(0.65)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-1.1] * 2) and rejected == exactly([1.0] * 3)


def test_golden_with_a_target() -> None:
    """The same with the record's target at -0.4 - 0.8 = -1.2:  L = 0.5 + 0.1 * 1.2 = 0.62. The likelihood term
    pulls the target alone, and never the rejected (spec 35).
    """
    target = completions([[-0.4, -0.8]])
    batch, method = replace(pair(refs=False), targets=target), SLiC(delta=2.0, nll_weight=0.1)
    assert method.loss(batch).item() == exactly(0.62)
    chosen, rejected, anchor = gradient(method, batch, batch.chosen, batch.rejected, target)
    assert chosen == exactly([-1.0] * 2) and rejected == exactly([1.0] * 3) and anchor == exactly([-0.1] * 2)
    assert method.metrics(batch)["nll"].tolist() == exactly([0.4, 0.8])


def test_a_satisfied_pair_leaves_the_cross_entropy() -> None:
    """The chosen leads by 1.5 > delta = 1: the rejected gets no gradient, the loss is the likelihood term."""
    batch, method = pair(refs=False), SLiC(delta=1.0, nll_weight=0.3)
    assert method.loss(batch).item() == exactly(0.45)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.3] * 2) and rejected == [0.0] * 3


def test_equal_log_probs_cost_delta() -> None:
    """Policy = reference of one-token pairs with the same log-prob: L = delta - lambda log pi."""
    assert SLiC(delta=1.5, nll_weight=0.0).loss(pairs_of([0.0])).item() == exactly(1.5)


def test_without_anchor_and_reference_0_it_is_the_hinge_of_rso() -> None:
    """delta max(0, 1 - h/delta) = max(0, delta - h); with another reference it is not (TRL's hinge is RSO's)."""
    h = [-3.0, 0.4, 0.9, 7.0]
    slic, rso = SLiC(delta=0.8, nll_weight=0.0), RSO(gamma=1 / 0.8)
    assert close(slic.loss(pairs_of(h)), 0.8 * rso.loss(pairs_of(h)))
    assert not close(slic.loss(random_pairs()), 0.8 * rso.loss(random_pairs()), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_1000_apart(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), SLiC(delta=1.0, nll_weight=0.0)
    assert method.loss(batch).tolist() == [0.0, 1001.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


@pytest.mark.parametrize(("option", "bad", "bound"), [("delta", 0.0, "above"), ("nll_weight", -0.1, "at least")])
def test_out_of_range(option: str, bad: float, bound: str) -> None:
    with pytest.raises(ConfigError, match=rf"^slic: {option} is {bad}; expected a number {bound} 0\.$"):
        SLiC(**{option: bad})
    with pytest.raises(ConfigError, match=rf"^slic: {option} is nan"):
        SLiC(**{option: math.nan})
