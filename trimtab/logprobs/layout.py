"""How groups of (prompt, completions) lie in the model's input: one prompt for all its completions, no padding.

Three layouts give the same log-probabilities:

    shared   prompt1 a1 b1 prompt2 a2 b2     one row; the prompt is encoded once for all its completions, and so is what all
                                             prompts begin with (a system prompt)
    packed   prompt1 a1 prompt1 b1 ...       one row; each completion has its own copy of the prompt
    padded   one row per completion, padded at the right; works for every model

``shared`` and ``packed`` need our attention function, which keeps groups and completions apart; ``padded`` needs
nothing and is the oracle for the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.tokens.batch import Example

Mode = Literal["shared", "packed", "padded"]
APART = 16_384  # pairs of positions that each part must save: below that, its calls cost more
OPENING = 8  # tokens that all prompts must begin with, to be read once: that costs a part of attention more


@dataclass
class Block:
    """Tokens that may attend to each other: a prompt and the completions that continue it.

    Attributes:
        start, stop: where it lies in the packed row.
        prompt: number of prompt tokens; completions follow, ``lengths`` tokens each.
        before: where in the row the tokens lie that come before these, to which all of them attend.
        elsewhere: those tokens lie in another pass's row, which kept their keys and values.
    """

    start: int
    prompt: int
    lengths: list[int]
    before: tuple[slice, ...] = ()
    elsewhere: bool = False
    masks: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, repr=False)
    cut: dict[tuple[torch.device, int], list[Part]] = field(default_factory=dict, repr=False)
    row: dict[tuple[torch.device, int], Any] = field(
        default_factory=dict, repr=False
    )  # of the whole row, in its first block
    flex: dict[tuple[torch.device, int], Any] = field(default_factory=dict, repr=False)  # the same

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.lengths)

    @property
    def seen(self) -> int:
        """How many tokens come before these."""
        return total(self.before)

    @property
    def causal(self) -> bool:
        """A single completion needs no mask but the causal one."""
        return sum(n > 0 for n in self.lengths) <= 1

    def mask(self, device: torch.device, window: int = 0) -> Tensor:
        """[G, before + G] bool, true where row attends to column: causal, the prompt and what is before it for all, a
        completion for itself.

        ``window``: sliding attention over that many positions (as the model counts them, per completion), 0 for none.
        """
        key = (device, window)
        if key not in self.masks:
            seen = self.seen
            whole = Block(0, seen + self.prompt, self.lengths)
            owner = torch.repeat_interleave(torch.tensor([0, *range(1, len(self.lengths) + 1)]), whole.sizes())
            index = torch.arange(len(owner))
            mask = (index[seen:, None] >= index) & ((owner == 0) | (owner[seen:, None] == owner))
            if window:
                position = whole.positions()
                mask &= position[seen:, None] - position < window
            self.masks[key] = mask.to(device)
        return self.masks[key]

    def parts(self, device: torch.device, window: int = 0) -> list[Part]:
        """The products that attention over this block takes: the whole square, or, where that saves enough, the prompt's and one
        for each completion (the completions of one prompt do not see each other: of the square, that is the most)."""
        if (device, window) not in self.cut:
            self.cut[device, window] = self._parts(device, window)
        return self.cut[device, window]

    def _parts(self, device: torch.device, window: int) -> list[Part]:
        whole = self.stop - self.start
        fed = [n for n in self.lengths if n]
        apart = self.prompt**2 + sum(n * (self.prompt + n) for n in fed)
        if len(fed) < 2 or whole**2 - apart < APART * len(fed):
            plain = self.causal and not window
            return [Part(whole, None if plain else self.mask(device, window))]
        before = self.seen + self.prompt
        own = [Part(n, continued(before, n, device, window) if window else None, after=True) for n in fed]
        return [Part(self.prompt, continued(self.seen, self.prompt, device, window) if window else None), *own]

    def sizes(self) -> Tensor:
        return torch.tensor([self.prompt, *self.lengths])

    def positions(self) -> Tensor:
        """Position ids: every completion goes on where the prompt ended."""
        first = self.seen
        parts = [torch.arange(self.prompt), *(torch.arange(self.prompt, self.prompt + n) for n in self.lengths)]
        return torch.cat(parts) + first


def total(slices: Sequence[slice]) -> int:
    return sum(s.stop - s.start for s in slices)


@lru_cache(64)
def continued(before: int, length: int, device: torch.device, window: int = 0) -> Tensor:
    """[C, P + C] what each of C consecutive tokens sees of P before them and of themselves."""
    index = torch.arange(before + length, device=device)
    mask = index[before:, None] >= index
    return mask & (index[before:, None] - index < window) if window else mask


@dataclass
class Part:
    """Consecutive rows of a block, which attend to each other.

    Attributes:
        rows: how many.
        mask: [rows, columns] bool; None: causal, and all that comes before them.
        after: whether they attend to the rows of the first part, too, which come among the columns after the block's ``before``.
        added: the mask as numbers to add, by type.
    """

    rows: int
    mask: Tensor | None
    after: bool = False
    added: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)


@dataclass
class Kept:
    """Keys and values of one pass, by attention layer, for another pass that goes on from them. Closed, it takes no more: not
    those of a pass that is recomputed for its gradient."""

    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    closed: bool = False


@dataclass
class Layout:
    """Model input for a list of examples. R rows of T tokens (R=1 unless padded), N completion tokens, B completions.

    Attributes:
        input_ids, position_ids: [R, T].
        attention_mask: [R, T], only where padded.
        blocks: groups in the packed row, the last one of each example, in a first one what all begin with; empty where padded.
        predict: [N] index into the R*T hidden states: the one that predicts each completion token, or, closed, the one
            after it.
        target: [N] the completion tokens.
        length: [B] completion tokens of each completion.
        kept: what attention leaves here, or, where blocks go on from tokens ``elsewhere``, takes from here.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    blocks: list[Block]
    predict: Tensor
    target: Tensor
    length: Tensor
    kept: Kept | None = None

    def to(self, device: torch.device) -> Layout:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Layout(**moved)


