"""Several models that started from one, merged into one model: what PAFT does with SFT and DPO (arXiv:2406.17923).

A task vector is the difference of a trained model's weights from the start's. With LoRA that is the product B A, never A
and B apart: models are read with their adapters merged in. The trimming and sign election are peft's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft.utils import merge_utils
from torch import Tensor

from trimtab.errors import ConfigError, ModelError
from trimtab.models import load_model, load_tokenizer

How = Literal["linear", "task_arithmetic", "ties", "dare_ties", "dare_linear", "slerp"]
DENSE = ("linear", "task_arithmetic", "slerp")  # keep every entry of the task vectors


def merge(
    start: str,
    models: Sequence[str],
    out: Path,
    *,
    how: How = "ties",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> str:
    """Write the merged model and its tokenizer to ``out``; returns what was done, in a sentence.

    Args:
        start: the model that all of them were trained from.
        how: ``linear`` (mean of the weights), ``task_arithmetic`` (start + sum of weighted task vectors), ``ties``
            (arXiv:2306.01708), ``dare_ties``, ``dare_linear`` (arXiv:2311.03099), ``slerp`` (two models; the second's
            share is its weight).
        weights: one per model; default 1 each, for ``linear`` and ``slerp`` equal shares.
        density: share of each task vector's entries that is kept; default 0.2 for ties, 0.5 for dare.
        scale: multiplies the merged task vector (TIES' lambda).
    """
    if how not in get_args(How):
        raise ConfigError(f'how is "{how}"; expected one of {", ".join(get_args(How))}.')
    if len(models) < 2 or (how == "slerp" and len(models) != 2):
        raise ConfigError(f"{how} merges {'two' if how == 'slerp' else 'two or more'} models; {len(models)} named.")
    if weights is not None and (len(weights) != len(models) or min(weights) < 0 or sum(weights) == 0):
        raise ConfigError(
            f"weights are {list(weights)}; expected one number, 0 or more, for each of {len(models)} models."
        )
    if density is not None and (how in DENSE or not 0 < density <= 1):
        why = f"has no effect for {how}" if how in DENSE else "is not above 0 and at most 1"
        raise ConfigError(f"density {density:g} {why}. Remove it, or change it.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something already. Name a new folder.")
    base = load_model(start)
    others = [dict(load_model(m).named_parameters()) for m in models]
    shapes = {n: p.shape for n, p in base.named_parameters()}
    for name, other in zip(models, others, strict=True):
        if {n: p.shape for n, p in other.items()} != shapes:
            raise ModelError(f"{name} has other parameters than {start}: it was not trained from it.")
    share = torch.tensor(weights if weights is not None else [1.0] * len(models))
    density = density if density is not None else 0.2 if how == "ties" else 0.5
    torch.manual_seed(seed)  # dare drops entries at random
    combine = _combine(how, share, density)
    moved = 0.0
    with torch.no_grad():
        for name, p in base.named_parameters():
            delta = scale * combine(p, [other[name] - p for other in others])
            moved += delta.square().sum().item()
            p.add_(delta)
    base.save_pretrained(out)
    load_tokenizer(models[0]).save_pretrained(out)
    return f"{out}: {how} of {', '.join(models)}; it lies {moved**0.5:.3g} from {start} (2-norm of the weights)"


def _combine(how: How, share: Tensor, density: float) -> Callable[[Tensor, list[Tensor]], Tensor]:
    """(start's weight, task vectors) -> merged task vector."""
    mean = share / share.sum()
    match how:
        case "linear":
            return lambda _, deltas: merge_utils.task_arithmetic(deltas, mean)
        case "task_arithmetic":
            return lambda _, deltas: merge_utils.task_arithmetic(deltas, share)
        case "slerp":
            return lambda start, deltas: slerp(start + deltas[0], start + deltas[1], mean[1].item()) - start
        case "dare_linear":
            return lambda _, deltas: merge_utils.dare_linear(deltas, share, density)
        case "ties" | "dare_ties":
            kind: Any = "magnitude" if how == "ties" else "random"
            return lambda _, deltas: _elect([_prune(d, density, kind) for d in deltas], mean * len(mean))


def _prune(delta: Tensor, density: float, kind: Any) -> Tensor:
    return delta if density == 1 else merge_utils.prune(delta, density, kind, rescale=kind == "random")


def _elect(deltas: list[Tensor], weights: Tensor) -> Tensor:
    """Mean over the models that agree with the sign of the sum, entry by entry. peft divides by the number that agree,
    so with equal weights of 1 this is TIES' mean."""
    stacked = torch.stack(deltas)
    agree = merge_utils.calculate_majority_sign_mask(stacked)
    weighted = stacked * merge_utils.reshape_weight_task_tensors(stacked, weights)
    return merge_utils.disjoint_merge(weighted, agree)  # type: ignore[no-any-return]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1) along the great circle; along the line where both point the same way."""
    x, y = a.flatten().double(), b.flatten().double()
    norms = x.norm() * y.norm()
    cosine = (x @ y / norms).clamp(-1, 1) if norms > 0 else torch.ones((), dtype=torch.float64)
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-6:
        return torch.lerp(a, b, t)
    mixed = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / angle.sin()
    return mixed.view_as(a).to(a.dtype)
