"""Norms as one operation: the model's own numbers, the gradient of float64, and only where the model's code is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.engine import WHOLE, engine, frozen, other_model, step
from tests.test_layouts import SHARED, model_of, own_numbers
from trimtab.feedback.records import Comparison
from trimtab.logprobs import norm
from trimtab.logprobs.layout import cost
from trimtab.logprobs.norm import RootMeanSquare, fuse, unfuse
from trimtab.logprobs.score import Scorer, casts_kept, install, uninstall, uninstalled
from trimtab.objectives import objective_class

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
    fuse(model)
    found = replaced(model)
    rounded = found.count(norm._normed_for_products)
    assert (rounded, bool(found)) == {ALL: (4, True), NORMS: (0, True), NONE: (0, False)}[FOUND[kind]]
    unfuse(model)
    assert not replaced(model)


def test_the_model_is_what_it_was_once_uninstalled() -> None:
    model = model_of("llama")
    install(model, torch.float32, "shared")
    assert len(replaced(model)) == 6  # two layers' four, the last one, and the model's own forward
    with uninstalled(model):
        assert not replaced(model)
    assert len(replaced(model)) == 6
    uninstall(model)
    assert not replaced(model)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    formula = w * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    assert torch.allclose(RootMeanSquare.apply(x, w, 0.1, None), formula, rtol=1e-14, atol=0)
    inputs = (x.requires_grad_(), w.requires_grad_(), 0.1, None)
    assert torch.autograd.gradcheck(RootMeanSquare.apply, inputs)


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
    fuse(model)
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
    fuse(model)
    assert torch.equal(own_numbers(model), plain)
    states = torch.randn(1, 4, 32)
    layer: Any = model.model.layers[0]  # type: ignore[union-attr, index]
    assert layer.input_layernorm(states).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.input_layernorm(states).dtype == torch.bfloat16
        assert model.model.norm(states).dtype == torch.float32  # type: ignore[union-attr, operator]
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype).model.layers[0].input_layernorm(states.to(dtype)).dtype == dtype


class Casts(TorchDispatchMode):
    """How often weights of this shape were converted: any, or those of a model."""

    def __init__(self, shape: tuple[int, int], model: nn.Module | None = None) -> None:
        super().__init__()
        self.count, self.shape = 0, shape
        self.weights = None if model is None else {p.data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += self.weights is None or args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_once_and_learn_from_every_pass() -> None:
    weight, x = nn.Parameter(torch.eye(7)), torch.ones(2, 7)

    def gradient() -> torch.Tensor:
        weight.grad = None
        for scale in (1.0, 2.0):
            with torch.autocast("cpu", torch.bfloat16):
                found = nn.functional.linear(scale * x, weight)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                nn.functional.linear(x, weight)
            found.float().sum().backward()
        assert weight.grad is not None
        return weight.grad

    with Casts((7, 7)) as apart:
        wanted = gradient()
    with Casts((7, 7)) as together, casts_kept():
        found = gradient()
    assert torch.equal(found, wanted) and found[0, 0] == 6
    assert (apart.count, together.count) == (4 + 2, 1 + 2)  # and the way back, of each pass that learns
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weight.zero_()
        assert nn.functional.linear(x, weight).abs().sum() == 0  # nothing is kept afterwards


@pytest.mark.parametrize(("name", "passes"), [("kto", 2), ("dpo", 3)])
def test_a_step_converts_a_weight_once(name: str, passes: int, tmp_path: Path) -> None:
    model, objective = tiny.model(torch.float32), objective_class(name)()
    examples = tiny.examples(objective.feedback.record, 6, seed=5)
    reference = frozen(other_model(torch.float32), "shared", torch.bfloat16)
    budget = WHOLE if name == "kto" else max(cost(e, "shared") for e in examples)
    trainer = engine(model, objective, examples, tmp_path, budget=budget, reference=reference, dtype=torch.bfloat16)
    found = []
    plain = model.forward
    model.forward = lambda *a, **k: found.append(1) or plain(*a, **k)  # type: ignore[func-returns-value]
    with Casts((48, 32), model) as casts:
        step(trainer, examples)
    assert len(found) >= passes
    assert casts.count == 2 * 2  # gate and up, in two layers


def test_scoring_converts_a_weight_once() -> None:
    model, examples = tiny.model(torch.float32), tiny.examples(Comparison, 6, seed=5)
    install(model, torch.bfloat16, "shared")
    scorer = Scorer(model, "shared", max(cost(e, "shared") for e in examples))
    assert len(scorer.microbatches(examples)) > 2
    with Casts((48, 32), model) as casts:
        scorer.score_all(examples)
    assert casts.count == 2 * 2
