"""Rotary embeddings as one operation: the model's own numbers, and only where the code is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.test_layouts import model_of
from trimtab.logprobs import rotary
from trimtab.logprobs.rewritten import restore, rewrite
from trimtab.logprobs.rotary import Rotation, rotated


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("llama", True),
        ("mistral", True),
        ("qwen3", True),
        ("gemma2", True),
        ("phi3", False),
        ("cohere", False),
        ("gpt2", False),
    ],
)
def test_what_is_replaced(kind: str, known: bool) -> None:
    """phi3 turns a part of each head only, cohere interleaves the halves, gpt2 has none."""
    model = model_of(kind)
    rewrite(model)
    ours = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) in rotary.FORWARDS]
    assert len(ours) == (2 if known else 0)
    restore(model)
    assert not any("forward" in vars(m) for m in model.modules())


def drawn(kind: torch.dtype, angles: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 8).to(kind).transpose(1, 2), torch.randn(2, 7, 1, 8).to(kind).transpose(1, 2)
    position = torch.rand(2, 7, 4, dtype=torch.float64) * 6
    position = torch.cat((position, position), -1)
    return [q, k, position.cos().to(angles), position.sin().to(angles)]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_numbers_are_the_models_own(kind: torch.dtype) -> None:
    given = drawn(kind, kind)
    for ours, theirs in zip(rotated(*given), apply_rotary_pos_emb(*given), strict=True):
        assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=0, atol=4 * torch.finfo(kind).eps)


def test_under_autocast_it_is_rounded_as_attention_would_round_it() -> None:
    given = drawn(torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotated(*given)
    for ours, theirs in zip(found, apply_rotary_pos_emb(*given), strict=True):
        assert theirs.dtype == torch.float32 and ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.to(torch.bfloat16))


@pytest.mark.parametrize(("kind", "angles"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_other_types_take_the_models_own_way(kind: torch.dtype, angles: torch.dtype) -> None:
    given = drawn(kind, angles)
    for ours, theirs in zip(rotated(*given), apply_rotary_pos_emb(*given), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Of any two halves of the angles, not of equal ones alone."""
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(2, 3, 5, 6, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, cos, sin), x.requires_grad_())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_a_models_numbers_and_gradient(kind: str) -> None:
    torch.manual_seed(0)
    model = model_of(kind).double()
    ids = torch.randint(3, 60, (2, 9))

    def learn() -> list[Any]:
        found = model(ids, use_cache=False).logits
        return [found, *torch.autograd.grad(found.pow(2).sum(), [p for p in model.parameters() if p.requires_grad])]

    own = learn()
    rewrite(model)
    assert any(getattr(vars(m).get("forward"), "__func__", None) in rotary.FORWARDS for m in model.modules())
    for ours, theirs in zip(learn(), own, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)  # transformers' norms round to float32
