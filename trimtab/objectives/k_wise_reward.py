"""The reward model of InstructGPT, from rankings of K answers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option
from trimtab.objectives.plackett_luce import places


@dataclass(frozen=True)
class KWiseReward(Objective):
    """All pairs of one prompt are one row of the batch, so each answer is encoded once and no prompt counts for more.

    L = -1/n sum_{i above j} log sigma(s(y_i) - s(y_j)),   s(y) the model's number at the last token
    n = pairs that are no ties, or K (K - 1)/2
    """

    average: str = option(
        "kept", "n: pairs that are no ties, or all pairs", source="ours; InstructGPT: all", choices=("kept", "all")
    )
    feedback, needs = Rankings, frozenset({"score"})
    paper = "arXiv:2203.02155"
    use = "Annotators ranked four to nine answers to each prompt."
    avoid = "Every prompt has two answers: it is then reward_model without its options."
    differs = "InstructGPT does not say what ties do. Shuffling pairs over the data, as converted rankings are, overfitted there."

    def reward(self, y: Completions) -> Tensor:
        return y.score

    def above(self, batch: Rankings) -> Tensor:
        """[R, K, K] whether i was placed above j; a prompt without a K-th answer has NaN there, above and below nothing."""
        place = places(batch)
        return place[:, :, None] < place[:, None, :]

    def differences(self, batch: Rankings) -> Tensor:
        """[R, K, K] s(y_i) - s(y_j)."""
        s = batch.table(self.reward(batch.y), 0.0)
        return s[:, :, None] - s[:, None, :]

    def loss(self, batch: Rankings) -> Tensor:
        above, k = self.above(batch), torch.bincount(batch.prompt)
        n = above.sum((1, 2)) if self.average == "kept" else k * (k - 1) // 2
        return torch.where(above, softplus(-self.differences(batch)), 0).sum((1, 2)) / n.clamp(min=1)

    def advise(self, batch: Rankings) -> tuple[str, list[str]]:
        kept, k = int(self.above(batch).sum()), torch.bincount(batch.prompt)
        pairs = int((k * (k - 1) // 2).sum())
        if not kept:
            return f"all {pairs} pairs of the rankings are ties; there is nothing to learn from", []
        return "", [f"{pairs - kept} of {pairs} pairs are ties and are not learned from"] if kept < pairs else []

    def metrics(self, batch: Rankings) -> dict[str, Tensor]:
        d = self.differences(batch)[self.above(batch)]
        return {"rewards/accuracies": (d > 0).to(d.dtype), "rewards/margins": d}
