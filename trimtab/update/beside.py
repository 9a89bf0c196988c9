"""Likelihood of other text in the same optimiser step: PPO-ptx (InstructGPT, arXiv:2203.02155, equation 2), for any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.tokens.batch import Example
from trimtab.update.trainer import Batches


@dataclass(frozen=True)
class Beside:
    """Adds ``weight`` times the mean negative log-likelihood, over the tokens of a batch of ``examples``, to the loss.

    The gradient is the sum of both; tokens are counted apart, so neither changes the other's denominator. Which examples a
    step takes depends on the seed and the step alone: a resumed run takes the same.
    """

    examples: Sequence[Example]
    weight: float
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[Example]:
        """The examples of an optimiser step, counted from 0."""
        order = Batches(len(self.examples), self.batch_size, self.seed)
        epoch, place = divmod(step, len(order))
        return [self.examples[i] for i in order.epoch(epoch)[place]]
