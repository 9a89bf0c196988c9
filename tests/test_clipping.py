"""Clipping inside AdamW's own kernel: the same norm and the same weights as torch's function and then AdamW."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import Optimizer

from tests import tiny
from tests.engine import engine, weights, worst
from trimtab.feedback.records import Comparison
from trimtab.objectives.dpo import DPO
from trimtab.update import trainer as module
from trimtab.update.clipping import clip, divides


def weighted(seed: int, size: float) -> list[nn.Parameter]:
    """A matrix, a vector, a number and one that has learnt nothing, with gradients of about this size."""
    torch.manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape)) for shape in ((40, 7), (9,), (), (3,))]
    for p in made[:3]:
        p.grad = size * torch.randn(p.shape)
    return made


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_as_torch_clips(size: float) -> None:
    ours, theirs = weighted(0, size), weighted(0, size)
    one, other = (AdamW(ps, lr=0.1, fused=True) for ps in (ours, theirs))
    for k in range(4):  # AdamW divides by what it has seen: one step alone would not tell one scale from another
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            a.grad = size * (1 + k) ** 2 * torch.randn(a.shape)
            b.grad = a.grad.clone()
        norm, wanted = clip(one, 2.0), torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        assert torch.allclose(norm, wanted, rtol=1e-5, atol=0)
        one.step()
        other.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)
            if a.grad is not None:  # what a callback sees after the step
                assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=0)


def test_a_step_that_is_not_clipped_follows_one_that_was() -> None:
    (p, *_) = ours = weighted(0, 1e4)
    optimizer = AdamW(ours, lr=0.1, fused=True)
    clip(optimizer, 1.0)
    optimizer.step()
    for q in ours[:3]:
        q.grad = torch.full_like(q, 1e-3)
    clip(optimizer, 1.0)
    optimizer.step()
    assert p.grad is not None and torch.equal(p.grad, torch.full_like(p, 1e-3))


def test_nothing_to_clip() -> None:
    assert clip(AdamW([nn.Parameter(torch.ones(2))], fused=True), 1.0) == 0


def made(kind: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Optimizer:
    return kind([nn.Parameter(torch.zeros(2, dtype=dtype))], lr=0.1, **more)  # type: ignore[no-any-return]


class Another(AdamW):
    """Its step may not look at the scale."""


@pytest.mark.parametrize(("optimizer", "served"), [
    (made(AdamW, fused=True), True), (made(AdamW), False), (made(AdamW, foreach=True), False), (made(SGD, fused=True), False),
    (made(AdamW, torch.float64, fused=True), False), (made(AdamW, torch.bfloat16, fused=True), False),
    (made(Another, fused=True), False), (None, False),
])  # fmt: skip
def test_who_divides(optimizer: Optimizer | None, served: bool) -> None:
    assert divides(optimizer) is served


def test_a_run_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is clipped; the weights are those of the Trainer's own clipping, and so is the norm that is logged."""
    examples, start = tiny.examples(Comparison, 8, seed=5), tiny.model(torch.float32)
    called: list[float] = []
    found = []
    for ours in (True, False):
        monkeypatch.setattr(module, "divides", divides if ours else lambda _: False)
        monkeypatch.setattr(module, "clip", lambda *a: called.append(a[1]) or clip(*a))
        model = copy.deepcopy(start)
        more = {"dtype": torch.float32, "batch_size": 2, "max_grad_norm": 1e-3, "num_train_epochs": 1}
        trainer = engine(model, DPO(), examples, tmp_path, **more)
        trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        found.append((norms, weights(model)))
    assert called == [1e-3] * 4
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and min(found[0][0]) > 1e-2
    assert worst(found[0][1], found[1][1]) < 1e-4 and worst(found[0][1], weights(start)) > 1e-3
