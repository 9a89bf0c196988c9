"""Linear maps by oneDNN: the same numbers as torch's own products, and weights laid out once only while they do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.test_layouts import model_of
from trimtab import run
from trimtab.logprobs import products
from trimtab.logprobs.products import Linear, times, weights_packed
from trimtab.logprobs.rewritten import restore, rewrite
from trimtab.logprobs.score import Scorer, install
from trimtab.tokens.batch import Example

pytestmark = pytest.mark.skipif(not products._has_onednn(), reason="this torch has no oneDNN linear operation")


@pytest.fixture
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that MKL has no AVX-512 code for."""
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)


@pytest.mark.parametrize(("kind", "count"), [("llama", 15), ("phi3", 9), ("gpt2", 1)])
def test_what_is_replaced(kind: str, count: int) -> None:
    """Every linear map of two layers and the head; gpt2's own kind of it is left alone."""
    model = model_of(kind)
    rewrite(model)
    assert sum(getattr(vars(m).get("forward"), "__func__", None) is products._linear for m in model.modules()) == count
    restore(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_what_somebody_else_has_replaced_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].forward = lambda x: 2 * x  # type: ignore[method-assign]
    rewrite(model)
    assert model[0](torch.ones(1, 3)).tolist() == [[2, 2, 2]] and "forward" in vars(model[1])
    restore(model)
    assert "forward" in vars(model[0]) and "forward" not in vars(model[1])


@pytest.mark.parametrize(
    ("about", "quicker"),
    [
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),  # AMX is hidden from many virtual machines
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("", False),
    ],
)
def test_the_precision_that_auto_takes(about: str, quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_processor", lambda: about)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "bfloat16_is_quicker", products.bfloat16_is_quicker.__wrapped__)
    assert run.resolve_precision("auto") is (torch.bfloat16 if quicker else torch.float32)
    assert run.resolve_precision("bfloat16") is torch.bfloat16


LAYOUTS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "rows of a wider one": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "columns of a higher one": lambda t: torch.cat((t, t)).T.contiguous().T[: t.shape[0]],
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_a_product_however_it_lies(left: str, right: str, slow_mkl: None) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 33), torch.randn(19, 33)
    given: list[Any] = []
    real = products._onednn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_onednn", lambda *t: given.extend(t) or real(*t))
        found = times(LAYOUTS[left](a), LAYOUTS[right](b))
    assert found.shape == (7, 19)
    assert given[1].is_contiguous() or given[1].T.is_contiguous()  # else oneDNN crawls
    assert torch.allclose(found.double(), a.double() @ b.double().T, rtol=0, atol=1e-5)


