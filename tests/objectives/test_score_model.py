"""Score regression: golden values, its scale, advice, stability."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import close, exactly, score_gradient, scored
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Scores
from trimtab.objectives.score_model import ScoreModel


def scores(given: list[list[float]], score: list[float], dtype: torch.dtype = torch.float64) -> Scores:
    return Scores(scored(given, dtype), torch.tensor(score, dtype=dtype))


def test_golden() -> None:
    """s = 0.7 at the last token, score 4, mean 3, std 2: (0.7 - 0.5)^2 = 0.04; slope 2 * 0.2 = 0.4 there, 0 before."""
    batch, method = scores([[5.0, 0.7]], [4.0]), ScoreModel(score_mean=3.0, score_std=2.0)
    assert method.loss(batch).item() == exactly(0.04)
    assert score_gradient(method, batch, batch.y) == [exactly([0.0, 0.4])]
    assert method.metrics(batch)["error/absolute"].tolist() == exactly([0.4])  # 0.2 deviations are 0.4 points


def test_nothing_moves_at_the_score() -> None:
    batch = scores([[3.0], [-1.0]], [3.0, -1.0])
    assert ScoreModel().loss(batch).tolist() == [0, 0] and score_gradient(ScoreModel(), batch, batch.y) == [[0, 0]]


def test_scale_is_only_a_scale() -> None:
    """Scores a + b z with mean a, std b are z with mean 0, std 1."""
    z, given = [0.5, -1.0, 2.0], [[0.1], [0.2], [0.3]]
    moved = scores(given, [10 + 4 * x for x in z])
    assert close(ScoreModel(score_mean=10.0, score_std=4.0).loss(moved), ScoreModel().loss(scores(given, z)))


def test_advice() -> None:
    batch = scores([[0.0]] * 4, [10.0, 12.0, 14.0, 20.0])
    refused, notes = ScoreModel().advise(batch)
    assert not refused and notes == ["scores have mean 14 and deviation 4.32: set score_mean: 14, score_std: 4.32"]
    assert ScoreModel(score_mean=14.0, score_std=4.32).advise(batch) == ("", [])
    assert "nothing to learn from" in ScoreModel().advise(scores([[0.0]] * 3, [2.0] * 3))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_1000(dtype: torch.dtype) -> None:
    batch = scores([[1000.0], [-1000.0]], [-1000.0, 1000.0], dtype)
    assert ScoreModel().loss(batch).tolist() == [4e6, 4e6]
    assert score_gradient(ScoreModel(), batch, batch.y) == [[4000.0, -4000.0]]


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"^score_model: score_std"):
        ScoreModel(score_std=0.0)
