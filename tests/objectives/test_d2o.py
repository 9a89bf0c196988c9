"""D2O against arithmetic and against DPO."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, random_pairs, rankings_of
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rankings
from trimtab.objectives.d2o import D2O
from trimtab.objectives.dpo import DPO


def test_golden() -> None:
    """Anchors 0.5 and -0.3 (mean 0.1), bad -0.2; beta 0.5, alpha 0.8: z = 0.05 + 0.16 = 0.21.
    L = log(1 + e^-0.21) = 0.593649581021784; dL/dz = -sigma(-0.21) = -0.447692090425675:
    by an anchor times 0.5/2 = -0.111923022606419, by the bad answer times -0.8 = 0.35815367234054
    """
    batch, method = rankings_of([[0.5, -0.2, -0.3]], [[1, 3, 2]]), D2O(beta=0.5, alpha=0.8)
    assert method.loss(batch).tolist() == exactly([0.593649581021784])
    slope = [-0.111923022606419, 0.35815367234054, -0.111923022606419]
    assert gradient(method, batch, batch.y) == [exactly(slope)]
    found = method.metrics(batch)
    assert found["rewards/margins"].tolist() == exactly([0.21]) and found["rewards/accuracies"].tolist() == [1]


def test_at_the_reference() -> None:
    loss = D2O().loss(rankings_of([[0.0] * 3, [0.0] * 2], [[1, 2, 3], [2, 1]]))
    assert loss.tolist() == exactly([math.log(2)] * 2)


@pytest.mark.parametrize("worst_first", [True, False])
def test_one_anchor_and_alpha_as_beta_is_dpo(worst_first: bool) -> None:
    pairs, ranks = random_pairs(), ([2, 1] if worst_first else [1, 2])
    n = len(pairs)
    joined = pairs.chosen.then(pairs.rejected)
    sides = (1, 0) if worst_first else (0, 1)
    y = joined.take(torch.tensor([i + n * side for i in range(n) for side in sides]))
    batch = Rankings(y, torch.arange(n).repeat_interleave(2), torch.tensor(ranks * n))
    method = D2O(beta=0.3, alpha=0.3)
    assert close(method.loss(batch), DPO(beta=0.3).loss(pairs))
    leaves = [pairs.chosen._token_logps, pairs.rejected._token_logps]
    a, b = (torch.autograd.grad(x.sum(), leaves) for x in (method.loss(batch), DPO(beta=0.3).loss(pairs)))
    assert all(close(x, y) for x, y in zip(a, b, strict=True))


def test_lists_of_any_length_side_by_side() -> None:
    rho, ranks = [[0.5, -0.2, -0.3], [4.0, 1.0]], [[1, 3, 2], [2, 1]]
    alone = [D2O().loss(rankings_of([r], [k])) for r, k in zip(rho, ranks, strict=True)]
    assert close(D2O().loss(rankings_of(rho, ranks)), torch.cat(alone))


def test_the_order_of_the_anchors_says_nothing() -> None:
    """They are samples, not winners: only who is worst counts, whatever number its rank has."""
    first = D2O().loss(rankings_of([[0.5, 0.9, -0.2]], [[1, 2, 3]]))
    for ranks in ([2, 1, 3], [1, 1, 2], [1, 1, 9]):
        assert close(D2O().loss(rankings_of([[0.5, 0.9, -0.2]], [ranks])), first)
    assert not close(D2O().loss(rankings_of([[0.5, 0.9, -0.2]], [[3, 2, 1]])), first)


def test_several_worst_answers_are_averaged() -> None:
    two = D2O(alpha=0.4).loss(rankings_of([[0.5, -0.2, 0.6]], [[1, 2, 2]]))
    assert close(two, D2O(alpha=0.4).loss(rankings_of([[0.5, 0.2]], [[1, 2]])))


def test_a_constant_on_all_log_ratios_cancels_only_where_alpha_is_beta() -> None:
    a, b = (rankings_of([rho], [[1, 3, 2]]) for rho in ([0.5, -0.2, -0.3], [5.5, 4.8, 4.7]))
    assert close(D2O(beta=0.3, alpha=0.3).loss(a), D2O(beta=0.3, alpha=0.3).loss(b))
    assert not close(D2O(beta=0.3, alpha=0.4).loss(a), D2O(beta=0.3, alpha=0.4).loss(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = rankings_of([[1000.0, 1000.0, -1000.0], [-1000.0, 0.0]], [[1, 1, 2], [1, 2]], dtype=dtype)
    method = D2O(beta=1.0, alpha=1.0)
    assert method.loss(batch).tolist() == [0.0, 1000.0]
    assert gradient(method, batch, batch.y) == [[0.0, 0.0, 0.0, -1.0, 1.0]]


def test_a_ranking_without_a_worst_answer_is_refused() -> None:
    nan = math.nan
    assert D2O().advise(rankings_of([[nan] * 3, [nan] * 2], [[1, 1, 2], [2, 1]])) == ("", [])
    said, _ = D2O().advise(rankings_of([[nan] * 3, [nan] * 2], [[1, 1, 2], [1, 1]]))
    assert said.startswith("1 of 2 rankings have one rank for all answers; d2o needs a worst one")


@pytest.mark.parametrize("option", ["beta", "alpha"])
def test_out_of_range(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^d2o: {option} is 0\.0; expected a number above 0\.$"):
        D2O(**{option: 0.0})
