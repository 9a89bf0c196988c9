"""The reference policy's log-probs: frozen copy, adapter switched off, or read from the cache."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from trimtab.errors import CacheError
from trimtab.logprobs.cache import LogpCache
from trimtab.logprobs.extras import Distribution
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.score import BEFOREHAND, Scorer, install, uninstalled, unwrapped
from trimtab.tokens.batch import Example, completion_keys


class Reference(Protocol):
    """Token log-probs of completions under a policy that does not learn."""

    identity: str  # what it is, for the user and the run card

    def logps(self, examples: Sequence[Example], budgets: int = 1) -> Tensor:
        """[N] token log-probs, completions end to end in the examples' order, without a graph; so many token budgets at once."""
        ...

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        """Its whole distributions at the completion tokens of one microbatch."""
        ...


class FrozenCopy:
    """A second model in memory. Costs its weights; serves everything."""

    def __init__(self, model: nn.Module, scorer: Scorer, precision: torch.dtype, identity: str) -> None:
        self.scorer = Scorer(frozen_copy(model, precision, scorer.mode), scorer.mode, scorer.budget)
        self.identity = f"frozen copy of {identity}"
        self.moved = False

    def logps(self, examples: Sequence[Example], budgets: int = 1) -> Tensor:
        return self.scorer.score_all(examples, budgets)[0]

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        return self.scorer.distribution(examples)

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.scorer.model.named_parameters()}

    def move(self, model: nn.Module, mix: float) -> None:
        """Go ``mix`` of the way to ``model`` in every weight, 1 all of it."""
        mine, theirs, self.moved = self.weights(), {n: p.detach() for n, p in model.named_parameters()}, True
        for name, weight in mine.items():
            weight.copy_(theirs[name] if mix == 1 else torch.lerp(weight, theirs[name].to(weight), mix))


def frozen_copy(model: nn.Module, precision: torch.dtype, mode: Mode) -> nn.Module:
    """A copy that shares nothing with the model and needs no gradient."""
    # the installed forward is bound to the original: a copy that kept it would be the original
    with uninstalled(model):
        twin = copy.deepcopy(model).requires_grad_(False).eval()
    install(twin, precision, mode)
    return twin


class AdapterOff:
    """The policy with its adapter switched off: no second model, same path, same layout."""

    def __init__(self, scorer: Scorer, identity: str) -> None:
        self.scorer = scorer
        self.identity = f"switched-off adapter of {identity}"

    def logps(self, examples: Sequence[Example], budgets: int = 1) -> Tensor:
        with adapter_off(self.scorer.model):
            return self.scorer.score_all(examples, budgets)[0]

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        with adapter_off(self.scorer.model):
            found = self.scorer.distribution(examples)

        def logits(hidden: Tensor) -> Tensor:
            with adapter_off(self.scorer.model):  # the head may have an adapter too
                return found.logits(hidden)

        return Distribution(found.hidden, logits)


def adapter_off(model: nn.Module) -> AbstractContextManager[None]:
    """peft's ``disable_adapter`` under whatever wraps the model; does nothing for a model without adapter."""
    inner = unwrapped(model)
    return inner.disable_adapter() if hasattr(inner, "disable_adapter") else nullcontext()


def adapter_on(model: nn.Module) -> None:
    """After an interruption, which may have come while the adapter's layers were switched on one by one: all are on."""
    inner = unwrapped(model)
    if hasattr(inner, "disable_adapter"):
        inner.base_model.enable_adapter_layers()


class Cached:
    """Reads a :class:`LogpCache`; nothing of the reference is in memory while training."""

    def __init__(self, cache: LogpCache, identity: str) -> None:
        self.cache = cache
        self.identity = f"cache of {identity} ({cache.folder.name})"

    def logps(self, examples: Sequence[Example], budgets: int = 1) -> Tensor:
        return self.cache.get([k for e in examples for k in completion_keys(e)])

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        raise CacheError(
            "the reference cache holds the log-prob of each token, not the whole distribution that this method needs: "
            "use reference: copy, or adapter with LoRA."
        )

    def fill(self, examples: Sequence[Example], live: Reference, shard: int = 512) -> int:
        """Score what is missing with a live reference; returns how many completions that were."""
        added = 0
        missing: dict[
            tuple[int, ...], dict[tuple[bytes, ...], Example]
        ] = {}  # rows with one prompt are scored together
        for e in examples:
            keys = completion_keys(e)
            if any(k not in self.cache for k in keys):
                missing.setdefault(e.prompt, {})[tuple(keys)] = e
        items = [item for rows in missing.values() for item in rows.items()]
        for start in range(0, len(items), shard):
            part = items[start : start + shard]
            logps = live.logps([e for _, e in part], BEFOREHAND)
            keys = [k for ks, _ in part for k in ks]
            self.cache.put(keys, logps.split([len(c) for _, e in part for c in e.completions]))
            added += len(keys)
        return added

    def spot_check(
        self, examples: Sequence[Example], live: Reference, tolerance: float, seed: int, rows: int = 4
    ) -> str:
        """Score a few random rows afresh and compare; :class:`CacheError` where a sequence is off by more."""
        picked = random.Random(seed).sample(list(examples), min(rows, len(examples)))
        worst = 0.0
        for e in picked:
            sizes = [len(c) for c in e.completions]
            for a, b in zip(self.logps([e]).split(sizes), live.logps([e]).cpu().split(sizes), strict=True):
                worst = max(worst, abs((a - b).sum().item()))
        if not worst <= tolerance:
            raise CacheError(
                f"the reference cache {self.cache.folder} is off by {worst:.3g} nats on one of {len(picked)} rows scored "
                f"afresh (allowed {tolerance:.3g}). Delete the folder, or find out what changed the model."
            )
        return f"{len(picked)} rows scored afresh differ by at most {worst:.2g} nats per sequence"


def mismatch(batch: Sequence[Example], context: int | None = None) -> list[Example]:
    """Each prompt with the completion of the next row that has another prompt, over the whole batch (KTO).

    Empty where the batch has fewer than two distinct prompts. The set of completions is the batch's own; the end of one that
    would not fit into ``context`` tokens, together with a prompt that is not its own, is cut.
    """
    out = []
    for i, e in enumerate(batch):
        for step in range(1, len(batch)):
            other = batch[(i + step) % len(batch)]
            if other.prompt != e.prompt:
                room = None if context is None else context - len(e.prompt)
                out.append(Example(e.prompt, tuple(c[:room] for c in other.completions), e.record))
                break
    return out


def sequence_tolerance(precision: torch.dtype) -> float:
    """Nats by which one sequence's log-prob may differ between layouts in this precision (PERF.md, noise of bf16)."""
    return {torch.float64: 1e-9, torch.float32: 2e-3}.get(precision, 2.0)
