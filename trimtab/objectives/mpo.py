"""MPO: any weighted sum of objectives on one batch of pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class MPO(Objective):
    """Methods of one batch together; those on thumbs see both answers, those on demonstrations the chosen one.

    L = sum_i w_i L_i,   each L_i averaged over the batch as it would be alone
    """

    parts: str = option(
        "0.8 * dpo + 0.2 * bco + 1.0 * sft",
        'weighted methods, e.g. "1.0 * dpo(beta=0.2) + 0.5 * sft"',
        source="paper, section 3: preference 0.8, quality 0.2, generation 1",
    )
    terms: ClassVar[list[tuple[float, Objective]]]  # the parts, read
    feedback, needs, with_sft = Pairs, frozenset({"reference"}), True
    paper = "arXiv:2411.10442"
    use = "One loss forgets what another holds: ability by SFT, absolute quality by BCO, preference by DPO."
    avoid = "You want to know which part helps: compare the parts alone first."
    differs = "The paper fixes three parts; here any methods on pairs, thumbs or demonstrations can be parts."

    def __post_init__(self) -> None:
        super().__post_init__()
        from trimtab.objectives import weighted_sum  # here: that module reads this file

        terms = weighted_sum(self.parts)
        needs, coupled = frozenset().union(*(o.needs for _, o in terms)), any(o.coupled for _, o in terms)
        vars(self).update(terms=terms, needs=needs, coupled=coupled)

    def has_memory(self) -> bool:
        return any(o.has_memory() for _, o in self.terms)

    def reward(self, y: Completions) -> Tensor:
        return self.terms[0][1].reward(y)  # of the first part: rewards of several methods have no common unit

    def loss(self, batch: Pairs) -> Tensor:
        total = torch.zeros(())
        for i, (weight, part) in enumerate(self.terms):
            view = batch.seen_as(part.feedback, f"{i}/")
            rows = part.loss(view).view(-1, len(batch)).sum(0)
            total = total + weight * len(batch.whole) * rows / part.size(view.whole).sum()
        return total

    def remember(self, batch: Pairs, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        kept = {}
        for i, (_, part) in enumerate(self.terms):
            view = batch.seen_as(part.feedback, f"{i}/", memory)
            kept.update({f"{i}/{k}": v for k, v in part.remember(view, view.memory).items()})
        return kept
