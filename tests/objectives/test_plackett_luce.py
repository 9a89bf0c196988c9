"""Plackett-Luce DPO against arithmetic, as a probability model, and against DPO."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, rankings_of, together_as_apart
from trimtab.errors import ConfigError
from trimtab.objectives.dpo import DPO
from trimtab.objectives.plackett_luce import PlackettLuce


def test_golden() -> None:
    """beta 0.5: rewards 0.25, -0.1, 0.05; ranks 2, 1, 3.
    first: log(e^0.25 + e^-0.1 + e^0.05) + 0.1 with A = 1.17561466570907; second: log(e^0.25 + e^0.05) - 0.25 with
    B = 0.848138869381592; the last place is sure.  L = 1.87375353509066
    by the rewards: e^(r - A) + e^(r - B) (not for the first) - 1 (not for the last); times 0.5
    """
    batch, method = rankings_of([[0.5, -0.2, 0.1]], [[2, 1, 3]]), PlackettLuce(beta=0.5)
    assert method.loss(batch).tolist() == exactly([1.87375353509066])
    assert gradient(method, batch, batch.y)[0] == exactly([-0.026939121493101, -0.360370367818584, 0.387309489311685])


def test_ln_k_factorial_at_the_reference() -> None:
    batch = rankings_of([[0.0] * k for k in (1, 2, 3, 5)])
    assert PlackettLuce().loss(batch).tolist() == exactly([math.log(math.factorial(k)) for k in (1, 2, 3, 5)])


def test_the_probabilities_of_all_orders_add_up_to_1() -> None:
    rho = [1.0, -2.0, 0.3, 0.7]
    orders = list(permutations(range(1, 5)))
    loss = PlackettLuce(beta=1.0).loss(rankings_of([rho] * len(orders), orders))
    assert (-loss).exp().sum().item() == exactly(1.0)


def test_two_answers_are_dpo() -> None:
    h = [-3.0, 0.0, 0.4, 5.0]
    batch, pairs = rankings_of([[x / 2, -x / 2] for x in h]), pairs_of(h)
    assert close(PlackettLuce(beta=0.3).loss(batch), DPO(beta=0.3).loss(pairs))
    slopes = gradient(PlackettLuce(beta=0.3), batch, batch.y)[0]
    assert [slopes[::2], slopes[1::2]] == [
        exactly(g) for g in gradient(DPO(beta=0.3), pairs, pairs.chosen, pairs.rejected)
    ]


def test_lists_of_different_lengths() -> None:
    assert together_as_apart(PlackettLuce())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = rankings_of([[1000.0, 0.0, -1000.0], [-1000.0, 1000.0]], dtype=dtype)
    assert PlackettLuce(beta=1.0).loss(batch).tolist() == [0.0, 2000.0]
    assert gradient(PlackettLuce(beta=1.0), batch, batch.y) == [[0.0, 0.0, 0.0, -1.0, 1.0]]


def test_ties_are_refused() -> None:
    def said(*ranks: list[int]) -> str:
        return PlackettLuce().advise(rankings_of([[math.nan] * len(r) for r in ranks], ranks))[0]

    tied = said([1, 2, 2, 4], [3, 1, 2], [1, 1])
    assert tied == "2 of 3 rankings have ties, for which plackett_luce has no probability"
    assert said([5, 1, 3, 2], [1, 2]) == ""


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^plackett_luce: beta is 0\.0; expected a number above 0\.$"):
        PlackettLuce(beta=0.0)
