"""KTO against arithmetic, and what its reference point may and may not do."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, same_gradient, thumbs
from trimtab.errors import ConfigError, NeedError
from trimtab.logprobs.scored import Thumbs
from trimtab.objectives.kto import KTO


def test_golden() -> None:
    """Mismatched log-ratios 0.4, -0.1, 0.3: z0 = 0.2.  beta 0.5, lambda_D 1.5, lambda_U 2.
    up   0.5: u = 0.5 (0.5 - 0.2) =  0.15,  L = 1.5 sigma(-0.15) = 0.693855231984376
    down -0.2: u = 0.5 (0.2 + 0.2) =  0.20,  L = 2 sigma(-0.20)   = 0.900332005375044
    up   0.1: u = 0.5 (0.1 - 0.2) = -0.05,  L = 1.5 sigma(0.05)  = 0.768746094726315
    dL/drho = -+ lambda 0.5 sigma(u) sigma(-u) = -0.186449255008157, +0.24751657271186, -0.187382861310837
    """
    batch = thumbs([0.5, -0.2, 0.1], [True, False, True], [0.4, -0.1, 0.3])
    method = KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=2.0)
    assert method.loss(batch).tolist() == exactly([0.693855231984376, 0.900332005375044, 0.768746094726315])
    assert gradient(method, batch, batch.y) == [exactly([-0.186449255008157, 0.24751657271186, -0.187382861310837])]
    assert method.metrics(batch)["kl"].tolist() == exactly([0.2])


def test_at_the_reference() -> None:
    """sigma(0) = 1/2: loss (lambda_D n_D + lambda_U n_U) / (2n), gradient of the mean -+ lambda beta / (4n)."""
    up = [True, True, False, True, False]
    batch, method = thumbs([0.0] * 5, up, [0.0] * 5), KTO(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    mean = method.loss(batch).sum() / method.size(batch).sum()
    assert mean.item() == exactly((1.3 * 3 + 0.7 * 2) / (2 * 5))
    (slope,) = torch.autograd.grad(mean, batch.y._token_logps)
    assert slope.tolist() == exactly([-1.3 * 0.2 / 20 if u else 0.7 * 0.2 / 20 for u in up])


def test_the_reference_point_has_no_gradient() -> None:
    batch = thumbs([0.5, -0.2], [True, False], [0.4, 0.3])
    assert batch.unmatched is not None
    (slope,) = torch.autograd.grad(KTO().loss(batch).sum(), [batch.unmatched._token_logps], allow_unused=True)
    assert slope is None


def test_a_constant_on_all_log_ratios_changes_nothing_while_the_mean_stays_positive() -> None:
    rho, up, mismatched = [0.5, -0.2, 1.0], [True, False, False], [0.4, -0.1, 0.3]
    a, b = thumbs(rho, up, mismatched), thumbs([r + 3 for r in rho], up, [m + 3 for m in mismatched])
    assert close(KTO(beta=0.5).loss(a), KTO(beta=0.5).loss(b))
    assert same_gradient(gradient(KTO(beta=0.5), a, a.y), gradient(KTO(beta=0.5), b, b.y))


def test_the_mean_is_clamped_once_not_each_term() -> None:
    """Mismatched 3 and -1: the mean is 1, the mean of the positive parts would be 1.5. All negative: 0, as if there
    were none."""
    assert KTO().baseline(thumbs([0.0], [True], [3.0, -1.0])).item() == exactly(1.0)
    rho, up = [0.5, -0.2], [True, False]
    negative, none, zero = (thumbs(rho, up, m) for m in ([-0.4, -3.0], [], [0.0, 0.0]))
    assert close(KTO().loss(negative), KTO().loss(zero)) and close(KTO().loss(none), KTO().loss(zero))


def test_the_label_decides_the_branch_not_the_sign() -> None:
    """A thumb up far below the reference point costs nearly lambda_D, a thumb down far below nearly nothing."""
    loss = KTO(beta=1.0).loss(thumbs([-30.0, -30.0], [True, False], [0.0]))
    assert loss.tolist() == pytest.approx([1, 0], abs=1e-12)


def test_bounded_by_the_weights() -> None:
    rho = torch.linspace(-2000, 2000, 41).tolist()
    for up in (True, False):
        loss = KTO(desirable_weight=1.5, undesirable_weight=2.0).loss(thumbs(rho, [up] * 41, [7.0]))
        assert loss.min() >= 0 and loss.max() <= (1.5 if up else 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Utility saturates: the loss is 0 or lambda, the gradient 0 (Proposition 4.1)."""
    batch = thumbs([1000.0, -1000.0, 1000.0, -1000.0], [True, True, False, False], [1000.0, -1000.0], dtype)
    method = KTO(beta=1.0, desirable_weight=1.5, undesirable_weight=2.0)
    assert method.loss(batch).tolist() == [0.0, 1.5, 2.0, 0.0]
    assert gradient(method, batch, batch.y) == [[0.0] * 4]


def test_mismatched_must_be_asked_for() -> None:
    batch = thumbs([0.5], [True], [0.1])
    with pytest.raises(NeedError, match='"mismatched" is not in the objective\'s needs'):
        KTO().loss(Thumbs(batch.y, batch.desirable))


def advice(up: int, down: int, **options: float) -> tuple[str, list[str]]:
    n = up + down
    return KTO(**options).advise(thumbs([math.nan] * n, [True] * up + [False] * down, []))  # type: ignore[arg-type]


def test_advice_on_the_balance() -> None:
    """Equation 9: lambda_D n_D / (lambda_U n_U) in [1, 3/2]."""
    assert advice(6, 5) == advice(3, 2) == advice(5, 5) == ("", [])
    assert advice(1, 10, desirable_weight=12.0) == ("", [])
    refusal, (note,) = advice(2, 10)
    assert refusal == "" and "= 0.20" in note and "balance: paper" in note
    assert advice(5, 0)[0] == "all 5 thumbs point up; kto needs both kinds"
    assert advice(0, 3)[0] == "all 3 thumbs point down; kto needs both kinds"


@pytest.mark.parametrize(
    ("balance", "up", "down", "good", "bad"),
    [
        ("paper", 2, 10, 6.25, 1.0),
        ("legacy", 2, 10, 35 / 6, 1.0),
        ("paper", 10, 2, 1.0, 4.0),
        ("paper", 4, 4, 1.25, 1.0),
        ("none", 2, 10, 1.0, 1.0),
    ],
)
def test_weights_from_the_class_counts(balance: str, up: int, down: int, good: float, bad: float) -> None:
    """lambda_D n_D / (lambda_U n_U) = 5/4 (legacy: 7/6), the smaller weight is 1: 5/4 * 10 / 2 = 6.25; 4/5 * 10 / 2 = 4."""
    batch = thumbs([math.nan] * (up + down), [True] * up + [False] * down, [])
    found = KTO(balance=balance).settle(batch)
    assert isinstance(found, KTO)
    assert (found.desirable_weight, found.undesirable_weight) == exactly((good, bad))
    twice = KTO(balance=balance, desirable_weight=2.0).settle(batch)  # a weight that is given counts on top
    assert isinstance(twice, KTO) and twice.desirable_weight == exactly(2 * good)
    assert balance == "none" or found.advise(batch) == ("", [])  # what it advises, it accepts


@pytest.mark.parametrize("option", ["beta", "desirable_weight", "undesirable_weight"])
def test_out_of_range(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^kto: {option} is 0\.0; expected a number above 0\.$"):
        KTO(**{option: 0.0})
