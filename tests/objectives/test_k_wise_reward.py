"""K-wise reward model: golden values, K = 2 is Bradley-Terry, ties are not counted, prompts of different K."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.objectives.by_hand import close, exactly, score_gradient, scored, scored_pairs, softplus
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rankings
from trimtab.objectives.k_wise_reward import KWiseReward
from trimtab.objectives.reward_model import RewardModel


def rankings(
    scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64
) -> Rankings:
    """One answer of two tokens per score; the number after the first token is another."""
    y = scored([[9.0, s] for row in scores for s in row], dtype)
    prompt = torch.tensor([i for i, row in enumerate(scores) for _ in row])
    return Rankings(y, prompt, torch.tensor([r for row in ranks for r in row]))


def test_golden() -> None:
    """Scores 1, 0.2, -0.5 of the best, second and third: d = 0.8, 1.5, 0.7.
    L = (log(1 + e^-0.8) + log(1 + e^-1.5) + log(1 + e^-0.7))/3 = 0.325233330938666
    by the scores: -(s(-0.8) + s(-1.5))/3, (s(-0.8) - s(-0.7))/3, (s(-1.5) + s(-0.7))/3
    """
    batch, method = rankings([[1.0, 0.2, -0.5]], [[1, 2, 3]]), KWiseReward()
    assert method.loss(batch).item() == exactly(0.325233330938666)
    (slope,) = score_gradient(method, batch, batch.y)
    assert slope[0::2] == exactly([0.0] * 3)
    assert slope[1::2] == exactly([-0.164150347559581, -0.00726223631981545, 0.171412583879397])


def test_tied_pairs_are_dropped_and_not_counted() -> None:
    """Second and third are equal: (log(1 + e^-0.8) + log(1 + e^-1.5))/2 = 0.286256971965265; over all three: * 2/3."""
    batch = rankings([[1.0, 0.2, -0.5]], [[1, 2, 2]])
    assert KWiseReward().loss(batch).item() == exactly(0.286256971965265)
    assert KWiseReward(average="all").loss(batch).item() == exactly(0.190837981310177)
    untied = rankings([[1.0, 0.2, -0.5]], [[1, 2, 3]])
    assert close(KWiseReward().loss(untied), KWiseReward(average="all").loss(untied))


def test_two_answers_are_a_comparison() -> None:
    d = [-2.0, 0.0, 0.7]
    batch = rankings([[x / 2, -x / 2] for x in d], [[1, 2]] * 3)
    assert close(KWiseReward().loss(batch), RewardModel().loss(scored_pairs(d)))


def test_it_is_the_mean_over_pairs_whatever_the_order_and_the_ranks_are_called() -> None:
    scores, ranks = [0.4, -1.0, 2.0, 0.9, 0.0], [3, 5, 1, 1, 9]
    pairs = [(i, j) for i in range(5) for j in range(5) if ranks[i] < ranks[j]]
    wanted = sum(softplus(scores[j] - scores[i]) for i, j in pairs) / len(pairs)
    assert len(pairs) == 9 and KWiseReward().loss(rankings([scores], [ranks])).item() == exactly(wanted)
    turned = rankings([scores[::-1]], [ranks[::-1]])
    assert KWiseReward().loss(turned).item() == exactly(wanted)


def test_prompts_of_different_k_count_alike() -> None:
    alone = [rankings([s], [r]) for s, r in (([1.0, 0.2, -0.5], [1, 2, 3]), ([0.3, 0.1], [2, 1]))]
    together = rankings([[1.0, 0.2, -0.5], [0.3, 0.1]], [[1, 2, 3], [2, 1]])
    assert close(KWiseReward().loss(together), torch.cat([KWiseReward().loss(b) for b in alone]))
    assert KWiseReward().size(together).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_1000_and_nothing_but_ties(dtype: torch.dtype) -> None:
    batch = rankings([[-1000.0, 1000.0, 0.0], [1.0, 2.0, 3.0]], [[1, 2, 3], [1, 1, 1]], dtype)
    loss, (slope,) = KWiseReward().loss(batch), score_gradient(KWiseReward(), batch, batch.y)
    assert loss.tolist() == pytest.approx([3000 / 3, 0.0]) and torch.isfinite(torch.tensor(slope)).all()
    assert slope[6:] == [0.0] * 6


def test_metrics_count_pairs_and_advice_counts_ties() -> None:
    batch = rankings([[1.0, 0.2, 0.5], [0.0, 1.0, 2.0]], [[1, 2, 3], [1, 1, 1]])
    found = KWiseReward().metrics(batch)
    assert found["rewards/accuracies"].tolist() == [1, 1, 0]
    assert found["rewards/margins"].tolist() == exactly([0.8, 0.5, -0.3])
    assert KWiseReward().advise(batch) == ("", ["3 of 6 pairs are ties and are not learned from"])
    tied = rankings([[0.0, 1.0]], [[1, 1]])
    assert KWiseReward().advise(tied)[0] == "all 1 pairs of the rankings are ties; there is nothing to learn from"
    with pytest.raises(ConfigError, match=r"^k_wise_reward: average"):
        KWiseReward(average="some")
