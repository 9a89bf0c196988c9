"""RRHF against arithmetic, and which pairs it looks at."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import exactly, gradient, rankings, rankings_of, together_as_apart
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rankings
from trimtab.objectives.rrhf import RRHF


def three(*ranks: int) -> Rankings:
    """Mean log-probs -1.5, -0.5, -2.2; sums -3, -0.5, -6.6."""
    return rankings([[[-1.0, -2.0], [-0.5], [-3.0, -3.0, -0.6]]], [ranks or (1, 2, 3)])


@pytest.mark.parametrize(("nll", "loss", "token"), [("sequence_sum", 5.0, -2.0), ("sequence_mean", 3.5, -1.5)])
def test_golden(nll: str, loss: float, token: float) -> None:
    """One pair is in the wrong order: s_2 - s_1 = 1.  L = 2 * 1 + 3 (the sum; the mean is 1.5)
    by a token of the first: -2/2 - 1 (the mean: -1/2); of the second +2; of the third 0
    """
    batch, method = three(), RRHF(rank_weight=2.0, nll_normalise=nll)
    assert method.loss(batch).item() == exactly(loss)
    assert gradient(method, batch, batch.y)[0] == exactly([token, token, 2.0, 0.0, 0.0, 0.0])


def test_length_penalty() -> None:
    """p = 0: sums -3, -0.5, -6.6; one hinge of 2.5.  p = 2: -0.75, -0.5, -0.7333; the third is above the first too."""
    assert RRHF(length_penalty=0.0).loss(three()).item() == exactly(2.5 + 3)
    assert RRHF(length_penalty=2.0).loss(three()).item() == exactly(0.25 + (0.75 - 6.6 / 9) + 3)


def test_the_best_shares_where_ranks_are_equal() -> None:
    """Ranks 1, 1, 2: no pair of the first two, likelihood (3 + 0.5) / 2; ranks that start at 2 mean the same."""
    assert RRHF().loss(three(1, 1, 2)).item() == RRHF().loss(three(2, 2, 5)).item() == exactly(1.75)


def test_in_order_there_is_only_likelihood() -> None:
    assert RRHF().loss(three(2, 1, 3)).item() == exactly(0.5)


def test_every_prompt_has_its_own_best() -> None:
    """The authors' code takes the first prompt's."""
    batch = rankings_of([[-1.0, -2.0], [-3.0, -4.0]], [[1, 2], [1, 2]])
    assert RRHF().loss(batch).tolist() == exactly([1.0, 3.0])
    assert together_as_apart(RRHF())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_1000_apart(dtype: torch.dtype) -> None:
    batch = rankings_of([[0.0, -1000.0], [-1000.0, 0.0]], dtype=dtype)
    assert RRHF().loss(batch).tolist() == [0.0, 2000.0]
    assert gradient(RRHF(), batch, batch.y) == [[-1.0, 0.0, -2.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^rrhf: length_penalty is -1\.0; expected a number at least 0\.$"):
        RRHF(length_penalty=-1.0)
