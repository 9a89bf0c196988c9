"""IPO: regress the margin to a finite target."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class IPO(Objective):
    """Psi-PO with Psi the identity: the margin stops at a target even where every label agrees.

    s(y) = log pi(y|x)/pi_ref(y|x), or that divided by |y|
    L    = (s(y_w) - s(y_l) - 1/(2 tau))^2
    """

    tau: float = option(0.1, "strength of the pull to the reference", source="HALOs and TRL (there: beta)", above=0)
    aggregation: str = option(
        "mean",
        "log-ratio of an answer: mean over its tokens, or their sum",
        source="confirmed by the authors (TRL pull request 1265); the paper's formula reads as the sum",
        choices=("mean", "sum"),
    )
    feedback, needs = Pairs, frozenset({"reference"})
    paper = "arXiv:2310.12036"
    use = "Labels are nearly deterministic or the data is small, so that DPO's margins would grow without bound."
    avoid = "Margins must tell clear pairs from close ones: every pair is pulled to the same margin."
    differs = "TRL, HALOs, LLaMA-Factory, PaddleNLP: mean. OpenRLHF and the DPO authors' code: sum, |y| times stiffer."

    def score(self, y: Completions) -> Tensor:
        return y.log_ratio / y.length if self.aggregation == "mean" else y.log_ratio

    def reward(self, y: Completions) -> Tensor:
        return self.tau * self.score(y)

    def loss(self, batch: Pairs) -> Tensor:
        return (self.score(batch.chosen) - self.score(batch.rejected) - 1 / (2 * self.tau)) ** 2
