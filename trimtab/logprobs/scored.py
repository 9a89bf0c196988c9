"""The seam: what an objective sees.

An objective never meets a model, a tokenizer or a padded tensor. It gets log-probabilities of completions in the
papers' words, and only those that it declared. Everything it does not see cannot break it.

Shapes: B completions, N completion tokens of all of them end to end (no padding anywhere), R feedback records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trimtab.errors import NeedError
from trimtab.feedback.records import Comparison, Demonstration, Ranking, Record, Thumb
from trimtab.tokens.batch import Example


# quantities of the policy's whole distribution at each completion token, computed inside the chunked head
EXTRAS = {
    "token_kl": "KL(pi_ref(.|x, y_<t) || pi(.|x, y_<t)) in nats, differentiable",
    "collision": "log sum_v pi(v|x, y_<t)^2, without a graph",
    "rival": "log pi(s|x, y_<t) of a token s drawn from the policy's k likeliest but for y_t, differentiable",
}


class Completions:
    """B completions: their log-probabilities under the policy and, where declared, under the reference.

    Sums run over completion tokens, end-of-sequence included, prompt excluded (``spec 0``). Natural logarithms (nats).

    Args:
        token_logps: [N] log pi(y_t | x, y_<t), the tokens of all completions end to end.
        length: [B] integer number of tokens per completion; ``length.sum() == N``.
        ref_token_logps: [N], the same under the reference; ``None`` where it was not asked for.
        extras: need -> [N], quantities of the whole distribution at each token (:data:`EXTRAS`) that were declared.
    """

    def __init__(
        self,
        token_logps: Tensor,
        length: Tensor,
        ref_token_logps: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        if token_logps.ndim != 1 or length.ndim != 1:
            raise ValueError(
                f"token_logps and length are vectors, not {tuple(token_logps.shape)}, {tuple(length.shape)}"
            )
        if ref_token_logps is not None and ref_token_logps.shape != token_logps.shape:
            raise ValueError(f"reference {tuple(ref_token_logps.shape)} and policy {tuple(token_logps.shape)} differ")
        self._token_logps, self._length, self._ref = token_logps, length, ref_token_logps
        self._extras = dict(extras or {})
        self.used: set[str] = set()  # which needs were read; views share it, ``check_objective`` compares it

    def __len__(self) -> int:
        return len(self._length)

    @property
    def token_logps(self) -> Tensor:
        """[N] log-probability of each completion token under the policy."""
        self.used.add("policy")
        return self._token_logps

    @property
    def ref_token_logps(self) -> Tensor:
        """[N] log-probability of each completion token under the reference; needs ``reference``."""
        self.used.add("reference")
        if self._ref is None:
            raise NeedError('log-probs of the reference were read, but "reference" is not in the objective\'s needs')
        return self._ref

    def extra(self, name: str) -> Tensor:
        """[N] one of :data:`EXTRAS`; needs it by that name."""
        self.used.add(name)
        if name not in self._extras:
            raise NeedError(f'"{name}" was read, but it is not in the objective\'s needs')
        return self._extras[name]

    @property
    def position(self) -> Tensor:
        """[N] place of each token in its completion, from 0."""
        starts = self._length.cumsum(0) - self._length
        index = torch.arange(len(self._token_logps), device=self._length.device)
        return index - torch.repeat_interleave(starts, self._length)

    @property
    def owner(self) -> Tensor:
        """[N] row of the completion that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self), device=self._length.device), self._length)

    @property
    def length(self) -> Tensor:
        """[B] number of completion tokens, as a floating point tensor of the log-probs' type."""
        return self._length.to(self._token_logps.dtype)

    def sum(self, tokens: Tensor) -> Tensor:
        """[N] -> [B]: sum a per-token quantity over each completion."""
        if not len(self):
            return tokens  # segment_reduce refuses to have no segments
        return torch.segment_reduce(tokens, "sum", lengths=self._length, axis=0)

    @property
    def logp(self) -> Tensor:
        """[B] log pi(y|x), summed over tokens."""
        return self.sum(self.token_logps)

    @property
    def mean_logp(self) -> Tensor:
        """[B] log pi(y|x) / |y|."""
        return self.logp / self.length

    @property
    def ref_logp(self) -> Tensor:
        """[B] log pi_ref(y|x), summed over tokens; needs ``reference``."""
        return self.sum(self.ref_token_logps)

    @property
    def token_log_ratios(self) -> Tensor:
        """[N] log pi(y_t|.) - log pi_ref(y_t|.); needs ``reference``."""
        return self.token_logps - self.ref_token_logps

    @property
    def log_ratio(self) -> Tensor:
        """[B] log pi(y|x) - log pi_ref(y|x); needs ``reference``."""
        # the difference is taken token by token: small numbers are summed, not large ones subtracted
        return self.sum(self.token_log_ratios)

    def take(self, rows: Tensor) -> Completions:
        """The completions at ``rows`` ([M] integer), in that order."""
        length = self._length[rows]
        starts = (self._length.cumsum(0) - self._length)[rows]
        inside = torch.arange(int(length.sum()), device=length.device)
        inside = inside - torch.repeat_interleave(length.cumsum(0) - length, length)
        tokens = torch.repeat_interleave(starts, length) + inside
        ref = None if self._ref is None else self._ref[tokens]
        extras = {name: values[tokens] for name, values in self._extras.items()}
        taken = Completions(self._token_logps[tokens], length, ref, extras)
        taken.used = self.used
        return taken

    def with_policy(self, token_logps: Tensor) -> Completions:
        """The same completions with other policy log-probs (a leaf to differentiate by, or the reference's own)."""
        return Completions(token_logps, self._length, self._ref, self._extras)

    def detach(self) -> Completions:
        """The same numbers without a graph."""
        return self.with_policy(self._token_logps.detach())


