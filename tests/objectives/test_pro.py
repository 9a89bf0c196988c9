"""PRO against arithmetic, its temperatures, and the eps of the authors' code."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, rankings, rankings_of, softplus, together_as_apart
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rankings
from trimtab.objectives.plackett_luce import PlackettLuce
from trimtab.objectives.pro import PRO


def three() -> Rankings:
    """Mean log-probs -1.5, -0.5, -2.2."""
    return rankings([[[-1.0, -2.0], [-0.5], [-3.0, -3.0, -0.6]]], scores=[[1.0, 0.6, 0.0]])


def test_golden() -> None:
    """Scores 1, 0.6, 0: tau_12 = 0.4, tau_13 = T_1 = 1, tau_23 = T_2 = 0.6.
    A = log(e^-1.5 + e^(-0.5 * 0.4) + e^-2.2) = 0.142075847221524, the first costs A + 1.5
    B = log(e^(-0.5 * 0.6) + e^(-2.2 * 0.6)) = 0.00792206010159268, the second costs B + 0.3
    likelihood 0.05 (3 - 1)^2 * 3 = 0.6.  L = 2.54999790732312
    by the means: e^(-1.5 - A) - 1;  0.4 e^(-0.2 - A) + 0.6 (e^(-0.3 - B) - 1);  e^(-2.2 - A) + 0.6 e^(-1.32 - B)
    by the tokens: these over the lengths, and -0.2 for the first
    """
    batch = three()
    assert PRO().loss(batch).item() == exactly(2.54999790732312)
    first, second, third = -0.603211106493116, 0.125101291205803, 0.0850481081638633
    assert gradient(PRO(), batch, batch.y)[0] == exactly([first] * 2 + [second] + [third] * 3)


def test_ranks_leave_the_temperatures_out() -> None:
    """All tau = 1: Plackett-Luce on mean log-probs. Scores are not needed."""
    batch = rankings_of([[-1.5, -0.5, -2.2]])
    assert PRO(by="ranks", sft_weight=0.0).loss(batch).item() == exactly(PlackettLuce(beta=1.0).loss(batch).item())


def test_the_likelihood_grows_with_the_list() -> None:
    """w (K - 1)^2 times the sum over tokens, each prompt its own K."""
    batch = rankings([[[-1.0, -2.0], [-0.5]], [[-4.0], [-1.0], [-1.0], [-2.0]]])
    more = PRO(by="ranks", sft_weight=0.3).loss(batch) - PRO(by="ranks", sft_weight=0.1).loss(batch)
    assert more.tolist() == exactly([0.2 * 1 * 3, 0.2 * 9 * 4])
    assert together_as_apart(PRO()) and together_as_apart(PRO(by="ranks"))


def test_the_order_in_the_file_does_not_matter() -> None:
    other = rankings([[[-0.5], [-3.0, -3.0, -0.6], [-1.0, -2.0]]], [[2, 3, 1]], [[0.6, 0.0, 1.0]])
    assert close(PRO().loss(three()), PRO().loss(other))


def test_equal_scores_say_nothing_of_each_other() -> None:
    """The third worse than both: softplus((s_3 - s_k) tau) for each, nothing between the first two."""
    batch = rankings_of([[-1.5, -0.5, -2.2]], [[1, 1, 3]], [[1.0, 1.0, 0.5]])
    wanted = softplus(0.5 * (-2.2 + 1.5)) + softplus(0.5 * (-2.2 + 0.5))
    assert PRO(sft_weight=0.0).loss(batch).item() == exactly(wanted)


def test_small_likelihoods_are_not_swallowed_by_an_eps() -> None:
    """s = -90 and -120: log(1 + e^-30) = 9e-14. log(1e-10 + e^-90 + e^-120) + 90 would be 67."""
    batch = rankings_of([[-90.0, -120.0]])
    assert PRO(by="ranks", sft_weight=0.0).loss(batch).item() == pytest.approx(math.exp(-30), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_1000_apart(dtype: torch.dtype) -> None:
    batch = rankings_of([[0.0, -1000.0], [-1000.0, 0.0]], scores=[[1.0, 0.0]] * 2, dtype=dtype)
    assert PRO(sft_weight=1.0).loss(batch).tolist() == [0.0, 2000.0]
    assert gradient(PRO(sft_weight=1.0), batch, batch.y) == [[-1.0, 0.0, -2.0, 1.0]]


def test_unknown_scores_are_refused() -> None:
    nan = rankings_of([[math.nan] * 2])
    assert PRO().advise(nan)[0] == "2 of 2 completions have no score; pro needs one for each, or by: ranks"
    assert PRO(by="ranks").advise(nan) == ("", [])


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^pro: sft_weight is -0\.1; expected a number at least 0\.$"):
        PRO(sft_weight=-0.1)
