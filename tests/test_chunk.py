"""Chunked token log-probs equal log-softmax over whole logits, in value and gradient, at every block border."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.logprobs import chunk
from trimtab.logprobs.chunk import token_logps

ROWS, VOCAB = 8, 16  # blocks in these tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "ROWS_FLOAT32", ROWS)
    monkeypatch.setattr(chunk, "ROWS_BFLOAT16", ROWS)
    monkeypatch.setattr(chunk, "VOCAB_BFLOAT16", VOCAB)


def whole(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    logits = scale * (hidden @ weight.T) + (0 if bias is None else bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.fixture(autouse=True, params=[0, chunk.KEPT], ids=["computed again", "kept"])
def kept_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "KEPT", request.param)


def case(n: int, v: int, dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """([hidden, weight, bias] as leaves, targets at the borders of blocks, incoming gradient)."""
    g = torch.Generator().manual_seed(n * 1000 + v)
    leaves = [torch.randn(n, 6, generator=g), torch.randn(v, 6, generator=g), torch.randn(v, generator=g)]
    borders = torch.tensor([0, v - 1, min(VOCAB - 1, v - 1), min(VOCAB, v - 1)])
    target = borders[torch.arange(n) % 4]
    return [x.to(dtype).requires_grad_() for x in leaves[: 3 if bias else 2]], target, torch.randn(n, generator=g)


def both(
    n: int, v: int, dtype: torch.dtype, bias: bool, scale: float, softcap: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients by hidden, weight and bias: ours in ``dtype``, and whole logits in float64 of the same input."""
    leaves, target, incoming = case(n, v, dtype, bias)
    ours = token_logps(leaves[0], leaves[1], target, bias=leaves[2] if bias else None, scale=scale, softcap=softcap)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = [ours, *torch.autograd.grad(ours, leaves, incoming.to(ours))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    plain = whole(exact[0], exact[1], target, exact[2] if bias else None, scale, softcap)
    return found, [plain, *torch.autograd.grad(plain, exact, incoming.double())]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("v", [1, VOCAB - 1, VOCAB, VOCAB + 1, 2 * VOCAB, 2 * VOCAB + 3])
@pytest.mark.parametrize("n", [1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS])
def test_equals_log_softmax(n: int, v: int, dtype: torch.dtype) -> None:
    for bias, scale, softcap in ((False, 1.0, 0.0), (True, 1.0, 0.0), (True, 0.6, 3.0)):
        for ours, plain in zip(*both(n, v, dtype, bias, scale, softcap), strict=True):
            apart = (ours.double() - plain).abs().max()
            assert apart <= TOLERANCE[dtype] * plain.abs().max().clamp(min=1)


def test_gradient_is_the_slope() -> None:
    leaves, target, _ = case(5, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w, b: token_logps(h, w, target, bias=b, scale=0.7, softcap=2.0), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_10000(dtype: torch.dtype) -> None:
    """One logit is 10000 above the others: log p is 0 or -10000, nothing overflows."""
    hidden = torch.tensor([[100.0], [100.0]], dtype=dtype, requires_grad=True)
    weight = torch.zeros(3 * VOCAB, 1, dtype=dtype)
    weight[VOCAB] = 100.0
    found = token_logps(hidden, weight, torch.tensor([VOCAB, 0]))
    found.sum().backward()
    assert found.tolist() == pytest.approx([0, -9984 if dtype == torch.bfloat16 else -10000])
    assert hidden.grad is not None and hidden.grad[:, 0].tolist() == pytest.approx([0, -100])


def test_frozen_head_gets_no_gradient() -> None:
    (hidden, weight, bias), target, _ = case(5, 7, torch.float64)
    weight, bias = weight.detach(), bias.detach()
    token_logps(hidden, weight, target, bias=bias).sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, ROWS * 160), (torch.bfloat16, ROWS * VOCAB)], ids=str)
def test_no_more_than_a_block_of_logits_is_ever_held(dtype: torch.dtype, block: int) -> None:
    leaves, target, _ = case(64, 160, dtype, bias=False)
    with _Largest() as seen:
        token_logps(leaves[0], leaves[1], target).sum().backward()
    assert seen.size <= max(block, 160 * 6) < 64 * 160  # the head itself is 160 * 6


@pytest.mark.parametrize("kept", [0, chunk.KEPT])
def test_a_second_backward_gives_the_same(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities that were kept are overwritten by the first."""
    monkeypatch.setattr(chunk, "KEPT", kept)
    leaves, target, incoming = case(ROWS, 7, torch.float64)
    found = token_logps(leaves[0], leaves[1], target, bias=leaves[2])
    twice = [torch.autograd.grad(found, leaves, incoming.double(), retain_graph=True) for _ in range(2)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*twice, strict=True))
