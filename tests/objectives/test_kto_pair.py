"""Paired KTO against arithmetic, its two reference points, and unpaired KTO."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, same_gradient
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs, Thumbs
from trimtab.objectives.apo_zero_unpaired import APOZeroUnpaired
from trimtab.objectives.kto_pair import KTOPair


def pairs(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> Pairs:
    """Single-token answers with these log-ratios."""
    w, l = (completions([[x] for x in rho], [[0.0]] * len(rho), dtype) for rho in (chosen, rejected))  # noqa: E741
    return Pairs(w, l, torch.zeros(len(chosen), dtype=torch.bool))


@pytest.mark.parametrize(
    ("detach", "chosen", "rejected"),
    [
        (True, [-0.0621497516693858, -0.0624609537702791], [0.0615335206843996, 0.0621497516693858]),
        (False, [-0.123991387846278, -0.124302589947172], [0.123838873404232, 0.124455104389218]),
    ],
)
def test_golden(detach: bool, chosen: list[float], rejected: list[float]) -> None:
    """rho_w 0.5, 0.1: KL_w = 0.3; rho_l -0.2, 0.6: KL_l = 0.2. beta 0.5.
    u_w = 0.5 (0.5 - 0.2), 0.5 (0.1 - 0.2) = 0.15, -0.05;   u_l = 0.5 (0.3 + 0.2), 0.5 (0.3 - 0.6) = 0.25, -0.15
    L = (sigma(-u_w) + sigma(-u_l)) / 2 = 0.450196826885226, 0.52496362091398
    With s = 0.25 sigma(u) sigma(-u): dL/drho_w = -s(u_w), dL/drho_l = s(u_l) where the KLs are held; else every rho_w has
    half of -(sum of s(u_l)) more, through KL_w, and every rho_l half of the sum of s(u_w), through KL_l.
    """
    batch, method = pairs([0.5, 0.1], [-0.2, 0.6]), KTOPair(beta=0.5, detach=detach)
    assert method.loss(batch).tolist() == exactly([0.450196826885226, 0.52496362091398])
    assert gradient(method, batch, batch.chosen, batch.rejected) == [exactly(chosen), exactly(rejected)]
    assert {k: v.item() for k, v in method.metrics(batch).items()} == exactly({"kl/chosen": 0.3, "kl/rejected": 0.2})


def test_at_the_reference() -> None:
    assert KTOPair().loss(pairs([0.0, 0.0], [0.0, 0.0])).tolist() == exactly([0.5, 0.5])


@pytest.mark.parametrize("detach", [True, False])
def test_both_divergences_0_is_unpaired_kto_with_reference_point_0(detach: bool) -> None:
    """n pairs as 2n thumbs: the same mean and gradient of the mean. The clamp stops the gradient."""
    batch = pairs([0.5, -1.0], [-0.3, 0.1])
    a, b = KTOPair(beta=0.5, detach=detach).loss(batch), APOZeroUnpaired(beta=0.5).loss(batch.seen_as(Thumbs))
    assert close(a.mean(), b.mean())
    leaves = [batch.chosen._token_logps, batch.rejected._token_logps]
    slopes = [[g.tolist() for g in torch.autograd.grad(x.mean(), leaves)] for x in (a, b)]
    assert same_gradient(*slopes)


def test_each_half_is_held_against_the_other() -> None:
    """Chosen answers risen by 1 everywhere: the rejected ones are held against 1, the chosen ones against 0."""
    loss = KTOPair(beta=1.0).loss(pairs([1.0, 1.0], [0.0, 0.0]))
    wanted = (torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64)) + torch.sigmoid(torch.tensor(-1.0).double())) / 2
    assert close(loss, wanted.expand(2))


def test_the_mean_is_clamped_not_each_term() -> None:
    batch = pairs([3.0, -1.0], [-5.0, -5.0])
    assert KTOPair().metrics(batch)["kl/chosen"].item() == exactly(1.0)
    assert KTOPair().metrics(batch)["kl/rejected"].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach", [True, False])
def test_log_ratios_of_1000(dtype: torch.dtype, detach: bool) -> None:
    batch, method = pairs([1000.0, -3000.0], [-1000.0, -1000.0], dtype), KTOPair(beta=1.0, detach=detach)
    assert method.loss(batch).tolist() == [0.0, 0.5]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, 0.0], [0.0, 0.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^kto_pair: beta is -1; expected a number above 0\.$"):
        KTOPair(beta=-1)
