"""SLiC-HF: a hinge on the policy's own log-probs, anchored by the likelihood of a target."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class SLiC(Objective):
    """Calibrate sequence likelihoods until the chosen leads by delta; a cross-entropy keeps the model near a target.

    L = max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - lambda log pi(y_ref|x)

    y_ref is the record's target, or the chosen where it has none.
    """

    delta: float = option(1.0, "margin in nats that the chosen must lead by", source="paper, section 3.2", above=0)
    nll_weight: float = option(
        0.1, "lambda, weight of the target's likelihood", source="HALOs; the paper tunes it", at_least=0
    )
    feedback, with_sft = Pairs, True
    paper = "arXiv:2305.10425"
    use = "No reference model fits into memory, and a target to stay close to is at hand."
    avoid = "Answers are long or of very unequal length: delta is a margin between sums over tokens."
    differs = "SLiC-HF direct. TRL's hinge is RSO's (a reference, no cross-entropy); HALOs now mixes tokens into rows."

    def reward(self, y: Completions) -> Tensor:
        return y.logp

    def loss(self, batch: Pairs) -> Tensor:
        hinge = relu(self.delta - self.reward(batch.chosen) + self.reward(batch.rejected))
        return hinge - self.nll_weight * batch.target.logp

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return {"nll": -batch.target.token_logps}
