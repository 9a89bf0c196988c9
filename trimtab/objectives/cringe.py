"""CRINGE: likelihood of good answers, and a contrast of each bad token against one the policy would rather say."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.base import Objective, option


def contrast(y: Completions, detach_rival: bool) -> Tensor:
    """[N] -log of the bad token's loss of a duel with its rival: softplus(log pi(y_t) - log pi(s*))."""
    rival = y.extra("rival")
    return softplus(y.token_logps - (rival.detach() if detach_rival else rival))


@dataclass(frozen=True)
class CRINGE(Objective):
    """Cross-entropy on desirable answers; on undesirable ones each token must lose against a likely other token.

    s*  = a token drawn from the policy's k likeliest ones other than y_t
    L   = -log pi(y|x)                                       if desirable
    L   = alpha sum_t log(1 + pi(y_t|.)/pi(s*|.))            if not;   divided by all tokens of the batch
    """

    alpha: float = option(1.0, "weight of the contrast", source="authors' code (ParlAI), ct_loss_weight", above=0)
    rivals: int = option(  # type: ignore[misc]  # an option here, a constant elsewhere
        1, "k: the rival is drawn from that many likeliest tokens", source="authors' code", at_least=1
    )
    detach_rival: bool = option(False, "no gradient through the rival", source="authors' code, detach_positives")
    feedback, needs = Thumbs, frozenset({"rival"})
    paper = "arXiv:2211.05826"
    use = "Thumbs, and bad answers are bad in what they say token by token (safety, repetition)."
    avoid = "Undesirable answers are good text for the most part: every token of them is pushed down."
    differs = "ParlAI's padding id silently switches the contrast off for some vocabularies; there is no padding here."
    with_sft, level = True, "token"

    def reward(self, y: Completions) -> Tensor:
        return y.mean_logp

    def loss(self, batch: Thumbs) -> Tensor:
        bad = batch.y.sum(contrast(batch.y, self.detach_rival))
        return torch.where(batch.desirable, -batch.y.logp, self.alpha * bad)

    def size(self, batch: Thumbs) -> Tensor:
        return batch.y.length

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        per_token = contrast(batch.y, self.detach_rival)
        up = batch.desirable[batch.y.owner]
        return {"nll": -batch.y.token_logps[up], "contrast": per_token[~up]}
