"""Pairwise CRINGE: the contrast for comparisons, gated by how well the pair is already told apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.cringe import contrast


@dataclass(frozen=True)
class PairwiseCRINGE(Objective):
    """CRINGE with the chosen answer as good and the rejected one as bad, switched off where the margin is large.

    g = sigma((b - (log pi(y_w|x) - log pi(y_l|x))) / tau)
    L = g (-log pi(y_w|x) + alpha sum_t log(1 + pi(y_l,t|.)/pi(s*|.))),   divided by all tokens of the batch
    """

    alpha: float = option(1.0, "weight of the contrast", source="authors' code (ParlAI), ct_loss_weight", above=0)
    margin: float = option(0.0, "b: margin in nats at which the gate is half open", source="ours; the paper tunes it")
    temperature: float = option(10.0, "tau: width of the gate in nats", source="ours; the paper tunes it", above=0)
    rivals: int = option(  # type: ignore[misc]  # an option here, a constant elsewhere
        1, "k: the rival is drawn from that many likeliest tokens", source="authors' code", at_least=1
    )
    detach_rival: bool = option(False, "no gradient through the rival", source="authors' code, detach_positives")
    detach_gate: bool = option(True, "no gradient through the gate", source="ours: no source says; a gate only weighs")
    feedback, needs = Pairs, frozenset({"rival"})
    paper = "arXiv:2312.16682"
    use = "Pairs of the policy's own samples, renewed every round (iterative training with a reward model)."
    avoid = "Answers are long and margins tens of nats: the gate is then a switch; widen the temperature."
    differs = "There is no official code; summed log-probs enter the gate, and whether it is detached is an option."
    with_sft, level = True, "token"

    def reward(self, y: Completions) -> Tensor:
        return y.logp

    def gate(self, batch: Pairs) -> Tensor:
        chosen, rejected = batch.chosen, batch.rejected
        if self.detach_gate:
            chosen, rejected = chosen.detach(), rejected.detach()
        return torch.sigmoid((self.margin - chosen.logp + rejected.logp) / self.temperature)

    def loss(self, batch: Pairs) -> Tensor:
        bad = batch.rejected.sum(contrast(batch.rejected, self.detach_rival))
        return self.gate(batch) * (self.alpha * bad - batch.chosen.logp)

    def size(self, batch: Pairs) -> Tensor:
        return batch.chosen.length + batch.rejected.length

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return {"gate": self.gate(batch)}
