"""CRINGE and its pairwise form: golden values, gradients on both tokens of the duel, limits (spec A.5)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import completions, exactly, sigma, softplus
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Pairs, Thumbs
from trimtab.objectives.cringe import CRINGE
from trimtab.objectives.pairwise_cringe import PairwiseCRINGE

GOOD, BAD, RIVALS = [-0.5, -1.0], [-2.0, -0.25, -0.75], [-0.5, -1.25, -0.75]


def with_rivals(rows: list[list[float]], rivals: list[float]) -> Completions:
    y = completions(rows)
    y._extras["rival"] = torch.tensor(rivals, dtype=torch.float64, requires_grad=True)
    return y


def thumbs() -> Thumbs:
    return Thumbs(with_rivals([GOOD, BAD], [-9.0, -9.0, *RIVALS]), torch.tensor([True, False]))


def pair(dtype: torch.dtype = torch.float64) -> Pairs:
    return Pairs(with_rivals([GOOD], [-9.0, -9.0]), with_rivals([BAD], RIVALS), torch.tensor([False]))


# the three duels of BAD: log pi(y_t) - log pi(s*) = -1.5, 1, 0
CONTRAST = softplus(-1.5) + softplus(1.0) + math.log(2)


def test_golden() -> None:
    """good: -log pi = 1.5;  bad, alpha 0.5: 0.5 (log(1 + e^-1.5) + log(1 + e) + log 2) = 1.103910...; 5 tokens in all.
    By a bad token +0.5 sigma(s_t - s*), by its rival the negative: no gradient is lost or made.
    """
    batch, method = thumbs(), CRINGE(alpha=0.5)
    loss = method.loss(batch)
    assert loss.tolist() == [exactly(1.5), exactly(0.5 * CONTRAST)]
    assert exactly(0.2014132779827524 + 1.3132616875182228 + 0.6931471805599453) == CONTRAST
    assert method.size(batch).tolist() == [2, 3]
    by_token, by_rival = torch.autograd.grad(loss.sum(), [batch.y._token_logps, batch.y._extras["rival"]])
    duel = [0.5 * sigma(-1.5), 0.5 * sigma(1.0), 0.25]
    assert by_token.tolist() == exactly([-1.0, -1.0, *duel])
    assert by_rival.tolist() == exactly([0.0, 0.0, *(-d for d in duel)])


def test_a_detached_rival_has_no_gradient() -> None:
    batch = thumbs()
    loss = CRINGE(detach_rival=True).loss(batch)
    assert torch.autograd.grad(loss.sum(), batch.y._extras["rival"], allow_unused=True) == (None,)


def test_pairwise_golden() -> None:
    """log pi(y_w) = -1.5, log pi(y_l) = -3: margin 1.5; b = 0.5, tau = 2: g = sigma(-0.5) = 0.377540668798145
    L = g (1.5 + CONTRAST), over 5 tokens. The gate is detached: by a chosen token -g.
    """
    batch, method = pair(), PairwiseCRINGE(margin=0.5, temperature=2.0)
    gate = 0.37754066879814546
    assert method.loss(batch).item() == exactly(gate * (1.5 + CONTRAST))
    assert method.size(batch).tolist() == [5]
    (slope,) = torch.autograd.grad(method.loss(batch).sum(), batch.chosen._token_logps)
    assert slope.tolist() == exactly([-gate, -gate])


def test_a_gate_with_gradient() -> None:
    """d g / d log pi(y_w) = -g (1 - g) / tau."""
    batch, method = pair(), PairwiseCRINGE(margin=0.5, temperature=2.0, detach_gate=False)
    g = 0.37754066879814546
    (slope,) = torch.autograd.grad(method.loss(batch).sum(), batch.chosen._token_logps)
    assert slope.tolist() == exactly([-g - g * (1 - g) / 2 * (1.5 + CONTRAST)] * 2)


def test_limits_of_the_gate() -> None:
    """b -> inf: the binary loss; tau -> inf: half of it."""
    batch = pair()
    binary = 1.5 + CONTRAST
    assert PairwiseCRINGE(margin=1e6).loss(batch).item() == exactly(binary)
    assert PairwiseCRINGE(temperature=1e15).loss(batch).item() == exactly(binary / 2)


@pytest.mark.parametrize("apart", [-1000.0, 1000.0])
def test_extremes_stay_finite(apart: float) -> None:
    batch = Thumbs(with_rivals([[apart]], [0.0]), torch.tensor([False]))
    assert CRINGE().loss(batch).item() == exactly(max(apart, 0.0))


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^cringe: rivals is 0; expected a number at least 1\.$"):
        CRINGE(rivals=0)
