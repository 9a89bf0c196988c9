"""The seam: what an objective sees.

An objective never meets a model, a tokenizer or a padded tensor. It gets log-probabilities of completions in the
papers' words, and only those that it declared. Everything it does not see cannot break it.

Shapes: B completions, N completion tokens of all of them end to end (no padding anywhere), R feedback records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trimtab.errors import NeedError
from trimtab.feedback.records import Comparison, Demonstration, Prompt, Ranking, Record, Score, Solution, Thumb
from trimtab.tokens.batch import Example

# quantities of the policy's whole distribution at each completion token, computed inside the chunked head
EXTRAS = {
    "token_kl": "KL(pi_ref(.|x, y_<t) || pi(.|x, y_<t)) in nats, differentiable",
    "collision": "log sum_v pi(v|x, y_<t)^2, without a graph",
    "rival": "log pi(s|x, y_<t) of a token s drawn from the policy's k likeliest but for y_t, differentiable",
    "value": "V(x, y_<t), what the critic expects before each token, differentiable",
    "score": "the reward model's number after each token, differentiable",
}


class Completions:
    """B completions: their log-probabilities under the policy and, where declared, under the reference.

    Sums run over completion tokens, end-of-sequence included, prompt excluded (``spec 0``). Natural logarithms (nats).

    Args:
        token_logps: [N] log pi(y_t | x, y_<t), the tokens of all completions end to end.
        length: [B] integer number of tokens per completion; ``length.sum() == N``.
        ref_token_logps: [N], the same under the reference; ``None`` where it was not asked for.
        extras: need -> [N], quantities of the whole distribution at each token (:data:`EXTRAS`) that were declared.
        held: [N], what :meth:`detach` gives; the policy's own log-probs where it is None. Only a check of gradients by
            finite differences needs another: there the policy moves and constants must not.
    """

    def __init__(
        self,
        token_logps: Tensor,
        length: Tensor,
        ref_token_logps: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        held: Tensor | None = None,
    ) -> None:
        if token_logps.ndim != 1 or length.ndim != 1:
            raise ValueError(
                f"token_logps and length are vectors, not {tuple(token_logps.shape)}, {tuple(length.shape)}"
            )
        if ref_token_logps is not None and ref_token_logps.shape != token_logps.shape:
            raise ValueError(f"reference {tuple(ref_token_logps.shape)} and policy {tuple(token_logps.shape)} differ")
        self._token_logps, self._length, self._ref = token_logps, length, ref_token_logps
        self._extras, self._held = dict(extras or {}), held
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

    def discounted(self, tokens: Tensor, rate: float) -> Tensor:
        """[N] -> [N]: s_t = x_t + rate * s_{t+1} within each completion (rewards to go; GAE from its errors)."""
        if not len(tokens):
            return tokens
        owner, place = self.owner, self.position
        table = tokens.new_zeros(len(self), int(self._length.max())).index_put((owner, place), tokens)
        running, found = torch.zeros_like(table[:, 0]), []
        for t in reversed(range(table.shape[1])):
            running = table[:, t] + rate * running
            found.append(running)
        return torch.stack(found[::-1], 1)[owner, place]

    def following(self, tokens: Tensor) -> Tensor:
        """[N] -> [N]: the quantity at the next token of the same completion, 0 after its last."""
        ends = torch.zeros_like(tokens, dtype=torch.bool).index_fill(0, self._length.cumsum(0) - 1, True)
        return tokens.roll(-1).masked_fill(ends, 0)

    def first(self, tokens: Tensor) -> Tensor:
        """[N] -> [B]: a per-token quantity at each completion's first token."""
        return tokens[self._length.cumsum(0) - self._length]

    def last(self, tokens: Tensor) -> Tensor:
        """[N] -> [B]: a per-token quantity at each completion's last token."""
        return tokens[self._length.cumsum(0) - 1]

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

    @property
    def score(self) -> Tensor:
        """[B] the reward model's number at the last token; needs ``score``."""
        return self.last(self.extra("score"))

    def take(self, rows: Tensor) -> Completions:
        """The completions at ``rows`` ([M] integer), in that order."""
        length = self._length[rows]
        starts = (self._length.cumsum(0) - self._length)[rows]
        inside = torch.arange(int(length.sum()), device=length.device)
        inside = inside - torch.repeat_interleave(length.cumsum(0) - length, length)
        tokens = torch.repeat_interleave(starts, length) + inside
        ref = None if self._ref is None else self._ref[tokens]
        extras = {name: values[tokens] for name, values in self._extras.items()}
        held = None if self._held is None else self._held[tokens]
        taken = Completions(self._token_logps[tokens], length, ref, extras, held)
        taken.used = self.used
        return taken

    def then(self, other: Completions) -> Completions:
        """These completions and the others after them."""
        ref = None if self._ref is None or other._ref is None else torch.cat([self._ref, other._ref])
        extras = {k: torch.cat([v, other._extras[k]]) for k, v in self._extras.items()}
        logps, length = (torch.cat([self._token_logps, other._token_logps]), torch.cat([self._length, other._length]))
        held = None if self._held is None or other._held is None else torch.cat([self._held, other._held])
        joined = Completions(logps, length, ref, extras, held)
        joined.used = self.used
        return joined

    def with_policy(self, token_logps: Tensor) -> Completions:
        """The same completions with other policy log-probs (a leaf to differentiate by, or the reference's own)."""
        return Completions(token_logps, self._length, self._ref, self._extras)

    def detach(self) -> Completions:
        """The same numbers as constants: what a loss stops the gradient of is computed from these."""
        still = self.with_policy(self._token_logps.detach() if self._held is None else self._held)
        still._extras = {name: values.detach() for name, values in self._extras.items()}
        still.used = self.used
        return still


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

    def seen_as(self, view: type[View], prefix: str = "", memory: Mapping[str, Tensor] | None = None) -> Any:
        """These pairs as another view: thumbs (all chosen up, then all rejected down) or demonstrations (the chosen).

        ``prefix``: the part of the memory (default: this batch's) that the view sees, without the prefix.
        """
        memory = self.memory if memory is None else memory
        mine = {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}
        around = None if self.around is None else self.around.seen_as(view)
        more: dict[str, Any] = {"memory": mine, "around": around, "learning": self.learning}
        if view is Pairs:
            return replace(self, **more)
        if view is Demonstrations:
            return Demonstrations(self.chosen, **more)
        if view is Thumbs:
            up = torch.arange(2 * len(self), device=self.tie.device) < len(self)
            return Thumbs(self.chosen.then(self.rejected), up, **more)
        raise NeedError(f"pairs cannot be seen as {view.__name__.lower()}")

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
    def counts(self) -> tuple[int, int]:
        """Thumbs up, thumbs down."""
        up = int(self.desirable.sum())
        return up, len(self) - up

    def one_sided(self, method: str) -> str:
        """Why thumbs that all point one way cannot be learned from; "" where there are both kinds."""
        up, down = self.counts
        said = f"all {len(self)} thumbs point {'up' if up else 'down'}; {method} needs both kinds"
        return "" if up and down else said

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

    record: ClassVar[type[Record]] = Ranking
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


