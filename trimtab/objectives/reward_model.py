"""The Bradley-Terry reward model."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.dno import unusable, win_probability


def off_centre(batch: Pairs) -> Tensor:
    """[R] how far the two scores of a pair are from mean 0: a comparison alone leaves their level open."""
    return (batch.chosen.score + batch.rejected.score) ** 2


@dataclass(frozen=True)
class RewardModel(Objective):
    """Maximum likelihood of the comparisons, s(y) the model's number at the last token of an answer.

    d = s(y_w) - s(y_l) - m,   m = 0 or the record's strength
    L = -w [p log sigma(d) + (1 - p) log sigma(-d)] + c (s(y_w) + s(y_l))^2,   p = 1 - eps, w = 1
    """

    strength: str = option(
        "ignored",
        "a record's strength is: ignored, the margin m, the weight w, p itself (soft labels), or a with p = sigma(a)",
        source="InstructGPT; margin: Llama 2; weight: HelpSteer2-Preference; probability: Constitutional AI",
        choices=("ignored", "margin", "weight", "probability", "reward_difference"),
    )
    label_smoothing: float = option(
        0.0, "eps, share of labels doubted", source="InstructGPT: none", at_least=0, below=0.5
    )
    centring: float = option(0.0, "c: pulls scores to mean 0", source="off; arXiv:2312.09244: 0.01", at_least=0)
    feedback, needs = Pairs, frozenset({"score"})
    paper = "arXiv:2203.02155"
    use = "A number for any answer is wanted: to rank samples, to filter data, to train a policy on it."
    avoid = "Only the policy is wanted: dpo needs no second model."
    differs = "OpenRLHF's LogExpLoss ignores the margin and overflows. With padding = end token peers read the token before it."

    def reward(self, y: Completions) -> Tensor:
        return y.score

    def of_strength(self, batch: Pairs, meaning: str, otherwise: float) -> Tensor:
        """[R] the records' strength where it has that meaning and is known."""
        none = torch.full_like(batch.chosen.length, otherwise)
        return none if self.strength != meaning or batch.strength is None else batch.strength.nan_to_num(otherwise)

    def loss(self, batch: Pairs) -> Tensor:
        d = self.reward(batch.chosen) - self.reward(batch.rejected) - self.of_strength(batch, "margin", 0.0)
        p, eps = win_probability(batch, self.strength), self.label_smoothing
        p = (1 - eps) * p + eps * (1 - p)
        wrong = -p * logsigmoid(d) - (1 - p) * logsigmoid(-d)
        return self.of_strength(batch, "weight", 1.0) * wrong + self.centring * off_centre(batch)

    def advise(self, batch: Pairs) -> tuple[str, list[str]]:
        return unusable(batch, self.strength, self.name()), []
