"""XPO against arithmetic, and against DPO."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of
from trimtab.errors import ConfigError
from trimtab.objectives.dpo import DPO
from trimtab.objectives.xpo import XPO


def test_golden() -> None:
    """beta 0.5, h = 0.7: -log sigma(0.35) + 0.1 log pi(y~) with log pi(y~) = -0.4 - 0.6 = -1
    by the target's tokens: alpha each; by the pair's: as in DPO, beta sigma(-0.35)
    """
    target = completions([[-0.4, -0.6]], [[-0.3, -0.3]])
    batch, method = replace(pair(), targets=target), XPO(beta=0.5, alpha=0.1)
    assert method.loss(batch).tolist() == exactly([math.log1p(math.exp(-0.35)) - 0.1])
    slope = 0.5 / (1 + math.exp(0.35))
    found = gradient(method, batch, batch.chosen, batch.rejected, target)
    assert found == [exactly([-slope] * 2), exactly([slope] * 3), exactly([0.1, 0.1])]


def test_the_bonus_lowers_what_the_reference_says() -> None:
    """Descending the loss makes y~ less likely, whether it won or lost."""
    batch = pair()
    for side in (batch.chosen, batch.rejected):
        told = replace(batch, targets=side)
        more = gradient(XPO(alpha=0.2), told, side)[0]
        assert [m - d for m, d in zip(more, gradient(DPO(), batch, side)[0], strict=True)] == exactly([0.2] * len(more))


def test_without_a_bonus_it_is_dpo() -> None:
    batch = pairs_of([-3.0, 0.0, 0.4])
    assert close(XPO(beta=0.3, alpha=0.0).loss(batch), DPO(beta=0.3).loss(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    assert XPO(beta=1.0, alpha=0.0).loss(pairs_of([1000.0, -1000.0], dtype=dtype)).tolist() == [0.0, 1000.0]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^xpo: alpha is -1\.0; expected a number at least 0\.$"):
        XPO(alpha=-1.0)