@dataclass(frozen=True)
class Rollouts(Rankings):
    """K answers that the policy itself sampled for each of R prompts; every answer has its ``score`` [B].

    ``columns`` holds what :meth:`Objective.credit` computed when they were sampled, and ``behaviour``: constants, one per
    token. Where a greedy answer was asked for, ``baseline`` is its score, repeated. A file holds the prompts only.
    """

    record: ClassVar[type[Record]] = Prompt
    score: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        known = examples[0].columns if examples else {}
        columns = {n: torch.cat([e.columns[n].to(y.length) for e in examples]) for n in known}
        return super().of(y, examples, columns=columns, **more)

    def column(self, name: str) -> Tensor:
        """[N] constants of this name."""
        if name not in self.columns:
            raise NeedError(f'column "{name}" was read, but credit() did not compute it')
        return self.columns[name]

    @property
    def behaviour(self) -> Tensor:
        """[N] log-probability of each token under the policy that sampled it."""
        return self.column("behaviour")

    @property
    def advantage(self) -> Tensor:
        """[N] how much better than expected each token turned out, from :meth:`Objective.credit`."""
        return self.column("advantage")

    @property
    def baseline(self) -> Tensor:
        """[B] the score of the greedy answer to the same prompt; needs ``greedy``."""
        self.y.used.add("greedy")
        if "baseline" not in self.columns:
            raise NeedError('the greedy answer was read, but "greedy" is not in the objective\'s needs')
        return self.y.last(self.columns["baseline"])

    def per_prompt(self, values: Tensor) -> Tensor:
        """[B] -> [R]: sum a quantity of each answer over its prompt."""
        return values.new_zeros(len(self)).index_add(0, self.prompt, values)


@dataclass(frozen=True)
class Scores(View):
    """R completions, each with a number: ``score`` [R], higher is better, in the judge's own unit."""

    record = Score
    y: Completions
    score: Tensor

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        score = [e.record.score for e in examples]  # type: ignore[attr-defined]
        return cls(y, torch.tensor(score, device=y.length.device, dtype=y.length.dtype), **more)

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Solutions(View):
    """R completions in steps: ``at`` [S] the token that ends each judged step, ``row`` [S] whose step it is, and ``label``
    [S] how right everything up to there is, from 0 to 1."""

    record = Solution
    y: Completions
    at: Tensor
    row: Tensor
    label: Tensor

    @classmethod
    def of(cls, y: Completions, examples: Sequence[Example], **more: Any) -> Self:
        device, starts = y.length.device, (y._length.cumsum(0) - y._length).tolist()
        judged = [(i, start + m) for i, (e, start) in enumerate(zip(examples, starts, strict=True)) for m in e.marks]
        label = [v for e in examples for v in e.record.labels[: len(e.marks)]]  # type: ignore[attr-defined]
        row, at = torch.tensor(judged, device=device, dtype=torch.long).view(-1, 2).unbind(1)
        return cls(y, at, row, torch.tensor(label, device=device, dtype=y.length.dtype), **more)

    def sum(self, steps: Tensor) -> Tensor:
        """[S] -> [R]: sum a quantity of each judged step over each completion."""
        return steps.new_zeros(len(self)).index_add(0, self.row, steps)

    def __len__(self) -> int:
        return len(self.y)
