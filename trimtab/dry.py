"""The engine's own code on hollow tensors, which have shape and type but no contents: nothing is computed, nothing is stored,
and everything that would be is counted. A step of a model of any size takes seconds and no memory.

Hollow tensors are torch's fake tensors. Log-probs that leave the model are real and constant, so objectives, batches and
the trainer run unchanged.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from trimtab.logprobs import attention, layout, products, squares
from trimtab.logprobs.extras import Distribution, Extras
from trimtab.logprobs.layout import Block, Part
from trimtab.logprobs.score import Scorer
from trimtab.tokens.batch import Example

LOGP = -2.0  # of every token: 0 would be the certainty at which some losses end
ATEN = torch.ops.aten
ITEM, ADD, CLAMP = ATEN._local_scalar_dense.default, ATEN.add.Tensor, ATEN.clamp.default


class Ledger(TorchDispatchMode):
    """Counts the bytes of all hollow tensors that are alive, and the work of every operation.

    Attributes:
        live, peak: bytes now, and the most since :meth:`restart`.
        flops: type -> floating-point operations of matrix products in it, attention included.
        moved: bytes that all other operations read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = self.peak = self.moved = 0
        self.flops: Counter[torch.dtype] = Counter()

    def restart(self) -> None:
        """Begin a phase: what is alive stays, peak and work start again."""
        self.peak, self.moved = self.live, 0
        self.flops.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM and isinstance(args[0], FakeTensor):
            # no number is in it: 0, or what it was clamped to
            return type(0.0 if args[0].dtype.is_floating_point else 0)(getattr(args[0], "least", 0))
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_iter(out) if isinstance(t, FakeTensor)]
        if func is CLAMP and len(args) > 1 and args[1] is not None:
            made[0].least = args[1]  # type: ignore[attr-defined]
        # autograd adds gradients up in place where nobody else holds them, but never hollow ones
        summed = func is ADD and not torch.is_grad_enabled() and args[0].shape == getattr(args[1], "shape", None)
        fresh = sum(self._add(t.untyped_storage(), quietly=summed) for t in made)
        if made:
            self._work(func, args, kwargs or {}, out, made, fresh > 0)
        return out

    def _add(self, storage: Any, quietly: bool) -> bool:
        if storage in self.seen:
            return False
        self.seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live - size * quietly)
        weakref.finalize(storage, self._free, size)
        return True

    def _free(self, size: int) -> None:
        self.live -= size

    def _work(self, func: Any, args: Any, kwargs: Any, out: Any, made: list[Any], fresh: bool) -> None:
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops[made[0].dtype] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif "scaled_dot_product" in packet.__name__:  # torch's counter does not know those of a CPU
            backward = "backward" in packet.__name__
            q, k = (args[1].shape, args[2].shape) if backward else (args[0].shape, args[1].shape)
            self.flops[made[0].dtype] += (5 if backward else 2) * 2 * q[0] * q[1] * q[2] * k[2] * q[3]
        elif packet.__name__ == "_linear_pointwise":  # nor oneDNN's
            self.flops[made[0].dtype] += 2 * args[0].numel() * args[1].shape[0]
        elif fresh or func._schema.is_mutable:  # views move nothing
            read = [t for t in tree_iter((args, kwargs)) if isinstance(t, FakeTensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*read, *made))


@dataclass
class Hollow:
    """Where hollow tensors live. Code under :meth:`on` makes them; their sizes are in the ledger.

    Args:
        fused: attention by torch's fused kernel, as on a GPU, also where the engine spells it out on a CPU.
    """

    fused: bool = False
    ledger: Ledger = field(default_factory=Ledger)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    depth: int = 0

    def __post_init__(self) -> None:
        # a copied tensor would take a copy of all that its mode knows, which ends in a corrupted heap
        vars(self.mode)["__deepcopy__"] = lambda memo: self.mode

    @contextmanager
    def on(self) -> Iterator[Ledger]:
        """May be entered again by what runs inside, such as a backward pass."""
        self.depth += 1
        try:
            if self.depth > 1:
                yield self.ledger
                return
            parts, apply, spelled, onednn = Block.parts, nn.Module._apply, attention.PRODUCTS, products.ONEDNN
            with warnings.catch_warnings(), self.mode, self.ledger:
                # deepcopy asks for an address, and is content with none
                warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
                Block.parts = _filled(parts)  # type: ignore[method-assign]
                nn.Module._apply = _converted  # type: ignore[method-assign, assignment]
                attention.PRODUCTS, products.ONEDNN = spelled and not self.fused, onednn and not self.fused
                try:
                    yield self.ledger
                finally:
                    Block.parts, nn.Module._apply = parts, apply  # type: ignore[method-assign]
                    attention.PRODUCTS, products.ONEDNN = spelled, onednn
                    _forget()
        finally:
            self.depth -= 1


def _filled(parts: Callable[..., list[Part]]) -> Callable[..., list[Part]]:
    """Masks are made from lengths, whose sum is the shape: that takes contents."""

    def filled(block: Block, device: torch.device, window: int = 0) -> list[Part]:
        with _disable_current_modes():
            return parts(block, torch.device("cpu"), window)

    return filled


def _forget() -> None:
    """No hollow mask may stay where a real run would find it."""
    for function in chain.from_iterable(vars(module).values() for module in (attention, layout, squares)):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _converted(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module.to``: torch's own swaps the contents of two tensors, and hollow ones have none."""
    for child in module.children() if recurse else ():
        _converted(child, fn)
    with torch.no_grad():
        for name, p in module._parameters.items():
            if p is not None and (new := fn(p)) is not p:
                module._parameters[name] = nn.Parameter(new, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = fn(b)
    return module


class _Across(torch.autograd.Function):
    """A hollow result with its graph, as a real tensor whose gradient goes on into the hollow graph."""

    @staticmethod
    def forward(ctx: Any, door: Tensor, hollow: Hollow, inside: list[Tensor], found: Tensor) -> Tensor:
        ctx.hollow, ctx.inside = hollow, inside  # in a list: autograd would go on to it by itself
        return found.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        with ctx.hollow.on():
            result = ctx.inside.pop()
            torch.autograd.backward(result, torch.zeros_like(result))
        return None, None, None, None


@dataclass
class HollowScorer(Scorer):
    """A scorer whose model is hollow; what it returns is real, :data:`LOGP` for every token and 0 for all else."""

    hollow: Hollow = field(default_factory=Hollow)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _found(self, inside: Tensor) -> Tensor:
        with _disable_current_modes():
            found = torch.zeros(inside.shape, dtype=inside.dtype)
            found[(..., 0) if inside.ndim > 1 else ...] = LOGP
        if not inside.requires_grad:
            return found
        return _Across.apply(torch.zeros((), requires_grad=True), self.hollow, [inside], found)  # type: ignore[no-any-return]

    def score(self, examples: Sequence[Example], model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        with self.hollow.on():
            inside, _ = super().score(examples, model)
        return self._found(inside), torch.tensor([len(c) for e in examples for c in e.completions])

    def score_with(
        self, examples: Sequence[Example], others: Sequence[Example], model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        with self.hollow.on():
            inside, more = super().score_with(examples, others, model)
        return self._found(inside), self._found(more)

    def columns(self, examples: Sequence[Example], extras: Extras, model: nn.Module | None = None) -> Tensor:
        with self.hollow.on():
            inside = super().columns(examples, extras, model)
        return self._found(inside)

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        with self.hollow.on():
            return super().distribution(examples)