@dataclass(frozen=True)
class View:
    """What all views share.

    Attributes:
        memory: the objective's own state over steps, empty for most.
        around: the whole batch of which this is a part (its log-probs are NaN); None where this is the whole.
        learning: False in evaluation, where nothing random may be drawn and every row counts.
    """

    record: ClassVar[type[Record]]
    memory: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    around: Any = field(default=None, kw_only=True)
    learning: bool = field(default=True, kw_only=True)

    @property
    def whole(self) -> Self:
        """The whole batch: labels and lengths, for terms with a denominator of their own. Its log-probs are NaN."""
        return self.around or self

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        """Build the view of these examples from their scored completions (in the examples' order)."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Demonstrations(View):
    """R completions to imitate."""

    record = Demonstration
    y: Completions

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        return cls(y, **more)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Pairs(View):
    """R comparisons. ``tie`` [R] bool; where it is true, chosen and rejected are only the first and the second.

    ``strength`` [R] is NaN where it is unknown. ``target`` holds, for every row, what to regularise towards: the
    record's own target, or the chosen completion where it has none.
    """

    record = Comparison
    chosen: Completions
    rejected: Completions
    tie: Tensor
    strength: Tensor | None = None
    targets: Completions | None = None

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        device = y.length.device
        count = torch.tensor([len(e.completions) for e in examples], device=device, dtype=torch.long)
        first = count.cumsum(0) - count
        tie = torch.tensor([e.record.tie for e in examples], device=device)  # type: ignore[attr-defined]
        known = [e.record.strength for e in examples]  # type: ignore[attr-defined]
        strength = torch.tensor([torch.nan if s is None else s for s in known], device=device, dtype=y.length.dtype)
        targets = y.take(first + torch.where(count > 2, 2, 0)) if bool((count > 2).any()) else None
        return cls(y.take(first), y.take(first + 1), tie, strength, targets, **more)

    @property
    def target(self) -> Completions:
        """[R] what each row is regularised towards."""
        return self.chosen if self.targets is None else self.targets

    def __len__(self) -> int:
        return len(self.tie)


@dataclass(frozen=True)
class Thumbs(View):
    """R completions, each with a thumb up or down: ``desirable`` [R] bool; ``weight`` [R], 1 where it is None."""

    record = Thumb
    y: Completions
    desirable: Tensor
    unmatched: Completions | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        up = [e.record.desirable for e in examples]  # type: ignore[attr-defined]
        weight = torch.tensor([e.weight for e in examples], device=y.length.device, dtype=y.length.dtype)
        return cls(y, torch.tensor(up, device=y.length.device), weight=weight, **more)

    def __len__(self) -> int:
        return len(self.desirable)

    @property
    def mismatched(self) -> Completions:
        """Completions of the whole batch, each after another row's prompt, without a graph; needs ``mismatched``."""
        self.y.used.add("mismatched")
        if self.unmatched is None:
            raise NeedError('mismatched completions were read, but "mismatched" is not in the objective\'s needs')
        return self.unmatched


@dataclass(frozen=True)
class Rankings(View):
    """K completions for each of R prompts: ``prompt`` [B] says whose, ``rank`` [B] its place (1 best, equal = tie).

    ``score`` [B] is what each was judged to be worth, NaN where that is unknown. K may differ from prompt to prompt.
    """

    record = Ranking
    y: Completions
    prompt: Tensor
    rank: Tensor
    score: Tensor | None = None

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        device = y.length.device
        prompt = [i for i, e in enumerate(examples) for _ in e.completions]
        rank = [r for e in examples for r in e.record.ranks]  # type: ignore[attr-defined]
        score = [s for e in examples for s in e.record.scores or [torch.nan] * len(e.completions)]  # type: ignore[attr-defined]
        return cls(
            y,
            torch.tensor(prompt, device=device),
            torch.tensor(rank, device=device),
            torch.tensor(score, device=device, dtype=y.length.dtype),
            **more,
        )

    def __len__(self) -> int:
        return int(self.prompt[-1]) + 1 if len(self.prompt) else 0

    def table(self, values: Tensor, fill: float) -> Tensor:
        """[B] -> [R, K]: one line per prompt in the completions' order, ``fill`` where a prompt has fewer than K."""
        count = torch.bincount(self.prompt, minlength=len(self))
        place = torch.arange(len(self.prompt), device=values.device) - (count.cumsum(0) - count)[self.prompt]
        out = values.new_full((len(self), int(count.max()) if len(count) else 0), fill)
        return out.index_put((self.prompt, place), values)
