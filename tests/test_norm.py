"""Norms as one operation: the model's own numbers, the gradient of float64, and only where the model's code is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.test_layouts import SHARED, model_of, own_numbers
from trimtab.logprobs import norm
from trimtab.logprobs.norm import RootMeanSquare
from trimtab.logprobs.rewritten import restore, rewrite
from trimtab.logprobs.score import install, uninstall, uninstalled

ALL, NORMS, NONE = "rounded for products", "norms", "nothing"
# What is replaced in two layers of each model. A norm behind attention, or one that experts read, is never rounded.
FOUND = {
    "llama": ALL,
    "mistral": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "smollm3": ALL,
    "seed_oss": NORMS,  # its MLP has a dropout
    "qwen3_moe": NORMS,
    "mixtral": NORMS,
    "deepseek_v3": NORMS,
    "phi3": NORMS,
    "gemma2": NONE,
    "olmo2": NONE,
    "cohere": NONE,
    "gpt2": NONE,
    "gpt_neox": NONE,
}


def replaced(model: nn.Module) -> list[Any]:
    return [getattr(vars(m).get("forward"), "__func__", None) for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_replaced(kind: str) -> None:
    assert kind in SHARED
    model = model_of(kind)
    rewrite(model)
    found = [forward for forward in replaced(model) if forward in norm.FORWARDS]
    rounded = found.count(norm._normed_for_products)
    assert (rounded, bool(found)) == {ALL: (4, True), NORMS: (0, True), NONE: (0, False)}[FOUND[kind]]
    restore(model)
    assert not replaced(model)


def test_the_model_is_what_it_was_once_uninstalled() -> None:
    model = model_of("llama")
    install(model, torch.float32, "shared")
    # norms, four and the last; two gates; two attentions; the last layer; 15 linear maps; the model's own forward
    assert len(replaced(model)) == 26
    with uninstalled(model):
        assert not replaced(model)
    assert len(replaced(model)) == 26
    uninstall(model)
    assert not replaced(model)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    formula = w * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    assert torch.allclose(RootMeanSquare.apply(x, w, 0.1, None), formula, rtol=1e-14, atol=0)
    inputs = (x.requires_grad_(), w.requires_grad_(), 0.1, None)
    assert torch.autograd.gradcheck(RootMeanSquare.apply, inputs)
    slope = torch.randn(2, 3, 5, dtype=torch.float64)
    before = slope.clone()
    torch.autograd.grad(RootMeanSquare.apply(*inputs), inputs[:2], slope)
    assert torch.equal(slope, before)  # it may be somebody else's


@pytest.mark.parametrize("low", [False, True])
def test_the_forward_pass_is_the_models_own_bit_by_bit(low: bool) -> None:
    """And the gradient is as near to float64's as the model's own."""
    torch.manual_seed(1)
    model = model_of("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(3, 60, (2, 40))

    def gradient(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model.to(dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low and dtype == torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.double().log_softmax(-1)[..., 5].sum().backward()
        return logits.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters()])  # type: ignore[union-attr]

    _, exact = gradient(torch.float64)
    theirs, own = gradient(torch.float32)
    rewrite(model, [norm])
    found, ours = gradient(torch.float32)
    assert torch.equal(found, theirs)
    assert not torch.equal(ours, own)
    off, allowed = (ours - exact).norm() / exact.norm(), (own - exact).norm() / exact.norm()
    assert off < 1.2 * allowed + 1e-7, (off, allowed)
    assert off < (0.05 if low else 1e-5)


def test_rounding_is_autocasts_alone() -> None:
    """Outside autocast, in float64 and in bfloat16 weights the model's own numbers come back in its own types."""
    model = model_of("llama")
    plain = own_numbers(model)
    rewrite(model, [norm])
    assert torch.equal(own_numbers(model), plain)
    states = torch.randn(1, 4, 32)
    layer: Any = model.model.layers[0]  # type: ignore[union-attr, index]
    assert layer.input_layernorm(states).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.input_layernorm(states).dtype == torch.bfloat16
        assert model.model.norm(states).dtype == torch.float32  # type: ignore[union-attr, operator]
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype).model.layers[0].input_layernorm(states.to(dtype)).dtype == dtype
