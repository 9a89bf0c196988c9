"""NPO against arithmetic, DPO, gradient ascent and SFT."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pairs_of, thumbs
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Demonstrations, Thumbs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.npo import NPO
from trimtab.objectives.sft import SFT

TOKENS = [[-0.5, -1.0], [-2.0, -0.25, -0.75], [-0.6], [-0.9]]
REFS = [[-0.7, -1.3], [-1.5, -0.5, -0.8], [-0.1], [-1.3]]


def four() -> Thumbs:
    return Thumbs(completions(TOKENS, REFS), torch.tensor([True, False, True, False]))


def test_golden() -> None:
    """Good: log pi = -1.5 over 2 tokens, -0.6 over 1: 3 tokens. Bad: rho = -0.2, 0.4. beta 0.5, w 1.5; 4 rows, 2 of each.
    good rows: 4/3 * 1.5 * 1.5 = 3 and 4/3 * 1.5 * 0.6 = 1.2 (their mean over rows is w times the mean over tokens)
    bad rows: 4/2 * 4 log(1 + e^-0.1) = 5.155173280588567 and 4/2 * 4 log(1 + e^0.2) = 6.385110955052734
    gradients by every token: -4/3 * 1.5 = -2;  4/2 * 2 sigma(-0.1) = 1.90008325008424;  4/2 * 2 sigma(0.2) = 2.19933598924991
    """
    batch, method = four(), NPO(beta=0.5, retain_weight=1.5)
    assert method.loss(batch).tolist() == exactly([3, 5.155173280588567, 1.2, 6.385110955052734])
    (slope,) = gradient(method, batch, batch.y)
    assert slope == exactly([-2] * 2 + [1.90008325008424] * 3 + [-2] + [2.19933598924991])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_at_the_reference(beta: float) -> None:
    """Spec 0.1: (2/beta) log 2, and the gradient is that of gradient ascent."""
    batch = thumbs([0.0, 0.0], [False, False], [])
    assert NPO(beta=beta).loss(batch).tolist() == exactly([2 / beta * math.log(2)] * 2)
    assert gradient(NPO(beta=beta), batch, batch.y) == [exactly([1.0, 1.0])]


def test_is_dpo_without_its_winner_doubled() -> None:
    rho = [-3.0, 0.2, 5.0]
    lost = pairs_of([-r for r in rho])  # the margin with the winner at the reference
    assert close(NPO(beta=0.3).loss(thumbs(rho, [False] * 3, [])), 2 / 0.3 * DPO(beta=0.3).loss(lost))


def test_small_beta_is_gradient_ascent() -> None:
    """L - (2/beta) log 2 -> mean rho, gradient 1/n by every token (Proposition 1)."""
    beta, rho = 1e-6, [-3.0, 0.2, 5.0]
    batch = thumbs(rho, [False] * 3, [])
    assert (NPO(beta=beta).loss(batch) - 2 / beta * math.log(2)).tolist() == pytest.approx(rho, abs=1e-4)
    assert gradient(NPO(beta=beta), batch, batch.y)[0] == pytest.approx([1, 1, 1], abs=1e-5)


def test_what_is_unlikely_already_is_left_alone() -> None:
    """Gradient weight 2 sigma(beta rho): 0 far below the reference, 2 far above, never more."""
    batch = thumbs([-60.0, 60.0], [False, False], [])
    assert gradient(NPO(beta=1.0), batch, batch.y)[0] == pytest.approx([0, 2], abs=1e-12)


def test_the_retain_term_is_sft_on_the_good_answers() -> None:
    batch = four()
    good = Demonstrations(batch.y.take(torch.tensor([0, 2])))
    nll = SFT().loss(good).sum() / SFT().size(good).sum()
    with_it, without = (NPO(retain_weight=w).loss(batch).mean() for w in (0.7, 0.0))
    assert close(with_it - without, 0.7 * nll)


def test_a_microbatch_uses_the_counts_of_the_whole() -> None:
    whole = four()
    for row in range(4):
        part = Thumbs(whole.y.take(torch.tensor([row])), whole.desirable[[row]], around=whole)
        assert close(NPO().loss(part), NPO().loss(whole)[[row]])


@pytest.mark.parametrize("up", [True, False])
def test_one_kind_alone(up: bool) -> None:
    batch = replace(four(), desirable=torch.tensor([up] * 4))
    (slope,) = gradient(NPO(), batch, batch.y)
    assert all(math.isfinite(g) and (g < 0) == up for g in slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = thumbs([1000.0, -1000.0], [False, False], [], dtype)
    assert NPO(beta=1.0).loss(batch).tolist() == [2000.0, 0.0]
    assert gradient(NPO(beta=1.0), batch, batch.y) == [[2.0, 0.0]]


def advice(*up: bool, **options: float) -> tuple[str, list[str]]:
    return NPO(**options).advise(thumbs([math.nan] * len(up), list(up), []))


def test_advice() -> None:
    assert advice(True, False) == ("", [])
    assert advice(True, True)[0] == "all 2 thumbs point up; npo forgets those that point down"
    assert "nothing is retained" in advice(False, False)[1][0]
    assert advice(True, False, retain_weight=0.0)[1] == ["retain_weight is 0: 1 thumbs up are not learned from"]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^npo: beta is 0; expected a number above 0\.$"):
        NPO(beta=0)
    with pytest.raises(ConfigError, match=r"^npo: retain_weight is -1; expected a number at least 0\.$"):
        NPO(retain_weight=-1)
