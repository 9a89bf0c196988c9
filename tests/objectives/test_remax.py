"""ReMax against arithmetic: the greedy answer as baseline, the KL of a token and of those after it, the authors' version."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import credited, exactly, gradient, rollouts
from trimtab.errors import ConfigError, NeedError
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives.remax import ReMax
from trimtab.update.measure import measure

# two prompts; the greedy answers score 0.4 and 2; log-ratios to the reference when sampled 0.2, 0.3; -0.5; 0.1
BEHAVIOUR = [[[-0.5, -1.0], [-2.0]], [[-0.7]]]
REFERENCE = [[[-0.7, -1.3], [-1.5]], [[-0.8]]]
POLICY = [[-0.4, -0.7], [-2.3], [-0.6]]
SCORES = [[1.0, 0.0], [3.0]]
GREEDY = [[0.4, 0.4], [0.4], [2.0]]


def sampled(scores: list[list[float]] = SCORES) -> Rollouts:
    return rollouts(BEHAVIOUR, scores, REFERENCE, baseline=GREEDY)


def test_golden() -> None:
    """beta 0.5:  gaps 0.6, -0.4 and 1;  A = 0.6 - 0.25, 0.6 - 0.15;  -0.4 + 0.25;  1 - 0.05
    ratios e^0.1, e^0.3 > 1.2 (A > 0: cut);  e^-0.3 < 0.8 (A < 0: cut);  e^0.1
    """
    method = ReMax(beta=0.5)
    batch = credited(method, sampled(), POLICY)
    assert batch.advantage.tolist() == exactly([0.35, 0.45, -0.15, 0.95])
    a, d = 0.35 * math.exp(0.1), 0.95 * math.exp(0.1)
    assert method.loss(batch).tolist() == exactly([-(a + 1.2 * 0.45 - 0.8 * 0.15), -d])
    assert gradient(method, batch, batch.y)[0] == exactly([-a, 0.0, 0.0, -d])
    assert method.size(batch).tolist() == [3.0, 1.0]
    told = measure(method, batch)
    assert told["policy/clipfrac"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert told["policy/approxkl"].tolist() == exactly([0.005, 0.045, 0.045, 0.005])


def test_golden_of_the_authors() -> None:
    """Each token pays for its own KL only, A = 0.6 - 0.1, 0.6 - 0.15;  the gap is held: 1 becomes 0.7 before -0.05."""
    batch = credited(ReMax(beta=0.5, kl="own", score_clip=0.7), sampled())
    assert batch.advantage.tolist() == exactly([0.5, 0.45, -0.15, 0.65])


@pytest.mark.parametrize(("kl", "first"), [("to_go", 0.9 * 0.6 - 0.1 - 0.9 * 0.15), ("own", 0.9 * 0.6 - 0.1)])
def test_discount(kl: str, first: float) -> None:
    """gamma 0.9: the gap, and the KL of the second token, count 0.9 for the first."""
    batch = credited(ReMax(beta=0.5, gamma=0.9, kl=kl), sampled())
    assert batch.advantage.tolist() == exactly([first, 0.45, -0.15, 0.95])


def test_the_gap_is_held_on_both_sides() -> None:
    batch = credited(ReMax(beta=0.0, score_clip=5.0), sampled([[100.0, -100.0], [3.0]]))
    assert batch.advantage.tolist() == exactly([5.0, 5.0, -5.0, 1.0])


@pytest.mark.parametrize("kl", ["to_go", "own"])
def test_an_answer_that_is_the_greedy_one_teaches_nothing(kl: str) -> None:
    """While the policy is the reference; later only the KL is left."""
    same = rollouts(BEHAVIOUR, [[0.4, 0.4], [2.0]], BEHAVIOUR, baseline=GREEDY)
    batch = credited(ReMax(kl=kl), same)
    assert batch.advantage.tolist() == [0.0] * 4 and ReMax().loss(batch).tolist() == [0.0, 0.0]
    assert gradient(ReMax(), batch, batch.y)[0] == [0.0] * 4
    later = credited(ReMax(beta=0.5, kl="own"), sampled([[0.4, 0.4], [2.0]]))
    assert later.advantage.tolist() == exactly([-0.1, -0.15, 0.25, -0.05])


def test_on_policy_it_is_reinforce() -> None:
    """Ratio 1: the value is -sum A, the gradient by every token -A."""
    batch = credited(ReMax(beta=0.0), sampled())
    assert ReMax().loss(batch).tolist() == exactly([-(0.6 + 0.6 - 0.4), -1.0])
    assert gradient(ReMax(), batch, batch.y)[0] == exactly([-0.6, -0.6, 0.4, -1.0])


def test_a_level_of_the_reward_does_not_matter() -> None:
    """What is added to all scores is added to the greedy ones, too."""
    once = credited(ReMax(), sampled())
    raised = [[g + 10 for g in row] for row in GREEDY]
    more = credited(ReMax(), rollouts(BEHAVIOUR, [[11.0, 10.0], [13.0]], REFERENCE, baseline=raised))
    assert more.advantage.tolist() == exactly(once.advantage.tolist())


def test_without_a_greedy_answer() -> None:
    with pytest.raises(NeedError, match="the greedy answer was read"):
        ReMax().credit(rollouts(BEHAVIOUR, SCORES, REFERENCE), {})


def test_one_token_and_none() -> None:
    """An answer without tokens between two others changes nothing for them."""
    with_none = rollouts(
        [[[-0.5, -1.0], [], [-2.0]], [[-0.7]]], [[1.0, 0.4, 0.0], [3.0]], [[[-0.7, -1.3], [], [-1.5]], [[-0.8]]],
        baseline=[[0.4, 0.4], [], [0.4], [2.0]],
    )  # fmt: skip
    batch = credited(ReMax(beta=0.5), with_none)
    assert batch.advantage.tolist() == exactly([0.35, 0.45, -0.15, 0.95])
    assert ReMax(beta=0.5).size(batch).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("by", [1000.0, -1000.0])
def test_log_ratios_of_1000(by: float) -> None:
    """To the policy that sampled, and to the reference."""
    refs = [[[by, -1.0], [-by]], [[by]]]
    batch = credited(ReMax(), rollouts(BEHAVIOUR, SCORES, refs, baseline=GREEDY), [[by, 0.0], [-by], [by]])
    assert batch.advantage.isfinite().all() and ReMax().loss(batch).isfinite().all()
    assert all(map(math.isfinite, gradient(ReMax(), batch, batch.y)[0]))


def test_float32() -> None:
    batch = sampled()
    narrow = {k: v.float() for k, v in batch.columns.items()}
    y = batch.y.with_policy(batch.y._token_logps.detach().float())
    y._ref = y._ref.float()  # type: ignore[union-attr]
    found = ReMax(beta=0.5).credit(Rollouts(y, batch.prompt, batch.rank, batch.score.float(), columns=narrow), {})[0]
    assert found["advantage"].dtype == torch.float32
    assert found["advantage"].tolist() == pytest.approx([0.35, 0.45, -0.15, 0.95], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, r"^remax: clip is 0\.0; expected a number above 0\.$"),
        ({"score_clip": -1.0}, r"^remax: score_clip is -1\.0; expected a number at least 0\.$"),
        ({"gamma": 1.1}, r"^remax: gamma is 1\.1; expected a number above 0 and at most 1\.$"),
        ({"kl": "all"}, r'^remax: kl is "all"; expected one of to_go, own\.$'),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReMax(**options)
