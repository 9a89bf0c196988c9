"""The gate of an MLP as one operation: bit by bit the model's own, with less that is kept, and only where the code is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.test_layouts import model_of
from trimtab.logprobs import gate
from trimtab.logprobs.gate import Gate
from trimtab.logprobs.rewritten import restore, rewrite


def mlps(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "gate_proj") and hasattr(m, "down_proj")]


@pytest.mark.parametrize(
    ("kind", "known"), [("llama", True), ("qwen3", True), ("gemma", False), ("seed_oss", False), ("phi3", False)]
)
def test_what_is_replaced(kind: str, known: bool) -> None:
    """gemma's bends otherwise, seed_oss has a dropout, phi3 has one product for both."""
    model = model_of(kind)
    rewrite(model)
    ours = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) is gate._gated]
    assert len(ours) == (2 if known else 0)
    restore(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_and_gradient_are_the_models_own_bit_by_bit(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = model_of("llama")
    mlp, x = mlps(model)[0].to(kind), 3 * torch.randn(2, 7, 32, dtype=kind)

    def learn() -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
            found = mlp(given)
        return [found, *torch.autograd.grad(found.float().pow(2).sum(), [given, *mlp.parameters()])]

    own = learn()
    rewrite(model)
    for ours, theirs in zip(learn(), own, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    g, u = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(Gate.apply(g, u), g / (1 + (-g).exp()) * u, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(Gate.apply, (g, u))


def test_what_is_kept() -> None:
    mlp, kept = mlps(model := model_of("llama"))[0], []
    x = torch.randn(5, 32)

    def wide() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            mlp(x)
        return len({t.data_ptr() for t in kept if t.shape == (5, 48)})

    assert wide() == 4  # g, silu(g), u and their product
    rewrite(model)
    assert wide() == 3


def test_other_types_are_left_to_torch() -> None:
    mlp = mlps(model := model_of("llama"))[0]
    x = torch.randn(5, 32)
    up = mlp.up_proj.forward
    mlp.up_proj.forward = lambda t: up(t).double()
    mlp.down_proj.forward = lambda t: t
    own = mlp(x)
    rewrite(model)
    assert mlp(x).dtype == torch.float64 and torch.equal(mlp(x), own)
