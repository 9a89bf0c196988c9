"""SPPO: self-play, as a regression of each log-ratio on a win probability."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dno import DNO, MEANINGS, win_probability


@dataclass(frozen=True)
class SPPO(DNO):
    """Self-play preference optimization: each answer's log-ratio shall be what its win probability P is worth.

    L = 1/2 [(log u(y_w) - (P_w - 1/2)/beta)^2 + (log u(y_l) - (P_l - 1/2)/beta)^2],   u(y) = pi(y|x)/pi_ref(y|x)
    """

    beta: float = option(1e-3, "1/eta: strength of the pull to the reference", source="authors' scripts", above=0)
    strength: str = option(
        "ignored",
        "what a record's strength is: ignored (P_w = 1), P_w itself, or s with P_w = sigma(s); P_l = 1 - P_w",
        source="ours: most data has none; the paper has P_w",
        choices=MEANINGS[::-1],
    )
    factor: float = option(0.5, "in front of the squares", source="authors' code; 1 in TRL's sppo_hard", above=0)
    duel = True
    paper = "arXiv:2405.00675"
    use = (
        "Rounds of training on the policy's own answers scored by a preference model; reference = last round's policy."
    )
    avoid = "Gradients are not clipped: the loss starts near 250,000."
    differs = (
        "The authors estimate P_w and P_l apart, each as a mean over 5 answers, itself included (1/2). A pair has one number, "
        "and P_l = 1 - P_w of two answers alone: rounds that sample more refuse strengths."
    )

    def loss(self, batch: Pairs) -> Tensor:
        target = (win_probability(batch, self.strength) - 0.5) / self.beta
        return self.factor * ((batch.chosen.log_ratio - target) ** 2 + (batch.rejected.log_ratio + target) ** 2)
