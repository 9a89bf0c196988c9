"""NCA on K answers against arithmetic and against NCA on pairs."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, rankings_of, together_as_apart
from trimtab.errors import ConfigError
from trimtab.objectives.nca import NCA
from trimtab.objectives.nca_list import NCAList


def test_golden() -> None:
    """The list of test_info_nca: rewards r = 0.25, -0.1, 0.05, p = softmax(2, 1, 0).
    L = sum p softplus(-r) + sum softplus(r) / 3 = 1.35509392786718;  slopes 0.5 (sigma(r) / 3 - p sigma(-r))
    """
    batch = rankings_of([[0.5, -0.2, 0.1]], scores=[[1.0, 0.5, 0.0]])
    method = NCAList(beta=0.5, temperature=0.5)
    assert method.loss(batch).tolist() == exactly([1.35509392786718])
    assert gradient(method, batch, batch.y)[0] == exactly([-0.0519329780247379, 0.0149314584765212, 0.0634711633390787])


def test_at_the_reference() -> None:
    batch = rankings_of([[0.0] * k for k in (2, 3)], scores=[[0.3, 0.9], [0.1, 0.2, 0.3]])
    assert NCAList(temperature=0.7).loss(batch).tolist() == exactly([2 * math.log(2)] * 2)


def test_two_answers_with_sure_labels_are_nca() -> None:
    h = [-3.0, 0.0, 0.4, 5.0]
    batch, pairs = rankings_of([[x / 2, -x / 2] for x in h], scores=[[1.0, 0.0]] * 4), pairs_of(h)
    assert close(NCAList(beta=0.3).loss(batch), NCA(beta=0.3).loss(pairs))
    slopes = gradient(NCAList(beta=0.3), batch, batch.y)[0]
    assert [slopes[::2], slopes[1::2]] == [
        exactly(g) for g in gradient(NCA(beta=0.3), pairs, pairs.chosen, pairs.rejected)
    ]


def test_lists_of_different_lengths() -> None:
    """Each prompt's own K in 1/K."""
    assert together_as_apart(NCAList(temperature=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """0 + 1000 / 2, and 1000 + 1000 / 2"""
    batch = rankings_of([[1000.0, -1000.0], [-1000.0, 1000.0]], scores=[[1.0, 0.0]] * 2, dtype=dtype)
    assert NCAList(beta=1.0).loss(batch).tolist() == [500.0, 1500.0]
    assert gradient(NCAList(beta=1.0), batch, batch.y) == [[0.5, 0.0, -1.0, 0.5]]


def test_unknown_scores_are_refused() -> None:
    said, _ = NCAList().advise(rankings_of([[math.nan] * 2]))
    assert said == "2 of 2 completions have no score; nca_list needs one for each, or by: ranks"


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^nca_list: beta is 0\.0; expected a number above 0\.$"):
        NCAList(beta=0.0)
