"""TDPO1 and TDPO2: golden values, what is detached, and what they are equal to (spec 12)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, random_pairs, same_gradient, sigma, softplus
from trimtab.errors import ConfigError, NeedError
from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.tdpo1 import TDPO1
from trimtab.objectives.tdpo2 import TDPO2

Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pair(h: float, d_w: float, d_l: float, dtype: torch.dtype = torch.float64) -> tuple[Pairs, Leaves]:
    """One comparison, one token each: log-ratio h for the chosen and 0 for the rejected, KLs d_w and d_l; its leaves
    (chosen log-prob, rejected log-prob, D(y_w), D(y_l))."""
    one, ref = torch.tensor([1]), torch.tensor([-2.0], dtype=dtype)
    w, l, kw, kl = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (h - 2.0, -2.0, d_w, d_l))  # noqa: E741
    view = Pairs(
        Completions(w, one, ref, {"token_kl": kw}), Completions(l, one, ref, {"token_kl": kl}), torch.tensor([False])
    )
    return view, (w, l, kw, kl)


def test_golden_1() -> None:
    """beta 0.5, h = 3, D_w = 1, D_l = 2.4:  m = 0.5 (3 - 1.4) = 0.8,  L = log(1 + e^-0.8) = 0.371100666
    dL/dm = -sigma(-0.8) = -0.310025518872388; by logp_w times 0.5, by logp_l times -0.5, by D_w times 0.5, by D_l -0.5.
    """
    view, leaves = pair(3.0, 1.0, 2.4)
    loss = TDPO1(beta=0.5).loss(view)
    assert loss.item() == exactly(softplus(-0.8)) == exactly(0.3711006659477777)
    slope = 0.5 * 0.310025518872388
    found = [g.item() for g in torch.autograd.grad(loss.sum(), leaves)]
    assert found == exactly([-slope, slope, -slope, slope])


def test_golden_2() -> None:
    """beta 0.5, alpha 0.25, h = 3, D_w = 1, D_l = 2.4:  m = 0.5 (3 - 0.25 * 1.4) = 1.325
    by logp_w: -0.5 sigma(-1.325); by D_l: +0.5 * 0.25 sigma(-1.325); by D_w nothing, though logp_w keeps its gradient.
    """
    view, (w, l, kw, kl) = pair(3.0, 1.0, 2.4)  # noqa: E741
    loss = TDPO2(beta=0.5, alpha=0.25).loss(view)
    assert loss.item() == exactly(softplus(-1.325))
    slope = 0.5 * sigma(-1.325)
    found = [g.item() for g in torch.autograd.grad(loss.sum(), (w, l, kl), retain_graph=True)]
    assert found == exactly([-slope, slope, 0.25 * slope])
    assert torch.autograd.grad(loss.sum(), kw, allow_unused=True) == (None,)


def with_kl(batch: Pairs, seed: int = 1) -> Pairs:
    noise = torch.Generator().manual_seed(seed)
    for y in (batch.chosen, batch.rejected):
        y._extras["token_kl"] = torch.rand(len(y._token_logps), generator=noise, dtype=torch.float64).requires_grad_()
    return batch


def test_alpha_0_is_dpo_and_alpha_1_is_tdpo1_in_value_only() -> None:
    batch = with_kl(random_pairs())
    leaves = [batch.chosen._token_logps, batch.rejected._token_logps]

    def slope(o: DPO | TDPO1) -> list[list[float]]:
        return [g.tolist() for g in torch.autograd.grad(o.loss(batch).sum(), leaves)]

    assert close(TDPO2(beta=0.3, alpha=0.0).loss(batch), DPO(beta=0.3).loss(batch))
    assert same_gradient(slope(TDPO2(beta=0.3, alpha=0.0)), slope(DPO(beta=0.3)))
    assert close(TDPO2(beta=0.3, alpha=1.0).loss(batch), TDPO1(beta=0.3).loss(batch))
    by_chosen_kl = batch.chosen._extras["token_kl"]
    first = torch.autograd.grad(TDPO1(beta=0.3).loss(batch).sum(), by_chosen_kl)[0]
    assert first.abs().min() > 0


def test_at_the_reference() -> None:
    view, _ = pair(0.0, 0.0, 0.0)
    assert TDPO1().loss(view).item() == exactly(math.log(2)) == TDPO2().loss(view).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    for h in (-1000.0, 1000.0):
        for d in (0.0, 1000.0):
            view, leaves = pair(h, d, 1000.0 - d, dtype)
            loss = TDPO1(beta=1.0).loss(view)
            assert torch.isfinite(loss).all()
            assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), leaves))


def test_the_kl_must_have_been_asked_for() -> None:
    with pytest.raises(NeedError, match="token_kl"):
        TDPO1().loss(random_pairs())


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^tdpo2: alpha is -0\.1; expected a number at least 0\.$"):
        TDPO2(alpha=-0.1)
