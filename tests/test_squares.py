"""Attention in matrix products: the numbers and the gradient of torch's own, of the model's own, and only where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_layouts as layouts
from trimtab.logprobs import attention, layout, squares
from trimtab.logprobs.layout import Block, Kept

CUT = {"whole": (16, 96, 512), "in chunks": (4, 8, 512), "computed again": (4, 8, 8)}  # UNIT, ROWS and KEPT
PLAIN = ["llama", "gpt2", "deepseek_v3", "mistral", "qwen2 window", "gemma3_text", "llama tied multi-query"]


@pytest.fixture(params=CUT)
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every type in products, however short; what was asked of them."""
    unit, rows, kept = CUT[request.param]
    monkeypatch.setattr(squares, "UNIT", unit)
    for kind in (torch.bfloat16, torch.float32, torch.float64):
        monkeypatch.setitem(squares.ROWS, kind, rows)
        monkeypatch.setitem(squares.KEPT, kind, kept)
        monkeypatch.setitem(attention.PAYS, kind, (1, 10**6))
    asked: list[Any] = []
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *words: (asked.append(words), right(*words))[1])
    return asked


def tensors(tokens: int, kind: torch.dtype = torch.float64) -> list[Tensor]:
    """Six heads, two of keys and values, which are wider."""
    torch.manual_seed(0)
    shapes = ((6, 8), (2, 8), (2, 10))
    return [torch.randn(1, heads, tokens, width, dtype=kind, requires_grad=True) for heads, width in shapes]


def run(blocks: list[Block], qkv: list[Tensor], **more: Any) -> list[Tensor]:
    """Attention and its gradients, along a slope that no row shares."""
    found, _ = attention.grouped_attention(torch.nn.Module(), *qkv, None, trimtab_blocks=blocks, scaling=0.4, **more)
    slope = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).cos().view(found.shape)
    return [found, *torch.autograd.grad(found, qkv, slope.to(found.dtype))]


