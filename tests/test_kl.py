"""Estimators of the KL: their values, and what each one descends, by enumeration of a softmax over six tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.objectives.by_hand import close, exactly
from trimtab.credit.clip import FAR, ratio
from trimtab.credit.kl import ESTIMATORS, kl
from trimtab.errors import ConfigError


def test_golden() -> None:
    """l = 0.5 and -0.25:  l;  l^2/2 = 0.125, 0.03125;  e^-0.5 - 1 + 0.5, e^0.25 - 1 - 0.25;  times 1.5 and 0.5"""
    x, moved = torch.tensor([0.5, -0.25], dtype=torch.float64), torch.tensor([1.5, 0.5], dtype=torch.float64)
    k3 = [math.exp(-0.5) - 0.5, math.exp(0.25) - 1.25]
    assert kl(x, "k1").tolist() == [0.5, -0.25]
    assert kl(x, "k2").tolist() == exactly([0.125, 0.03125])
    assert kl(x, "k3").tolist() == exactly(k3)
    assert kl(x, "corrected", moved).tolist() == exactly([1.5 * k3[0], 0.5 * k3[1]])


def test_k3_is_never_negative_nor_lost_to_rounding() -> None:
    """Near 0 it is l^2/2: 5e-17 at 1e-8, where e^-l - 1 + l written as it stands is rounding."""
    x = torch.tensor([1e-8, -1e-8, 3e-7, -3e-7], dtype=torch.float64)
    assert kl(x, "k3").tolist() == pytest.approx((x**2 / 2).tolist(), rel=1e-6, abs=0)
    assert (kl(torch.linspace(-30, 30, 1001, dtype=torch.float64), "k3") >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_log_ratios_of_1000(estimator: str, dtype: torch.dtype) -> None:
    """Finite, in value and gradient; k3 is l - 1 upwards, and constant below -20."""
    x = torch.tensor([1000.0, -1000.0, 25_000.0, -25_000.0, 0.0], dtype=dtype, requires_grad=True)
    moved = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0, 0.0], dtype=dtype, requires_grad=True)
    found = kl(x, estimator, ratio(moved))
    slopes = torch.autograd.grad(found.sum(), [x, moved], allow_unused=True)
    assert found.isfinite().all() and all(s is None or s.isfinite().all() for s in slopes)
    if estimator == "k3":
        assert found[0].item() == 999 and slopes[0].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]
        assert found[1].item() == found[3].item() == pytest.approx(math.expm1(FAR) - FAR)


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r'^kl: the estimator is "k4"; expected one of k1, k2, k3, corrected\.$'):
        kl(torch.zeros(1), "k4")
    with pytest.raises(ConfigError, match=r'^kl: "corrected" was asked for without a ratio; pass pi/pi_old'):
        kl(torch.zeros(1), "corrected")


# --- by enumeration -------------------------------------------------------------------------------------------------------

noise = torch.Generator().manual_seed(0)
LOGITS, REF, OLD = (torch.randn(6, generator=noise, dtype=torch.float64) for _ in range(3))
REF, OLD = REF.log_softmax(0), OLD.log_softmax(0)


def policy() -> tuple[Tensor, Tensor, Tensor]:
    """(logits, log pi, pi without a gradient) of every token."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    return logits, logp, logp.detach().exp()


def slope(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def reverse(logp: Tensor) -> Tensor:
    """KL(pi || pi_ref)"""
    return (logp.exp() * (logp - REF)).sum()


def forward(logp: Tensor) -> Tensor:
    """KL(pi_ref || pi)"""
    return (REF.exp() * (REF - logp)).sum()


def test_three_of_them_are_unbiased() -> None:
    """k1 and k3 on-policy, corrected on tokens of another policy, where k1 and k3 are not; k2 is another number."""
    _, logp, p = policy()
    wanted = reverse(logp).item()
    for estimator in ("k1", "k3"):
        assert (p * kl(logp - REF, estimator)).sum().item() == exactly(wanted)
        assert abs((OLD.exp() * kl(logp - REF, estimator)).sum().item() - wanted) > 0.1
    assert (OLD.exp() * kl(logp - REF, "corrected", ratio(logp - OLD))).sum().item() == exactly(wanted)
    assert abs((p * kl(logp - REF, "k2")).sum().item() - wanted) > 0.01


def test_what_each_descends_as_a_loss() -> None:
    """Mean gradients: of k1 0, of k2 grad KL(pi || ref), of k3 grad KL(ref || pi), of corrected grad KL(pi || ref)."""
    logits, logp, p = policy()
    on = ratio(logp - logp.detach())
    found = {e: slope((p * kl(logp - REF, e, on)).sum(), logits) for e in ESTIMATORS}
    assert found["k1"].abs().max() < 1e-12
    assert close(found["k2"], slope(reverse(logp), logits))
    assert close(found["k3"], slope(forward(logp), logits))
    assert close(found["corrected"], slope(reverse(logp), logits))
    assert not close(slope(forward(logp), logits), slope(reverse(logp), logits), 0.05)


def test_only_the_corrected_one_descends_it_on_answers_of_an_older_policy() -> None:
    logits, logp, _ = policy()
    wanted = slope(reverse(logp), logits)
    found = {e: slope((OLD.exp() * kl(logp - REF, e, ratio(logp - OLD))).sum(), logits) for e in ESTIMATORS}
    assert close(found["corrected"], wanted)
    assert not any(close(found[e], wanted, 0.02) for e in ("k1", "k2", "k3"))


def test_what_each_descends_in_the_reward() -> None:
    """REINFORCE, E[k grad log pi], with k a number: only k1 is grad KL(pi || ref); k2 and k3 miss it by their own slope."""
    logits, logp, p = policy()
    fixed = (logp - REF).detach()
    found = {e: slope((p * kl(fixed, e, torch.ones(6)) * logp).sum(), logits) for e in ESTIMATORS}
    descends = slope(reverse(logp), logits)
    mean_k2 = slope((logp.exp() * kl(logp - REF, "k2")).sum(), logits)
    assert close(found["k1"], descends)
    assert close(found["k2"], mean_k2 - descends)
    assert close(found["k3"], descends - slope(forward(logp), logits)) and close(found["corrected"], found["k3"])
    assert not any(close(found[e], descends, 0.05) for e in ("k2", "k3"))