def lay_out(examples: Sequence[Example], mode: Mode, closed: bool = False) -> Layout:
    """Lay examples out for a model. The last token of a completion predicts nothing, so it is not fed, unless the layout
    is ``closed``: there the state after every token is read, as a reward model does."""
    if mode == "padded":
        return _padded(examples, closed)
    common = opening(examples) if mode == "shared" else 0
    ids = list(examples[0].prompt[:common]) if common else []
    blocks = [Block(0, common, [])] if common else []
    before = (slice(0, common),) if common else ()
    predict: list[int] = []
    for e in examples:
        for group in [e.completions] if mode == "shared" else [(c,) for c in e.completions]:
            fed = [c if closed else c[:-1] for c in group]
            blocks.append(Block(len(ids), len(e.prompt) - common, [len(c) for c in fed], before))
            ids.extend(e.prompt[common:])
            last = [] if closed else [len(ids) - 1]
            for c in fed:
                predict += [*last, *range(len(ids), len(ids) + len(c))]
                ids.extend(c)
    positions = torch.cat([b.positions() for b in blocks])
    return Layout(torch.tensor([ids]), positions[None], None, blocks, torch.tensor(predict), *_targets(examples))


def opening(examples: Sequence[Example]) -> int:
    """Tokens that all prompts begin with, 0 where they are few. Each prompt keeps its last: its state predicts."""
    if len(examples) < 2:
        return 0
    least, most = min(e.prompt for e in examples), max(e.prompt for e in examples)  # what these share, all share
    n = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    n = min(n, min(len(e.prompt) for e in examples) - 1)
    return n if n >= OPENING else 0


def lay_out_after(first: Layout, examples: Sequence[Example]) -> Layout:
    """Other completions of the prompts of ``first``, one each and in its order, which go on from what that pass kept. Each
    prompt's last token is fed again: its state predicts the first of the completion."""
    ids: list[int] = []
    blocks: list[Block] = []
    for block, e in zip(first.blocks[-len(examples) :], examples, strict=True):
        fed = (e.prompt[-1], *e.completions[0][:-1])
        prompt = slice(block.start, block.start + block.prompt - 1)
        blocks.append(Block(len(ids), 0, [len(fed)], (*block.before, prompt), elsewhere=True))
        ids.extend(fed)
    row, target, positions = torch.tensor([ids]), _targets(examples), torch.cat([b.positions() for b in blocks])
    return Layout(row, positions[None], None, blocks, torch.arange(len(ids)), *target, first.kept)


def _padded(examples: Sequence[Example], closed: bool) -> Layout:
    rows = [(e.prompt, c if closed else c[:-1]) for e in examples for c in e.completions]
    width = max(len(p) + len(c) for p, c in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    predict: list[int] = []
    for r, (p, c) in enumerate(rows):
        n = len(p) + len(c)
        input_ids[r, :n] = torch.tensor([*p, *c])
        attention_mask[r, :n] = 1
        predict.extend(range(r * width + len(p) - (not closed), r * width + n))
    positions = torch.arange(width).expand(len(rows), width)
    return Layout(input_ids, positions, attention_mask, [], torch.tensor(predict), *_targets(examples))


def _targets(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    completions = [c for e in examples for c in e.completions]
    return torch.tensor(list(chain.from_iterable(completions))), torch.tensor([len(c) for c in completions])


def cost(example: Example, mode: Mode, closed: bool = False) -> int:
    """Tokens that the example puts into the model: what the token budget counts."""
    fed = sum(len(c) - (not closed) for c in example.completions)
    return len(example.prompt) * (1 if mode == "shared" else len(example.completions)) + fed