def test_a_slope_that_is_one_number_for_all(slow_mkl: None) -> None:
    assert torch.equal(times(torch.ones(1, 1).expand(4, 6), torch.ones(5, 6)), torch.full((4, 5), 6.0))


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 4)])
def test_few_rows(shape: tuple[int, int], slow_mkl: None) -> None:
    x, w = torch.randn(shape), torch.randn(3, 4)
    assert torch.allclose(times(x, w), x @ w.T, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5), (4,)))
    assert torch.allclose(Linear.apply(x, w, b), linear(x, w, b), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(Linear.apply, (x, w, b))
    assert torch.autograd.gradcheck(Linear.apply, (x, w, None))


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_in_float32(bias: bool, slow_mkl: None) -> None:
    """oneDNN ran, for the result and both gradients, and all three are float64's but for rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24, bias=bias))
    rewrite(model)
    x = torch.randn(2, 9, 40, requires_grad=True)
    slope = torch.randn(2, 9, 24)
    called: list[Any] = []
    real = products._onednn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_onednn", lambda *t: called.append(t) or real(*t))
        inputs = [x, *model.parameters()]
        found = model(x)
        slopes = torch.autograd.grad(found, inputs, slope)
    assert len(called) == 3
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = linear(*exact)
    for ours, theirs in zip(
        (found, *slopes), (wanted, *torch.autograd.grad(wanted, exact, slope.double())), strict=True
    ):
        assert ours.dtype == torch.float32 and torch.allclose(ours.double(), theirs, rtol=0, atol=1e-5)


def test_what_comes_out_may_be_overwritten(slow_mkl: None) -> None:
    """olmo clips it in place."""
    model = nn.Sequential(nn.Linear(4, 3))
    rewrite(model)
    found = model(torch.randn(2, 5, 4)).clamp_(max=0.1)
    found.sum().backward()
    assert found.max() <= 0.1 and model[0].weight.grad is not None


def test_a_vector(slow_mkl: None) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(4)
    wanted = model(x)
    rewrite(model)
    assert torch.equal(model(x), wanted)


def test_frozen_weights_take_no_product(slow_mkl: None) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    rewrite(model)
    x = torch.randn(5, 4, requires_grad=True)
    model(x).sum().backward()
    assert model[0].weight.grad is None and x.grad is not None


@pytest.mark.parametrize(("vendor", "capability", "slow"), [
    ("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False),
])  # fmt: skip
def test_where_it_serves(
    vendor: str, capability: str, slow: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._mkl_is_slow.__wrapped__() is slow


# --- weights laid out once --------------------------------------------------------------------------------------------

ROWS = [Example((5, 9, 2, 7), ((3, 1, 4), (1, 5, 9, 2)), None), Example((6, 5, 3), ((5, 8), (9, 7, 9)), None)]  # type: ignore[arg-type]


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Scorer:
    monkeypatch.setattr(products, "SMALL", 1)
    torch.manual_seed(0)
    model = model_of("llama")
    install(model, torch.bfloat16, "shared")
    return Scorer(model, "shared", 8)  # each row is a microbatch of its own


def packs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose weight was laid out from now on."""
    made: list[nn.Module] = []
    seen: list[Tensor] = []
    real = products._from_pack

    def noted(module: nn.Module, x: Tensor, kept: dict[nn.Module, Tensor]) -> Tensor:
        found = real(module, x, kept)
        if not any(kept[module] is pack for pack in seen):
            seen.append(kept[module])
            made.append(module)
        return found

    monkeypatch.setattr(products, "_from_pack", noted)
    return made


def test_scores_are_the_same_and_weights_are_laid_out_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = packs(monkeypatch)
    monkeypatch.setattr(products, "PACKED", 1000)
    plain, _ = scorer.score_all(ROWS)
    assert not made
    monkeypatch.setattr(products, "PACKED", 10)
    found, _ = scorer.score_all(ROWS)
    assert len(made) == len(set(made)) == 14 and len(scorer.microbatches(ROWS)) == 2
    assert torch.allclose(found, plain, rtol=0, atol=0.05)
    assert products._packs is None


def test_weights_that_have_changed_are_laid_out_again(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PACKED", 10)
    before, _ = scorer.score_all(ROWS)
    with torch.no_grad():
        for weight in scorer.model.model.layers.parameters():
            weight.mul_(1.5)
    after, _ = scorer.score_all(ROWS)
    monkeypatch.setattr(products, "PACKED", 1000)
    assert torch.allclose(after, scorer.score_all(ROWS)[0], rtol=0, atol=0.05)
    assert (after - before).abs().max() > 0.2


def test_a_pass_that_learns_takes_the_weights_themselves(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = packs(monkeypatch)
    with weights_packed(10_000):
        scorer.score(ROWS)[0].sum().backward()
    assert not made and scorer.model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_after_an_error_nothing_is_kept(scorer: Scorer) -> None:
    with pytest.raises(RuntimeError, match="stop"), weights_packed(10_000):
        raise RuntimeError("stop")
    assert products._packs is None


def test_biases_and_other_types_are_rounded_as_autocast_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 1)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16)), torch.randn(3, 5, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        rewrite(model)
        with weights_packed(10_000):
            found = model(x)
    assert found.dtype == wanted.dtype == torch.bfloat16 and found.shape == wanted.shape
    assert torch.allclose(found.float(), wanted.float(), rtol=0, atol=0.02)
