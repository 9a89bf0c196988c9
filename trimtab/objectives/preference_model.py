"""A pairwise preference model: prompt and two answers -> the probability that the first one wins."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.dno import MEANINGS, unusable, win_probability


@dataclass(frozen=True)
class PreferenceModel(Objective):
    """Both answers stand in one text, and each comparison is learned in both orders; preferences may be circular.

    sigma(s(x, a, b)) = P(a beats b),   s the model's number at the last token
    L = 1/2 [H(p, sigma(s(x, y_w, y_l))) + H(1 - p, sigma(s(x, y_l, y_w)))],   H cross-entropy, p = 1, or 1/2 for a tie
    P(a beats b) at use = 1/2 [sigma(s(x, a, b)) + 1 - sigma(s(x, b, a))]
    """

    strength: str = option(
        "ignored",
        "what a record's strength is: ignored (p = 1), p itself, or s with p = sigma(s)",
        source="comparisons say who won; probability: Constitutional AI, RLAIF",
        choices=MEANINGS[::-1],
    )
    feedback, needs, ties, jointly = Pairs, frozenset({"score"}), True, True
    paper = "arXiv:2312.00886"
    use = (
        "Nash learning, SPPO and DNO: preferences that no scale of rewards explains, such as a beats b beats c beats a."
    )
    avoid = "Many answers are to be ranked: it costs a pass for every ordered pair, a reward model one for each answer."
    differs = (
        "The paper prompts a T5 with both answers; here a head reads prompt, answer, end token, answer, end token."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.score  # of a pair in one order: the log-odds that the answer which stands first wins

    def loss(self, batch: Pairs) -> Tensor:
        first, second = self.reward(batch.chosen), self.reward(batch.rejected)  # the winner stands first, then second
        p = torch.where(batch.tie, 0.5, win_probability(batch, self.strength))
        right, wrong = logsigmoid(first) + logsigmoid(-second), logsigmoid(-first) + logsigmoid(second)
        return -(p * right + (1 - p) * wrong) / 2

    def advise(self, batch: Pairs) -> tuple[str, list[str]]:
        strength = None if batch.strength is None else batch.strength.masked_fill(batch.tie, 0.5)  # a tie needs none
        return unusable(replace(batch, strength=strength), self.strength, self.name()), []

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        first, second = self.reward(batch.chosen), self.reward(batch.rejected)
        wins = (torch.sigmoid(first) + torch.sigmoid(-second)) / 2
        same = (first > 0) != (second > 0)
        return {"p_chosen": wins[~batch.tie], "same_in_both_orders": same.to(wins.dtype)}
