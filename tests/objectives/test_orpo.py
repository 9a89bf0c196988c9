"""ORPO against arithmetic, and where its odds are infinite."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.orpo import ORPO, log1mexp


def test_golden() -> None:
    """mean log-probs -0.75, -1; log odds a - log(1 - e^a): -0.110646534959646, -0.541324854612918
    log OR = 0.430678319653272
    L = 0.75 + 0.4 softplus(-log OR) = 0.950326597550551
    by a chosen token:  -0.4 sigma(-log OR) / (1 - e^-0.75) / 2 - 1/2 = -0.649332597765717
    by a rejected one:  +0.4 sigma(-log OR) / (1 - e^-1) / 3          =  0.0830989935351185
    """
    batch, method = pair(refs=False), ORPO(odds_weight=0.4)
    assert method.loss(batch).item() == exactly(0.950326597550551)
    assert method.reward(batch.chosen).item() == exactly(-0.110646534959646)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.649332597765717] * 2) and rejected == exactly([0.0830989935351185] * 3)


def test_equal_means_cost_lambda_ln_2_and_the_likelihood() -> None:
    batch = Pairs(completions([[-1.0, -3.0]]), completions([[-2.0]]), torch.tensor([False]))
    assert ORPO(odds_weight=0.3).loss(batch).item() == exactly(2.0 + 0.3 * math.log(2))


def test_repeating_an_answer_changes_only_what_likelihood_counts_by_sequence() -> None:
    once = pair(refs=False)
    thrice = Pairs(completions([[-0.5, -1.0] * 3]), once.rejected, once.tie)
    assert close(ORPO().loss(once), ORPO().loss(thrice))
    assert not close(ORPO(nll_normalise="sequence_sum").loss(once), ORPO(nll_normalise="sequence_sum").loss(thrice))


@pytest.mark.parametrize("a", [-1e-8, 0.0, -1e-4, -math.log(2), -60.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probability_of_1_stays_finite(a: float, dtype: torch.dtype) -> None:
    """TRL: at -1e-8 in float32 the loss is finite and the gradient NaN. The authors' log1p(-exp) is infinite."""
    batch = Pairs(completions([[a]], dtype=dtype), completions([[-1.0]], dtype=dtype), torch.tensor([False]))
    for view in (batch, Pairs(batch.rejected, batch.chosen, batch.tie)):
        loss, slopes = ORPO().loss(view), gradient(ORPO(), view, view.chosen, view.rejected)
        assert math.isfinite(loss.item()) and all(math.isfinite(s) for [s] in slopes)


@pytest.mark.parametrize("x", [-1e-12, -1e-8, -1e-3, -0.69, -0.7, -5.0, -50.0])
def test_log1mexp(x: float) -> None:
    """Slope -e^x / (1 - e^x); without the double where it is NaN at -1e-8 in float32."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
        found = log1mexp(leaf)
        (slope,) = torch.autograd.grad(found, leaf)
        wanted = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
        assert found.item() == pytest.approx(wanted, rel=tolerance)
        assert slope.item() == pytest.approx(math.exp(x) / math.expm1(x), rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_1000_apart(dtype: torch.dtype) -> None:
    """Log-probs of +-500 (not that there are any): the odds follow the log-prob where the probability is cut at 1."""
    batch = pairs_of([1000.0, -1000.0], dtype=dtype)
    slopes = gradient(ORPO(), batch, batch.chosen, batch.rejected)
    assert torch.isfinite(ORPO().loss(batch)).all() and torch.isfinite(torch.tensor(slopes)).all()


def test_metrics_have_trls_names() -> None:
    found = ORPO().metrics(pair(refs=False))
    assert found["log_odds_chosen"].item() == exactly(0.430678319653272)
    assert found["log_odds_ratio"].item() == exactly(-math.log1p(math.exp(-0.430678319653272)))


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^orpo: odds_weight is 0\.0; expected a number above 0\.$"):
        ORPO(odds_weight=0.0)
