"""What is logged of lists."""

from __future__ import annotations

from tests.objectives.by_hand import credited, exactly, rankings_of, rollouts
from trimtab.objectives.lipo import LiPO
from trimtab.objectives.plackett_luce import PlackettLuce
from trimtab.objectives.rloo import RLOO
from trimtab.update.measure import measure


def test_rankings_are_counted_by_pairs() -> None:
    """0.5, -0.2, 0.1 at places 2, 1, 3: 1 over 2 and 1 over 3 are wrong, 2 over 3 is right; a second list adds its own."""
    found = measure(PlackettLuce(beta=1.0), rankings_of([[0.5, -0.2, 0.1], [1.0, 0.0]], [[2, 1, 3], [1, 2]]))
    assert sorted(found["rewards/margins"].tolist()) == exactly([-0.7, -0.3, 0.4, 1.0])
    assert sorted(found["rewards/accuracies"].tolist()) == [0.0, 0.0, 1.0, 1.0]


def test_equal_places_are_no_pair_and_equal_rewards_not_right() -> None:
    found = measure(LiPO(beta=1.0, by="ranks"), rankings_of([[0.3, 0.9, 0.3]], [[1, 1, 2]]))
    assert sorted(found["rewards/accuracies"].tolist()) == [0.0, 1.0]
    assert "rewards/accuracies" not in measure(PlackettLuce(), rankings_of([[0.3, 0.9]], [[1, 1]]))


def test_rollouts_are_no_rankings() -> None:
    batch = credited(RLOO(beta=0.0), rollouts([[[-0.5], [-1.0]]], [[1.0, 0.0]], [[[-0.5], [-1.0]]]))
    assert "rewards/accuracies" not in measure(RLOO(), batch)
