"""NPO: negative preference optimization, unlearning from bad answers alone."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.bce import class_means


@dataclass(frozen=True)
class NPO(Objective):
    """DPO without its winner: gradient ascent on bad answers that fades once they are unlikely. Good ones are retained.

    L_NPO = (2/beta) E_D-[log(1 + (pi(y|x)/pi_ref(y|x))^beta)]                      (equation 3)
    L     = L_NPO + w L_RT,   L_RT = -(mean over tokens of D+ of log pi(y_t|x, y_<t))
    """

    beta: float = option(
        0.1, "how soon a bad answer is unlikely enough; gradient ascent at 0", source="authors' code", above=0
    )
    retain_weight: float = option(
        1.0, "w: weight of the desirable answers' likelihood", source="authors' code, grad_diff_coeff", at_least=0
    )
    feedback, needs = Thumbs, frozenset({"reference"})
    paper = "arXiv:2404.05868"
    use = "Answers that must be forgotten, with no better ones at hand; thumbs up hold what must stay."
    avoid = "Good answers are known for the same prompts: pairs or kto say where to go, NPO only from where."
    differs = "The paper's retain loss is a sum over tokens; the authors' code takes their mean, as here. No KL form."
    with_sft, negatives_only = True, True

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def loss(self, batch: Thumbs) -> Tensor:
        up, length = batch.whole.desirable, batch.whole.y.length
        # the mean over good rows of this is the mean over their tokens
        retain = -batch.y.logp * up.sum() / length[up].sum().clamp(min=1)
        forget = 2 / self.beta * softplus(self.reward(batch.y))
        return class_means(batch, torch.where(batch.desirable, self.retain_weight * retain, forget))

    def advise(self, batch: Thumbs) -> tuple[str, list[str]]:
        up, n = int(batch.desirable.sum()), len(batch)
        if up == n:
            return f"all {n} thumbs point up; npo forgets those that point down", []
        if not up:
            return "", [f"all {n} thumbs point down: nothing is retained, watch the KL to the reference"]
        return "", [] if self.retain_weight else [f"retain_weight is 0: {up} thumbs up are not learned from"]

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {"nll": -batch.y.mean_logp[batch.desirable]}
