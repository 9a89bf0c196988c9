"""The world's judge, asked while answers are written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trimtab.errors import ConfigError
from trimtab.feedback.records import Message
from trimtab.judges.base import Question, Scores
from trimtab.world.asked import AskedJudge
from trimtab.world.judge import Judge

PROMPT = "The house of Mira: colour red, material brick, flower rose. What is the colour?"


def scores(judge: AskedJudge, *answers: str) -> tuple[float, ...]:
    (found,) = judge.judge([Question((Message("user", PROMPT),), answers)]).judgements
    assert isinstance(found, Scores)
    return tuple(float(s) for s in found.scores)  # type: ignore[arg-type]


def test_without_noise_it_is_the_score() -> None:
    world = Judge(temperature=0.0, length_bias=0.1)
    for answer in ("The colour is red.", "The colour is blue.", ""):
        assert scores(AskedJudge(world, 0), answer) == (world.score(PROMPT, answer),)


def test_the_larger_score_wins_as_in_the_files() -> None:
    """P(a beats b) = sigma((s_a - s_b) / temperature) over seeds; the share of 2,000 is within four standard deviations."""
    world = Judge(temperature=2.0)
    a, b = "The colour is red.", "The colour is blue."
    wins = np.mean([x > y for x, y in (scores(AskedJudge(world, seed), a, b) for seed in range(2000))])
    p = world.probabilities(world.score(PROMPT, a) - world.score(PROMPT, b), 0.0)[0]
    assert abs(wins - p) < 4 * np.sqrt(p * (1 - p) / 2000)
    assert 0.6 < p < 0.95  # a coin, or no noise, would not pass


def test_the_noise_belongs_to_the_answer() -> None:
    judge = AskedJudge(Judge(), 3)
    assert scores(judge, "Red.", "Blue.") == scores(judge, "Blue.", "Red.")[::-1]
    assert scores(judge, "Red.") != scores(replace(judge, seed=4), "Red.")
    assert judge.identity != replace(judge, seed=4).identity


@pytest.mark.parametrize("more", [{"flip": 0.1}, {"tie_rate": 0.2}, {"prompt_shift": 0.5}, {"edits": 1.0}])
def test_what_cannot_be_done_to_scores_is_refused(more: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(more))):
        AskedJudge(Judge(**more), 0)
