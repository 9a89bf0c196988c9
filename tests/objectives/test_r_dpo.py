"""R-DPO against arithmetic: the sign of the length."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import (
    close,
    completions,
    exactly,
    gradient,
    pair,
    pairs_of,
    random_pairs,
    same_gradient,
    shifted,
    sigma,
    softplus,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.r_dpo import RDPO


def test_golden() -> None:
    """The pair of test_dpo (2 and 3 tokens), beta 0.5, alpha 0.2:  m = 0.35 + 0.2 (2 - 3) = 0.15
    L = log(1 + e^-0.15) = 0.620957047789532;  -+0.5 sigma(-0.15) = -+0.231285077328125 by a token
    """
    batch, method = pair(), RDPO(beta=0.5, alpha=0.2)
    assert method.loss(batch).item() == exactly(0.620957047789532)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.231285077328125] * 2) and rejected == exactly([0.231285077328125] * 3)


def long_chosen() -> Pairs:
    """At the reference, the chosen 40 tokens longer."""
    w, l = [[-1.0] * 50], [[-1.0] * 10]  # noqa: E741
    return Pairs(completions(w, w), completions(l, l), torch.tensor([False]))


def test_a_longer_chosen_pulls_less() -> None:
    """At the reference m = alpha * 40: the loss is softplus(-40 alpha) < ln 2 and the pull sigma(-40 alpha) < 1/2.
    With the minus sign of the survey the longer answer would pull more: verbosity rewarded.
    """
    batch, method = long_chosen(), RDPO(beta=1.0, alpha=0.05)
    assert method.loss(batch).item() == exactly(softplus(-2.0))
    assert gradient(method, batch, batch.chosen)[0] == exactly([-sigma(-2.0)] * 50)


def test_without_alpha_or_with_equal_lengths_it_is_dpo() -> None:
    batch = random_pairs()
    for made, method in ((batch, RDPO(alpha=0.0)), (pairs_of([-2.0, 0.0, 3.0]), RDPO(alpha=0.7))):
        assert close(method.loss(made), DPO().loss(made))
        a, b = (gradient(o, made, made.chosen, made.rejected) for o in (method, DPO()))
        assert same_gradient(a, b)


def test_a_constant_per_prompt_on_both_references_changes_nothing() -> None:
    batch, by = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert close(RDPO(alpha=0.1).loss(moved), RDPO(alpha=0.1).loss(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), RDPO(beta=1.0)
    assert method.loss(batch).tolist() == [0.0, 1000.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^r_dpo: alpha is -0\.1; expected a number at least 0\.$"):
        RDPO(alpha=-0.1)
