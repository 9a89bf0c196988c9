"""The contract of an objective, as a test that any member passes: ours in CI, yours with one call.

>>> from trimtab.objectives.check import check_objective
>>> from trimtab.objectives.dpo import DPO
>>> check_objective(DPO())[0]
'says its equation and its paper'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from trimtab.errors import CheckFailed
from trimtab.logprobs.scored import Completions, Demonstrations, Pairs, Rankings, Rollouts, Scores, Solutions, Thumbs
from trimtab.objectives.base import Objective
from trimtab.tokens.batch import Example

ROWS, PER_PROMPT = 6, 4


def check_objective(objective: Objective) -> list[str]:
    """Check an objective against the contract; returns what was checked.

    Raises:
        CheckFailed: names the first check that failed and what was found.
    """
    done = []
    for check in CHECKS:
        check(objective)
        done.append((check.__doc__ or "").strip().splitlines()[0].rstrip("."))
    return done


def _require(ok: bool, objective: Objective, problem: str) -> None:
    if not ok:
        raise CheckFailed(f"{type(objective).__name__}: {problem}")


# --- random batches -------------------------------------------------------------------------------------------------------


def _per_row(view: type[Any]) -> int:
    return {
        Pairs: 2,
        Thumbs: 1,
        Demonstrations: 1,
        Scores: 1,
        Solutions: 1,
        Rankings: PER_PROMPT,
        Rollouts: PER_PROMPT,
    }[view]


def _examples(view: type[Any], rows: int) -> list[Example]:
    """Stand-ins that carry nothing but labels; every label value occurs."""
    k = _per_row(view)
    labels = [
        SimpleNamespace(
            tie=i % 3 == 2,
            strength=None if i % 3 == 2 else 0.6 + 0.05 * i,
            desirable=i % 2 == 0,
            ranks=tuple(range(1, k + 1)),
            scores=tuple(1 - j / k + 0.01 * i for j in range(k)),
            score=1.5 - 0.6 * i,
            labels=(1.0 - i % 2,),
            completions=("",) * k,
        )
        for i in range(rows)
    ]
    return [
        cast(Example, SimpleNamespace(record=r, completions=r.completions, weight=1 + i / 10, marks=(0,), columns={}))
        for i, r in enumerate(labels)
    ]


def _batch(
    objective: Objective,
    *,
    policy: Tensor | None = None,
    at_reference: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    rows: list[int] | None = None,
    everything: bool = False,
    held: Tensor | None = None,
    ties: bool | None = None,
) -> tuple[Any, Completions, Completions | None]:
    """(view, its completions, mismatched completions). Same numbers every time; ``rows`` picks and orders rows."""
    view = objective.feedback
    k = _per_row(view)
    g = torch.Generator().manual_seed(7)
    length = torch.randint(1, 6, (ROWS * k,), generator=g)
    n = int(length.sum())
    ref = (-2 * torch.rand(n, generator=g, dtype=torch.float64)).to(dtype)
    noise = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    logps = policy if policy is not None else ref if at_reference else ref + scale * noise
    known = everything or "reference" in objective.needs
    extras = {
        name: (0.0 if at_reference and name == "token_kl" else 1.0) * sign * torch.rand(n, generator=g).to(dtype)
        for name, sign in (("token_kl", 1), ("collision", -1), ("rival", -3), ("value", 1), ("score", 1))
    }
    wanted = {k: v for k, v in extras.items() if everything or k in objective.needs}
    if "score" in objective.needs:  # the numbers of a reward model take the place of the log-probs
        wanted["score"], logps = logps, torch.full_like(ref, torch.nan)
    y = Completions(logps, length, ref if known else None, wanted, held)
    examples = _examples(view, ROWS)
    wants_ties = objective.ties if ties is None else ties
    for e in examples:
        e.record.tie = e.record.tie and wants_ties  # type: ignore[attr-defined]
    mm_length = torch.randint(1, 6, (ROWS,), generator=g)
    mm_ref = (-2 * torch.rand(int(mm_length.sum()), generator=g, dtype=torch.float64)).to(dtype)
    mm = Completions(mm_ref + (0 if at_reference else 0.3), mm_length, mm_ref)
    mm.used = y.used
    if view is Rollouts:
        sampler = y.with_policy(ref + 0.2 * noise.flip(0))
        sampler.used = y.used
        _sampled(objective, sampler, examples, everything or "greedy" in objective.needs)
    around: Any = view.of(Completions(torch.full_like(logps.detach(), torch.nan), length), examples)
    if rows is not None:
        y = y.take(torch.tensor([r * k + j for r in rows for j in range(k)]))
        examples = [examples[r] for r in rows]
    more = {"unmatched": mm} if view is Thumbs and (everything or "mismatched" in objective.needs) else {}
    more["around"] = around
    made = view.of(y, examples, **more)
    if objective.has_memory():
        made = view.of(y, examples, memory=objective.remember(made, {}), **more)
    return made, y, mm


def _sampled(objective: Objective, y: Completions, examples: list[Example], greedy: bool) -> None:
    """The constants that a round leaves on its examples; ``y``: under the policy that sampled."""
    base = {"behaviour": y._token_logps} | ({"baseline": torch.full_like(y._token_logps, 0.5)} if greedy else {})
    batch = Rollouts.of(y, examples)
    found = objective.credit(replace(batch, columns=base), {})[0]
    counts = [int(n) for n in y._length.view(len(examples), -1).sum(1)]
    for name, column in {**base, **found}.items():
        for e, part in zip(examples, column.detach().split(counts), strict=True):
            e.columns[name] = part  # type: ignore[index]


def _given(objective: Objective, y: Completions) -> Tensor:
    """[N] what the model gives and the loss is differentiated by: log-probs, or the numbers of a reward model."""
    return y._extras["score"] if "score" in objective.needs else y._token_logps


def _gradient(objective: Objective, **kwargs: Any) -> tuple[Tensor, Completions, Any]:
    _, y, _ = _batch(objective, **kwargs)
    leaf = _given(objective, y).detach().clone().requires_grad_()
    view, made, _ = _batch(objective, **{**kwargs, "policy": leaf})
    (slope,) = torch.autograd.grad(objective.loss(view).sum(), leaf)
    return slope, made, view


# --- the checks ---------------------------------------------------------------------------------------------------------------


def _documented(o: Objective) -> None:
    """says its equation and its paper."""
    text = o.equation()
    written = not text.startswith(f"{type(o).__name__}(")  # dataclass writes the signature where there is no docstring
    _require(written and "=" in text, o, "the class docstring must hold the equation of the loss")
    _require(bool(o.paper), o, 'set `paper`, e.g. paper = "arXiv:2305.18290"')


def _shapes(o: Objective) -> None:
    """one finite number per example, in the precision of the log-probs."""
    for dtype in (torch.float32, torch.float64):
        batch, y, _ = _batch(o, dtype=dtype)
        loss, reward, size = o.loss(batch), o.reward(y), o.size(batch)
        _require(
            loss.shape == (ROWS,), o, f"loss has shape {tuple(loss.shape)}, expected one number per example: ({ROWS},)"
        )
        _require(reward.shape == (len(y),), o, f"reward has shape {tuple(reward.shape)}, expected ({len(y)},)")
        _require(size.shape == (ROWS,), o, f"size has shape {tuple(size.shape)}, expected ({ROWS},)")
        _require(bool(torch.isfinite(loss).all()), o, f"loss is not finite on ordinary log-probs: {loss.tolist()}")
        _require(loss.dtype == dtype, o, f"loss is {loss.dtype} for {dtype} log-probs")


def _needs(o: Objective) -> None:
    """declared needs are the used needs."""
    batch, y, _ = _batch(o, everything=True)
    o.loss(batch), o.reward(y)
    used = y.used - {"policy"}
    _require(
        used == o.needs, o, f"declares needs {sorted(o.needs) or 'nothing'}, but reads {sorted(used) or 'nothing'}"
    )


def _rows_apart(o: Objective) -> None:
    """rows are independent unless it is declared coupled."""
    whole = o.loss(_batch(o)[0])
    rows = [4, 1, 2]
    part = o.loss(_batch(o, rows=rows)[0])
    same = torch.allclose(whole[rows], part, rtol=1e-12, atol=1e-12)
    _require(same or o.coupled or o.has_memory(), o, "a row's loss depends on the other rows; declare coupled = True")
    _require(
        not (same and o.coupled), o, "is declared coupled, but no row's loss depends on another: that costs a pass"
    )


def _order(o: Objective) -> None:
    """the order of the rows does not matter."""
    order = [3, 0, 5, 1, 4, 2]
    a, b = o.loss(_batch(o)[0]).sum(), o.loss(_batch(o, rows=order)[0]).sum()
    _require(torch.allclose(a, b, rtol=1e-12), o, f"summed loss changes with the order of the rows: {a} and {b}")


def _pull(o: Objective) -> None:
    """at policy = reference it pulls toward what was preferred."""
    slope, y, view = _gradient(o, at_reference=True, ties=False)
    # a method with control tokens imitates all answers, each after its own token
    up = torch.ones(len(y), dtype=torch.float64) if o.control_tokens else _preferred(view, len(y))
    direction = torch.repeat_interleave(up, y._length)
    change = -(slope * direction).sum()
    _require(change.item() > 0, o, "a gradient step at policy = reference moves away from what was preferred (sign?)")


def _preferred(view: Any, n: int) -> Tensor:
    """[B] +1 for completions that feedback favours, -1 for the others."""
    match view:
        case Pairs():
            return torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)
        case Thumbs():
            return torch.where(view.desirable, 1.0, -1.0).double()
        case Scores():
            return view.score.double()
        case Solutions():
            return torch.where(view.label > 0.5, 1.0, -1.0).double()
        case Rankings():
            return (PER_PROMPT + 1) / 2 - view.rank.double()
        case _:
            return torch.ones(n, dtype=torch.float64)


def _reward_rises(o: Objective) -> None:
    """the reward of a completion rises with its log-prob (a reward model's: with its last number)."""
    slope = _reward_slope(o)
    if "score" in o.needs:
        slope = _batch(o)[1].last(slope)
    _require(bool((slope > 0).all()), o, "the reward does not rise with every token's log-prob")


def _reward_slope(o: Objective) -> Tensor:
    y = _batch(o)[1]
    leaf = _given(o, y).clone().requires_grad_()
    moved = _batch(o, policy=leaf)[1] if "score" in o.needs else y.with_policy(leaf)
    (slope,) = torch.autograd.grad(o.reward(moved).sum(), leaf)
    return slope


def _finite_difference(o: Objective) -> None:
    """the gradient is the slope of the loss (central differences)."""
    slope, y, _ = _gradient(o)
    start, step = _given(o, y).detach(), 1e-6
    for t in range(0, len(start), 3):
        bump = torch.zeros_like(start)
        bump[t] = step
        high = o.loss(_batch(o, policy=start + bump, held=start)[0]).sum()
        low = o.loss(_batch(o, policy=start - bump, held=start)[0]).sum()
        found = ((high - low) / (2 * step)).item()
        close = abs(found - slope[t].item()) <= 1e-6 * max(1, abs(found))
        _require(close, o, f"gradient by token {t} is {slope[t].item():.8g}, the loss's slope is {found:.8g}")


def _extremes(o: Objective) -> None:
    """log-ratios of +-1000, and rewards of +-1000, give finite losses and gradients."""
    rise = _reward_slope(o)
    # a method with a small scale meets large margins too, only later
    for scale in (1000.0, max(1000.0, 1000.0 / rise.max().item())):
        for dtype in (torch.float32, torch.float64):
            slope, _, view = _gradient(o, scale=scale, dtype=dtype)
            at = f"at log-ratios of {scale:g} in {dtype}"
            _require(bool(torch.isfinite(o.loss(view)).all()), o, f"loss overflows {at}")
            _require(bool(torch.isfinite(slope).all()), o, f"gradient is not finite {at}")


def _size_is_structure(o: Objective) -> None:
    """the denominator does not depend on log-probs."""
    _, y, _ = _batch(o)
    nan = torch.full_like(_given(o, y), torch.nan)
    size = o.size(_batch(o, policy=nan)[0])
    _require(
        bool(torch.isfinite(size).all() and (size > 0).all()), o, "size() depends on log-probs, or is not positive"
    )


def _first_step(o: Objective) -> None:
    """a method with memory has a loss before it remembers anything."""
    if o.has_memory():
        try:
            first = o.loss(replace(_batch(o)[0], memory={}))
        except KeyError as e:
            raise CheckFailed(f"{type(o).__name__}: reads memory[{e}] before the first batch: use memory.get") from e
        _require(bool(torch.isfinite(first).all()), o, f"loss is not finite with an empty memory: {first.tolist()}")


CHECKS: list[Callable[[Objective], None]] = [
    _documented,
    _shapes,
    _needs,
    _rows_apart,
    _order,
    _pull,
    _reward_rises,
    _finite_difference,
    _extremes,
    _size_is_structure,
    _first_step,
]
