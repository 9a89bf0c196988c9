"""beta-DPO against arithmetic: its beta, its memory, and its draw."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, random_pairs, same_gradient, softplus
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.beta_dpo import BetaDPO
from trimtab.objectives.dpo import DPO

ALL = 1e-12  # a share that leaves nothing out


def state(mean: float, std: float, step: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"gap_mean": torch.tensor(mean, dtype=dtype), "gap_std": torch.tensor(std, dtype=dtype), "step": torch.tensor(step)}  # fmt: skip  # noqa: E501


def seen(*h: float, memory: dict[str, Tensor], **more: Any) -> Pairs:
    return replace(pairs_of(h, **more), memory=memory)


@pytest.mark.parametrize(("gap", "mean"), [("log_ratio", 0.2), ("reward", 0.0)])
def test_golden(gap: str, mean: float) -> None:
    """h = 0.7 and 0.1, mean 0.4; beta 0.5, alpha 0.5.  M = h, M0 = 0.2: b = 0.5 (1 + 0.5 * 0.2) = 0.55
    M = beta h, M0 = 0: b = 0.5 (1 + 0.5 * 0.2) the same.  L = log(1 + e^-0.385) and log(1 + e^-0.055)
    by the chosen token -0.55 sigma(-0.385) and -0.55 sigma(-0.055): nothing flows through b.
    """
    batch = seen(0.7, 0.1, memory=state(mean, 0.5))
    method = BetaDPO(beta=0.5, alpha=0.5, filtered_share=ALL, gap=gap)
    assert method.loss(batch).tolist() == exactly([0.519061993282432, 0.666025257910049])
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.222706839373626, -0.267439405803705])
    assert rejected == exactly([0.222706839373626, 0.267439405803705])
    assert method.metrics(batch)["beta_used"].tolist() == exactly([0.55])
    assert method.reward(batch.chosen).tolist() == exactly([0.175, 0.025])  # with beta, not b


def test_golden_memory() -> None:
    """Mean 0.4, deviation sqrt(0.18) (n - 1). The first batch sets both; the next moves them by a tenth:
    0.9 * 0.2 + 0.1 * 0.4 = 0.22,  0.9 * 0.5 + 0.1 * sqrt(0.18) = 0.492426406871193
    """
    first = BetaDPO().remember(pairs_of([0.7, 0.1]), {})
    assert [first[k].item() for k in ("gap_mean", "gap_std", "step")] == exactly([0.4, math.sqrt(0.18), 1])
    later = BetaDPO().remember(pairs_of([0.7, 0.1]), state(0.2, 0.5))
    assert [later[k].item() for k in ("gap_mean", "gap_std", "step")] == exactly([0.22, 0.492426406871193, 4])
    assert not any(v.requires_grad for v in later.values())


def kept(method: BetaDPO, batch: Pairs) -> list[int]:
    return method.loss(batch).nonzero().flatten().tolist()


def test_kept_pairs_are_scaled_so_that_the_denominator_is_n() -> None:
    """int(0.8 * 7) = 5 of 7, each times 7/5, with the b of those five; the others get no gradient."""
    batch = replace(random_pairs(), memory=state(0.3, 2.0))
    method = BetaDPO(alpha=0.1)
    rows = kept(method, batch)
    assert len(rows) == 5 == method.metrics(batch)["mask_count"] and method.size(batch).sum() == 7
    h = (batch.chosen.log_ratio - batch.rejected.log_ratio).detach()
    b = 0.1 * (1 + 0.1 * (h[rows].mean().item() - 0.3))
    assert method.loss(batch)[rows].tolist() == exactly([7 / 5 * softplus(-b * x) for x in h[rows].tolist()])
    (slope,) = torch.autograd.grad(method.loss(batch).sum(), batch.chosen._token_logps)
    assert (batch.chosen.sum(slope) != 0).nonzero().flatten().tolist() == rows


def test_the_draw_depends_on_step_seed_and_margins_not_on_the_order_of_rows() -> None:
    batch = replace(random_pairs(20), memory=state(0.0, 2.0))
    rows, order = kept(BetaDPO(), batch), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    turned = Pairs(batch.chosen.take(order), batch.rejected.take(order), batch.tie[order], memory=batch.memory)
    assert sorted(order[kept(BetaDPO(), turned)].tolist()) == rows == kept(BetaDPO(), batch)
    assert kept(BetaDPO(filter_seed=1), batch) != rows
    assert kept(BetaDPO(), replace(batch, memory=state(0.0, 2.0, step=4))) != rows
    before = torch.get_rng_state()
    BetaDPO().loss(batch)
    assert torch.equal(torch.get_rng_state(), before)  # a generator of its own


def test_draws_follow_the_gaussian() -> None:
    """One of three (max(1, int(0.9))): P = softmax(-(M - M0)^2 / 2 sigma^2), within 4 standard deviations."""
    h, method, n = [-1.0, 0.5, 2.0], BetaDPO(filtered_share=0.7), 3000
    counts = torch.zeros(3, dtype=torch.float64)
    for step in range(n):
        counts[kept(method, seen(*h, memory=state(0.0, 1.0, step)))] += 1
    p = torch.softmax(-(torch.tensor(h, dtype=torch.float64) ** 2) / 2, 0)
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_no_filter_and_a_fixed_beta_is_dpo() -> None:
    batch, method = replace(random_pairs(), memory=state(0.3, 2.0)), BetaDPO(alpha=1e-14, filtered_share=ALL)
    assert close(method.loss(batch), DPO().loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (method, DPO()))
    assert same_gradient(a, b)


def test_the_first_batch_needs_no_memory() -> None:
    batch = random_pairs()
    assert close(BetaDPO().loss(batch), BetaDPO().loss(replace(batch, memory=BetaDPO().remember(batch, {}))))


@pytest.mark.parametrize("n", [1, 5])
def test_at_the_reference(n: int) -> None:
    """sigma = 0, and the mean loss is ln 2; every pair is as likely as another (the authors' weights are 0/0 there)."""
    batch, method = pairs_of([0.0] * n), BetaDPO()
    assert (method.loss(batch).sum() / method.size(batch).sum()).item() == exactly(math.log(2))
    draws = [kept(method, replace(batch, memory=state(0.0, 0.0, step))) for step in range(30)]
    assert {len(rows) for rows in draws} == {max(1, int(0.8 * n))} and {r for rows in draws for r in rows} == set(
        range(n)
    )


def test_evaluation_is_dpo_on_all_rows() -> None:
    batch = replace(random_pairs(), memory=state(-3.0, 0.1), learning=False)
    assert close(BetaDPO().loss(batch), DPO().loss(batch)) and BetaDPO().metrics(batch) == {}


def test_beta_has_a_floor() -> None:
    """alpha (mean - M0) = 0.6 * (0.4 - 100) is far below -1: b = 0.001."""
    batch = seen(0.7, 0.1, memory=state(100.0, 50.0))
    assert BetaDPO(filtered_share=ALL).metrics(batch)["beta_used"].tolist() == exactly([1e-3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Margins thousands of sigmas away are drawn all the same: weights are compared as logs."""
    for memory in (state(0.0, 1e-3, dtype=dtype), state(1000.0, 0.0, dtype=dtype)):
        batch = seen(1000.0, -1000.0, 1000.0, 0.0, -1000.0, memory=memory, dtype=dtype)
        loss = BetaDPO(beta=1.0).loss(batch)
        assert torch.isfinite(loss).all() and len(kept(BetaDPO(beta=1.0, alpha=1e-9), batch)) <= 4
        slopes = torch.tensor(gradient(BetaDPO(beta=1.0), batch, batch.chosen, batch.rejected))
        assert torch.isfinite(slopes).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0\.0; expected a number above 0\."),
        ({"filtered_share": 1.0}, r"filtered_share is 1\.0; expected a number above 0 and below 1\."),
        ({"update_rate": 1.0}, r"update_rate is 1\.0; expected a number above 0 and below 1\."),
        ({"gap": "h"}, 'gap is "h"; expected one of log_ratio, reward'),
        ({"filter_seed": -1}, r"filter_seed is -1; expected a number at least 0\."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^beta_dpo: {message}"):
        BetaDPO(**options)
