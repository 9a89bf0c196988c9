"""DNO: DPO whose labels are as sure as the judge was."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO

MEANINGS = ("reward_difference", "probability", "ignored")


def win_probability(batch: Pairs, strength: str) -> Tensor:
    """[R] P(y_w beats y_l). Unknown strengths count as sure: training refuses them, held-out rows may have them."""
    sure = torch.ones_like(batch.chosen.length)
    if batch.strength is None or strength not in MEANINGS[:2]:
        return sure
    known = batch.strength if strength == "probability" else torch.sigmoid(batch.strength)
    return torch.where(known.isnan(), sure, known)


def unusable(batch: Pairs, strength: str, method: str) -> str:
    """Why it cannot be learned from, where strengths are wanted and some are unknown, or are no probabilities."""
    s = torch.full_like(batch.chosen.length, torch.nan) if batch.strength is None else batch.strength
    if strength != "ignored" and (unknown := int(s.isnan().sum())):
        return f"{unknown} of {len(s)} comparisons have no strength; {method} needs one for each, or strength: ignored"
    if strength == "probability" and (s.min() < 0 or s.max() > 1):
        return f"strengths from {s.min():g} to {s.max():g} are no probabilities; see the option strength"
    return ""


@dataclass(frozen=True)
class DNO(DPO):
    """Direct Nash optimization: one round of self-play as a regression on win probabilities.

    P = sigma(s), s the record's strength: the difference of both answers' mean win rates against the policy's own
    L = -P log sigma(m) - (1 - P) log sigma(-m),   m = r(y_w) - r(y_l)
    """

    beta: float = option(0.1, "eta: strength of the pull to the reference", source="paper: 0.05 to 0.1", above=0)
    strength: str = option(
        "reward_difference",
        "what a record's strength is: s with P = sigma(s), P itself, or ignored (P = 1: DPO)",
        source="paper",
        choices=MEANINGS,
    )
    paper = "arXiv:2404.03715"
    use = "Rounds of training on the policy's own answers, with a judge that gives win rates; reference = last round's policy."
    avoid = "The data says only who won: it is then DPO."
    differs = "DNO-Prct, which the paper trains, is plain DPO on pairs filtered by a large margin (strength: ignored)."

    def loss(self, batch: Pairs) -> Tensor:
        wins, margin = win_probability(batch, self.strength), self.reward(batch.chosen) - self.reward(batch.rejected)
        return -wins * logsigmoid(margin) - (1 - wins) * logsigmoid(-margin)

    def advise(self, batch: Pairs) -> tuple[str, list[str]]:
        return unusable(batch, self.strength, self.name()), []
