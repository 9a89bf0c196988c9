"""DAPO against arithmetic: the higher clip, and tokens as the unit."""

from __future__ import annotations

import math

import pytest

from tests.objectives.by_hand import credited, exactly, gradient, rollouts
from tests.objectives.test_grpo import BEHAVIOUR, REFERENCE, A, moved, with_advantages
from trimtab.config import run_options
from trimtab.errors import ConfigError
from trimtab.objectives.dapo import DAPO
from trimtab.objectives.grpo import GRPO


def test_golden() -> None:
    """A = +-1/2 / (sqrt(1/2) + 1e-4);  ratios e^0.1, e^0.3 -> 1.28 and e^-0.3 -> 0.8, e^0.2, 1.
    L = -A (e^0.1 + 1.28 - 0.8 - e^0.2 - 1), over 5 tokens
    """
    batch = moved(DAPO())
    assert DAPO().loss(batch).tolist() == exactly([-A * (math.exp(0.1) + 1.28 - 0.8 - math.exp(0.2) - 1)])
    assert gradient(DAPO(), batch, batch.y)[0] == exactly([-A * math.exp(0.1), 0.0, 0.0, A * math.exp(0.2), A])
    assert DAPO().size(batch).tolist() == [5.0]
    assert DAPO().metrics(batch)["clip_ratio/high_mean"].tolist() == [0, 1, 0, 0, 0]
    assert DAPO().metrics(batch)["clip_ratio/low_mean"].tolist() == [0, 0, 1, 0, 0]


def test_there_is_more_room_upwards() -> None:
    """A good token at 1.25 times its old probability still has a gradient, where GRPO has none; at 1.29 neither has."""
    for by, room in ((1.25, True), (1.29, False)):
        policy = [[-0.5 + math.log(by), -1.0], [-2.0, -0.6, -0.3]]
        for method, free in ((DAPO(), room), (GRPO(beta=0.0), False)):
            batch = credited(method, rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE), policy)
            assert (gradient(method, batch, batch.y)[0][0] < 0) is free


def test_every_token_counts_the_same() -> None:
    """On-policy: by each token -A, whatever the answer's length; the loss is minus the advantages of all tokens."""
    batch = with_advantages(credited(DAPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]], REFERENCE)), 0.9, -0.2)
    assert DAPO().loss(batch).tolist() == exactly([-(2 * 0.9 - 3 * 0.2)])
    assert gradient(DAPO(), batch, batch.y)[0] == exactly([-0.9, -0.9, 0.2, 0.2, 0.2])


def test_the_mean_is_over_the_tokens_of_all_prompts() -> None:
    """Prompts with 2 + 3 and 1 + 1 tokens: 5 and 2 in one denominator, not one mean for each prompt."""
    rows = [*BEHAVIOUR, [[-1.0], [-0.4]]]
    batch = credited(DAPO(), rollouts(rows, [[1.0, 0.0], [1.0, 0.0]]))
    assert DAPO().size(batch).tolist() == [5.0, 2.0]
    assert DAPO().loss(batch).tolist() == exactly([-A * (2 - 3), 0.0])


def test_rewards_alike_are_no_news() -> None:
    """Such prompts are what redraw replaces: here they only count in the denominator."""
    batch = moved(DAPO(), (0.7, 0.7))
    assert DAPO().loss(batch).tolist() == [0.0] and gradient(DAPO(), batch, batch.y) == [[0.0] * 5]


def test_the_deviation_can_be_the_populations() -> None:
    assert moved(DAPO(deviation="population")).advantage[0].item() == exactly(0.5 / 0.5001)


def test_the_card_names_what_the_run_does_of_it() -> None:
    for name in ("redraw", "overlong_buffer"):
        assert name in run_options() and name in DAPO.use


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    batch = credited(DAPO(), rollouts(BEHAVIOUR, [[1.0, 0.0]]), [[by, 0.0], [0.0, by, -by]])
    assert DAPO().loss(batch).isfinite().all() and all(map(math.isfinite, gradient(DAPO(), batch, batch.y)[0]))


@pytest.mark.parametrize("option", ["clip_low", "clip_high"])
def test_out_of_range(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^dapo: {option} is 0\.0; expected a number above 0\.$"):
        DAPO(**{option: 0.0})  # type: ignore[arg-type]
