"""EXO on K answers against arithmetic and against EXO on pairs."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, rankings_of, together_as_apart
from trimtab.errors import ConfigError
from trimtab.objectives.exo import EXO
from trimtab.objectives.exo_list import EXOList


def test_golden() -> None:
    """The list of test_info_nca: q = softmax(0.25, -0.1, 0.05), p = softmax(2, 1, 0).
    L = sum q (log q - log p) = 0.247525177255675;  slopes 0.5 q (log q - log p - L)
    """
    batch = rankings_of([[0.5, -0.2, 0.1]], scores=[[1.0, 0.5, 0.0]])
    method = EXOList(beta=0.5, temperature=0.5)
    assert method.loss(batch).tolist() == exactly([0.247525177255675])
    assert gradient(method, batch, batch.y)[0] == exactly([-0.151685852847149, -0.0161319529622913, 0.167817805809441])


def test_rewards_that_are_the_scores_cost_nothing() -> None:
    scores = [[1.0, 0.5, 0.0], [3.0, -2.0]]
    batch = rankings_of([[2 * s for s in prompt] for prompt in scores], scores=scores)
    method = EXOList(beta=1.0, temperature=0.5)
    assert method.loss(batch).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert gradient(method, batch, batch.y)[0] == pytest.approx([0.0] * 5, abs=1e-12)


def test_at_the_reference() -> None:
    """-log K - mean log p."""
    batch = rankings_of([[0.0, 0.0]], scores=[[1.0, 0.0]])
    p = 1 / (1 + math.exp(-2))
    assert EXOList(temperature=0.5).loss(batch).item() == exactly(
        -math.log(2) - 0.5 * math.log(p) - 0.5 * math.log(1 - p)
    )


def test_two_answers_are_exo() -> None:
    """Scores tau log((1 - eps) / eps) apart say p = (1 - eps, eps)."""
    h, apart = [-3.0, 0.0, 0.4, 5.0], 0.5 * math.log(0.9 / 0.1)
    batch, pairs = rankings_of([[x / 2, -x / 2] for x in h], scores=[[apart, 0.0]] * 4), pairs_of(h)
    a, b = EXOList(beta=0.3, temperature=0.5), EXO(beta=0.3, label_smoothing=0.1)
    assert close(a.loss(batch), b.loss(pairs))
    slopes = gradient(a, batch, batch.y)[0]
    assert [slopes[::2], slopes[1::2]] == [exactly(g) for g in gradient(b, pairs, pairs.chosen, pairs.rejected)]


def test_lists_of_different_lengths() -> None:
    assert together_as_apart(EXOList())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """All of q on one answer: -log p of that one (0 and 2)."""
    batch = rankings_of([[1000.0, 0.0, -1000.0], [-1000.0, 1000.0]], scores=[[90.0, 0.0, 0.0], [1.0, 0.0]], dtype=dtype)
    assert EXOList(beta=1.0).loss(batch).tolist() == pytest.approx([0.0, 2.126928], abs=1e-6)
    assert gradient(EXOList(beta=1.0), batch, batch.y) == [[0.0] * 5]


def test_unknown_scores_are_refused() -> None:
    said, _ = EXOList().advise(rankings_of([[math.nan] * 2]))
    assert said == "2 of 2 completions have no score; exo_list needs one for each, or by: ranks"


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^exo_list: temperature is 0\.0; expected a number above 0\.$"):
        EXOList(temperature=0.0)
