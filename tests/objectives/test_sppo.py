"""SPPO against arithmetic and against TRL's sppo_hard."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, shifted
from tests.objectives.test_dno import strong
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.sppo import SPPO


def test_golden_hard() -> None:
    """The pair of test_dpo: log-ratios 0.5 and -0.2. beta 0.5: targets +-(1 - 1/2)/0.5 = +-1.
    L = 1/2 [(0.5 - 1)^2 + (-0.2 + 1)^2] = 1/2 [0.25 + 0.64] = 0.445;  slopes 0.5 - 1 = -0.5 and -0.2 + 1 = 0.8
    """
    batch, method = pair(), SPPO(beta=0.5)
    assert method.loss(batch).item() == exactly(0.445)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.5] * 2) and rejected == exactly([0.8] * 3)


@pytest.mark.parametrize(("meaning", "strength"), [("probability", 0.7), ("reward_difference", math.log(7 / 3))])
def test_golden_soft(meaning: str, strength: float) -> None:
    """P_w = 0.7, P_l = 0.3: targets +-0.4.  L = 1/2 [0.1^2 + 0.2^2] = 0.025;  slopes 0.1 and 0.2"""
    batch, method = strong(pair(), strength), SPPO(beta=0.5, strength=meaning)
    assert method.loss(batch).item() == exactly(0.025)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.1] * 2) and rejected == exactly([0.2] * 3)


def test_at_the_reference() -> None:
    """0.25 / beta^2 = 250 000 at the authors' beta."""
    assert SPPO().loss(pairs_of([0.0])).item() == exactly(250_000.0)


def test_trl_leaves_out_the_half() -> None:
    """sppo_hard: (lr_w - 0.5/beta)^2 + (lr_l + 0.5/beta)^2 = twice the default, the same at factor 1."""
    batch = random_pairs()
    trl = (batch.chosen.log_ratio - 0.5 / 0.01) ** 2 + (batch.rejected.log_ratio + 0.5 / 0.01) ** 2
    assert close(SPPO(beta=0.01).loss(batch) * 2, trl) and close(SPPO(beta=0.01, factor=1.0).loss(batch), trl)


def test_a_constant_on_both_references_matters() -> None:
    batch, by = random_pairs(), torch.ones(7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert not close(SPPO(beta=0.1).loss(moved), SPPO(beta=0.1).loss(batch), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Targets +-1: 1/2 (499^2 + 499^2), 1/2 (501^2 + 501^2)."""
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), SPPO(beta=0.5)
    assert method.loss(batch).tolist() == [249001.0, 251001.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[499.0, -501.0], [-499.0, 501.0]]


def test_it_asks_for_strengths_only_where_it_uses_them() -> None:
    batch = pairs_of([math.nan])
    assert SPPO().advise(batch) == ("", [])
    assert (
        SPPO(strength="probability")
        .advise(batch)[0]
        .startswith("1 of 1 comparisons have no strength; sppo needs one for each")
    )


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^sppo: factor is 0\.0; expected a number above 0\.$"):
        SPPO(factor=0.0)
