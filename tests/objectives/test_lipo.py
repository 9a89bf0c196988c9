"""LiPO-lambda against arithmetic and DPO, and where its places come from."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, rankings_of, together_as_apart
from trimtab.errors import ConfigError
from trimtab.objectives.dpo import DPO
from trimtab.objectives.lipo import LiPO


def test_golden() -> None:
    """psi = 1, 0.5, 0; beta 0.5: rewards 0.05, 0.25, -0.1, in places 2, 1, 3, discounts log 3, log 2, log 4.
    Delta_12 = (2 - sqrt 2) |1/log 3 - 1/log 2| = 0.311905394630344
    Delta_13 = (2 - 1)      |1/log 3 - 1/log 4| = 0.188891706182356
    Delta_23 = (sqrt 2 - 1) |1/log 2 - 1/log 4| = 0.298791926152308
    L = Delta_12 softplus(0.2) + Delta_13 softplus(-0.15) + Delta_23 softplus(-0.35) = 0.525607736840051
    a pair's slope Delta sigma(r_j - r_i) pulls i up and j down; times 0.5
    """
    batch, method = rankings_of([[0.1, 0.5, -0.2]], scores=[[1.0, 0.5, 0.0]]), LiPO(beta=0.5)
    assert method.loss(batch).tolist() == exactly([0.525607736840051])
    assert gradient(method, batch, batch.y)[0] == exactly([-0.129435927827492, 0.0239904300400662, 0.105445497787425])


def test_two_answers_are_dpo_times_a_constant() -> None:
    """|2^1 - 2^0| (1/log 2 - 1/log 3), in either order of the rewards."""
    h, constant = [-3.0, 0.0, 0.4, 5.0], 1 / math.log(2) - 1 / math.log(3)
    batch, pairs = rankings_of([[x / 2, -x / 2] for x in h], scores=[[1.0, 0.0]] * 4), pairs_of(h)
    assert close(LiPO(beta=0.3).loss(batch), constant * DPO(beta=0.3).loss(pairs))
    slopes = gradient(LiPO(beta=0.3), batch, batch.y)[0]
    wanted = gradient(DPO(beta=0.3), pairs, pairs.chosen, pairs.rejected)
    assert [slopes[::2], slopes[1::2]] == [exactly([constant * x for x in g]) for g in wanted]


def test_at_the_reference_the_order_in_the_file_does_not_matter() -> None:
    """All rewards are equal: places go by the labels, so no pair has the weight 0."""
    one, other = rankings_of([[0.0] * 3], scores=[[1.0, 0.5, 0.0]]), rankings_of([[0.0] * 3], scores=[[0.0, 1.0, 0.5]])
    assert close(LiPO().loss(one), LiPO().loss(other))
    a, b = gradient(LiPO(), one, one.y)[0], gradient(LiPO(), other, other.y)[0]
    assert b == exactly([a[2], a[0], a[1]]) and a[0] < 0 < a[2]


def test_equal_labels_are_no_pair() -> None:
    batch = rankings_of([[0.3, -0.4, 2.0]], scores=[[0.5, 0.5, 0.5]])
    assert LiPO().loss(batch).tolist() == [0.0] and gradient(LiPO(), batch, batch.y) == [[0.0] * 3]


def test_ranks_stand_in_for_scores() -> None:
    a = rankings_of([[0.1, 0.5, -0.2]], scores=[[0.5, 1.0, 0.0]])
    assert close(LiPO(by="ranks").loss(rankings_of([[0.1, 0.5, -0.2]], [[2, 1, 3]])), LiPO().loss(a))


def test_lists_of_different_lengths() -> None:
    assert together_as_apart(LiPO()) and together_as_apart(LiPO(by="ranks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = rankings_of([[1000.0, 0.0, -1000.0], [-1000.0, 1000.0]], scores=[[1.0, 0.5, 0.0], [1.0, 0.0]], dtype=dtype)
    constant = 1 / math.log(2) - 1 / math.log(3)
    assert LiPO(beta=1.0).loss(batch).tolist() == pytest.approx([0.0, 2000 * constant])
    assert gradient(LiPO(beta=1.0), batch, batch.y)[0] == pytest.approx([0.0, 0.0, 0.0, -constant, constant])


def test_it_refuses_scores_that_are_unknown_or_not_from_0_to_1() -> None:
    nan = [[math.nan] * 2]
    assert LiPO().advise(rankings_of(nan))[0].startswith("2 of 2 completions have no score; lipo needs one for each")
    said, _ = LiPO().advise(rankings_of(nan, scores=[[7.0, 0.5]]))
    assert said == "scores run from 0.5 to 7; lipo weighs by 2^score and expects 0 to 1, or by: ranks"
    assert LiPO().advise(rankings_of(nan, scores=[[1.0, 0.0]])) == LiPO(by="ranks").advise(rankings_of(nan)) == ("", [])


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r'^lipo: by is "auto"; expected one of scores, ranks\.$'):
        LiPO(by="auto")
