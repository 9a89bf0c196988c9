"""InfoNCA against arithmetic and DPO, and what stands in for scores."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, rankings_of, together_as_apart
from trimtab.errors import ConfigError
from trimtab.objectives.dpo import DPO
from trimtab.objectives.info_nca import InfoNCA, worth

SCORES = [[1.0, 0.5, 0.0]]


def test_golden() -> None:
    """Scores 1, 0.5, 0 at tau 0.5: p = softmax(2, 1, 0) = 0.665241, 0.244728, 0.0900306
    beta 0.5: rewards 0.25, -0.1, 0.05: q = softmax = 0.396288, 0.279259, 0.324453
    L = -sum p log q = 1.02927574521233;  slopes 0.5 (q - p)
    """
    batch, method = rankings_of([[0.5, -0.2, 0.1]], scores=SCORES), InfoNCA(beta=0.5, temperature=0.5)
    assert method.loss(batch).tolist() == exactly([1.02927574521233])
    assert gradient(method, batch, batch.y)[0] == exactly([-0.134476598036751, 0.0172653966540171, 0.117211201382734])


def test_at_the_reference() -> None:
    """log K, whatever the scores."""
    batch = rankings_of([[0.0] * k for k in (2, 3)], scores=[[0.3, 0.9], *SCORES])
    assert InfoNCA(temperature=0.7).loss(batch).tolist() == exactly([math.log(2), math.log(3)])


def test_two_answers_with_sure_labels_are_dpo() -> None:
    h = [-3.0, 0.0, 0.4, 5.0]
    batch, pairs = rankings_of([[x / 2, -x / 2] for x in h], scores=[[1.0, 0.0]] * 4), pairs_of(h)
    for by in ("scores", "ranks"):
        assert close(InfoNCA(beta=0.3, by=by).loss(batch), DPO(beta=0.3).loss(pairs))


def test_equal_scores_share_the_label() -> None:
    """The authors' code makes the first one the better."""

    def loss(*scores: float) -> float:
        return InfoNCA(beta=1.0).loss(rankings_of([[0.5, -0.2]], scores=[scores])).item()

    assert loss(7.0, 7.0) == exactly((loss(1.0, 0.0) + loss(0.0, 1.0)) / 2)


def test_places_stand_in_for_scores() -> None:
    """(K - place)/(K - 1), place = 1 + how many are better: gaps and ties in the ranks do no harm."""
    batch = rankings_of([[0.0] * 3, [0.0] * 2, [0.0] * 4, [0.0]], [[2, 1, 9], [3, 3], [1, 2, 2, 4], [1]])
    third = 1 / 3
    assert worth(batch, "ranks").tolist() == exactly([0.5, 1, 0, 1, 1, 1, 2 * third, 2 * third, 0, 0])
    as_scores = rankings_of([[0.5, -0.2, 0.1]], scores=[[0.5, 1.0, 0.0]])
    as_ranks = rankings_of([[0.5, -0.2, 0.1]], [[2, 1, 3]])
    assert close(InfoNCA(temperature=0.5).loss(as_scores), InfoNCA(temperature=0.5, by="ranks").loss(as_ranks))


def test_lists_of_different_lengths() -> None:
    assert together_as_apart(InfoNCA(temperature=0.5)) and together_as_apart(InfoNCA(by="ranks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = rankings_of([[1000.0, 0.0, -1000.0], [-1000.0, 1000.0]], scores=[*SCORES, [1.0, 0.0]], dtype=dtype)
    assert InfoNCA(beta=1.0).loss(batch).tolist() == [0.0, 2000.0]
    assert gradient(InfoNCA(beta=1.0), batch, batch.y) == [[0.0, 0.0, 0.0, -1.0, 1.0]]


def test_unknown_scores_are_refused() -> None:
    nan = [[math.nan] * 3]
    said, _ = InfoNCA().advise(rankings_of(nan, scores=[[0.1, math.nan, 0.3]]))
    assert said == "1 of 3 completions have no score; info_nca needs one for each, or by: ranks"
    assert InfoNCA().advise(rankings_of(nan))[0].startswith("3 of 3 completions have no score")
    assert InfoNCA().advise(rankings_of(nan, scores=SCORES)) == InfoNCA(by="ranks").advise(rankings_of(nan)) == ("", [])


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^info_nca: temperature is 0\.0; expected a number above 0\.$"):
        InfoNCA(temperature=0.0)
    with pytest.raises(ConfigError, match=r'^info_nca: by is "votes"; expected one of scores, ranks\.$'):
        InfoNCA(by="votes")