OPENED = [(9, 3, [7]), (19, 1, [1]), (21, 2, [3, 4]), (30, 1, [6, 0, 8])]
BLOCKS = {
    "one completion each": lambda: [Block(0, 5, [4]), Block(9, 1, [1]), Block(11, 13, [10])],
    "completions under a mask": lambda: [Block(0, 5, [3, 4]), Block(12, 2, [9, 1, 0, 12])],
    "one opening": lambda: [Block(0, 9, []), *(Block(a, *b, (slice(0, 9),)) for a, *b in OPENED)],
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_attention(
    name: str, apart: bool, window: int | None, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:  # a product for the prompt, and one for each completion
        monkeypatch.setattr(layout, "APART", -(10**9))
    blocks = BLOCKS[name]()
    qkv = tensors(blocks[-1].stop)
    found = run(blocks, qkv, sliding_window=window)
    assert len(taken) == 1
    monkeypatch.setattr(attention, "PRODUCTS", False)
    wanted = run(BLOCKS[name](), qkv, sliding_window=window)
    assert len(taken) == 1
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_what_is_no_number_stays_in_its_group(taken: list[Any]) -> None:
    """So that a run that stops names the row that it came from."""
    qkv = tensors(34)
    with torch.no_grad():
        for t in qkv:
            t[:, :, :9] = torch.nan
    found = run(BLOCKS["one completion each"](), qkv)
    assert len(taken) == 1
    for t in (found[0].transpose(1, 2), *found[1:]):
        assert t[:, :, :9].isnan().all() and t[:, :, 9:].isfinite().all()


@pytest.mark.parametrize("window", [None, 4])
def test_it_goes_on_from_another_pass(window: int | None, taken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Module()
    old_q, old_k, old_v = tensors(30)
    kept = Kept({module: (old_k.detach(), old_v.detach())}, closed=True)

    def after() -> list[Tensor]:
        before = [(slice(3, 12),), (slice(0, 2), slice(20, 21)), (slice(0, 2), slice(12, 19))]
        blocks = [Block(a, 0, [n], b, elsewhere=True) for a, n, b in zip((0, 6, 7), (6, 1, 11), before, strict=True)]
        words = {"trimtab_blocks": blocks, "trimtab_kept": kept, "scaling": 0.4, "sliding_window": window}
        qkv = [t[:, :, :18].detach().requires_grad_() for t in (old_q, old_k + 1, old_v - 1)]
        found, _ = attention.grouped_attention(module, *qkv, None, **words)
        return [found, *torch.autograd.grad(found.square().sum(), qkv)]

    found = after()
    assert len(taken) == 1
    monkeypatch.setattr(attention, "PRODUCTS", False)
    for ours, theirs in zip(found, after(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences(taken: list[Any]) -> None:
    blocks = [Block(0, 3, [2, 4]), Block(9, 4, [6], (slice(0, 3),)), Block(19, 1, [2, 1], (slice(0, 3),))]

    def attend(*qkv: Tensor) -> Tensor:
        return attention.grouped_attention(torch.nn.Module(), *qkv, None, trimtab_blocks=blocks, scaling=0.4)[0]

    assert torch.autograd.gradcheck(attend, tensors(23))
    assert taken


def test_bfloat16_is_attention_within_what_8_bits_may_do(taken: list[Any]) -> None:
    """Queries and keys come in float32 from rotary embeddings, and their gradients go back in it."""
    qkv = tensors(12)
    exact = run([Block(0, 5, [3, 4])], qkv)
    q, k, v = (t.detach().float().requires_grad_() for t in qkv)
    with torch.autocast("cpu", torch.bfloat16):
        found = run([Block(0, 5, [3, 4])], [q, k, v.detach().bfloat16().requires_grad_()])
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("kind", PLAIN)
def test_loss_and_gradient_are_those_of_the_twin(kind: str, taken: list[Any]) -> None:
    for mode in ("shared", "packed"):
        logps, loss, gradient = layouts.twin(kind)[mode]
        assert logps < 2e-6 and loss < 1e-7 and gradient < 1e-6, mode
    assert taken


@pytest.mark.parametrize("kind", PLAIN)
def test_other_completions_go_on_from_the_prompts_of_a_pass(kind: str, taken: list[Any]) -> None:
    layouts.test_other_completions_go_on_from_the_prompts_of_a_pass(kind)
    assert taken


@pytest.mark.parametrize(
    ("kind", "tokens", "products"),
    [
        (torch.bfloat16, 2, True),
        (torch.bfloat16, 1025, True),
        (torch.float32, 128, False),
        (torch.float32, 129, True),
        (torch.float32, 1024, True),
        (torch.float32, 1025, False),
        (torch.float64, 300, False),  # in which models are checked: torch's own
    ],
)
def test_products_are_taken_where_they_pay(
    kind: torch.dtype, tokens: int, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *words: (asked.append(words), right(*words))[1])
    qkv = [torch.zeros(1, 1, tokens + 3, 8, dtype=kind)] * 3
    attention.grouped_attention(
        torch.nn.Module(), *qkv, None, trimtab_blocks=[Block(0, tokens, []), Block(tokens, 3, [])]
    )
    assert bool(asked) == products
    asked.clear()
    attention.grouped_attention(torch.nn.Module(), *qkv, None, trimtab_blocks=[Block(0, tokens, [3])], softcap=2.0)
    assert not asked


@pytest.mark.parametrize(("tokens", "kept"), [(1024, True), (1040, False)])
def test_the_weights_of_long_squares_are_not_kept(tokens: int, kept: bool) -> None:
    qkv = [torch.zeros(1, 1, tokens, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        attention.grouped_attention(torch.nn.Module(), *qkv, None, trimtab_blocks=[Block(0, tokens, [])])
    assert (max(sizes) > 100 * tokens) == kept
