"""Tokenised feedback: the ids of a prompt, the ids of its completions, and the record that says what was said."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from trimtab.feedback.records import Record


@dataclass(frozen=True)
class Example:
    """One record as tokens. A pair has K=2 completions, a thumb K=1, a ranking K of any size.

    Attributes:
        prompt: token ids of the conversation up to where the model answers; never empty.
        completions: K lists of token ids, in the order of ``record.completions``. Each ends with the end-of-sequence
            token, which is trained, unless the truncation policy cut it (and counted it).
        record: where the labels live. Nothing is copied out of it, so nothing can disagree with it.
        weight: how much the row counts where a method corrects for a shift between the prompts of good and of bad
            completions (BCO); computed from all prompts in preparation, 1 otherwise.
        marks: the tokens of the completion at which its judged steps end, where it is a solution in steps.
        columns: what was computed once, when the policy sampled these completions: name -> [n] constants, one for each
            token of all completions (behaviour log-probs, advantages, returns).
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    record: Record
    weight: float = 1.0
    marks: tuple[int, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens in this example with the prompt counted once."""
        return len(self.prompt) + sum(len(c) for c in self.completions)


def jointly(example: Example) -> Example:
    """Both answers of a comparison in one text, in either order; the end token of the first keeps them apart."""
    first, second = example.completions[:2]
    return replace(example, completions=(first + second, second + first))


def completion_keys(example: Example) -> list[bytes]:
    """A 16-byte key per completion, over the exact token ids of prompt and completion: what caches are keyed by."""
    base = hashlib.blake2b(array("q", example.prompt).tobytes(), digest_size=16, person=b"trimtab prompt")
    keys = []
    for completion in example.completions:
        digest = base.copy()
        # the length separates (prompt "ab", answer "c") from (prompt "a", answer "bc")
        digest.update(array("q", [len(example.prompt), *completion]).tobytes())
        keys.append(digest.digest())
    return keys


def fill(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Cut ``costs`` (tokens per example) into microbatches of at most ``budget`` tokens, keeping the order.

    Returns lists of indices; an example that alone exceeds the budget gets a microbatch of its own. Batch size is
    mathematics, microbatch is memory: no number may depend on where the cuts fall.
    """
    parts: list[list[int]] = []
    used = 0
    for i, cost in enumerate(costs):
        if not parts or used + cost > budget:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += cost
    return parts
