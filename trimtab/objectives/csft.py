"""Conditional SFT: a control token says whether an answer was good or bad."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Thumbs
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class CSFT(Objective):
    """Imitate all answers, each after its control token; ask for good ones afterwards.

    c = <|good|> if desirable, <|bad|> if not
    L = -log pi(c, y | x),   divided by all tokens of the batch;   at inference <|good|> stands at the end of the prompt
    """

    token_in_loss: bool = option(True, "the control token itself is learned too", source="authors' code (HALOs)")
    feedback, control_tokens = Thumbs, ("<|good|>", "<|bad|>")
    paper = "arXiv:2302.08582"
    use = "Thumbs, no memory for a reference, and bad answers that are worth knowing as such."
    avoid = "You can hold a reference: KTO and BCO learn from the same thumbs what to avoid."
    differs = "In HALOs' loader the token is put before an answer again each time it occurs; here once, on a copy."
    with_sft = True

    def reward(self, y: Completions) -> Tensor:
        return y.mean_logp

    def loss(self, batch: Thumbs) -> Tensor:
        y = batch.y
        if self.token_in_loss:
            return -y.logp
        return -y.sum(torch.where(y.position > 0, y.token_logps, 0))

    def size(self, batch: Thumbs) -> Tensor:
        return batch.y.length if self.token_in_loss else (batch.y.length - 1).clamp(min=1)
