"""A process reward model: is the solution right so far?"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.logprobs.scored import Completions, Solutions
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class ProcessReward(Objective):
    """A classifier of every step, read at the token that ends it; it does not see what follows.

    sigma(s_i) = P(everything up to step i is right),   s_i the model's number at its last token
    L = -1/N sum_i [l_i log sigma(s_i) + (1 - l_i) log sigma(-s_i)],   N the judged steps of the whole batch
    """

    supervise: str = option(
        "steps",
        "which labels count: every step's, or the last one's only (outcome supervision; evaluation always has all)",
        source="arXiv:2305.20050; last: TRL's train_on_last_step_only",
        choices=("steps", "last"),
    )
    feedback, needs, level = Solutions, frozenset({"score"}), "token"
    paper = "arXiv:2305.20050"
    use = "Reasoning in steps of which each was judged, by people or by how often attempts from there come out right."
    avoid = "Only the final answer was judged: that is a thumb."
    differs = (
        "TRL's last process trainer has two classes and a separator after the last step too; here it has the end token."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.score  # of the whole solution: the log-odds at its end

    def counts(self, batch: Solutions) -> Tensor:
        """[S] whether this step's label counts."""
        if self.supervise == "steps" or not batch.learning:
            return torch.ones_like(batch.label)
        return torch.cat([batch.row[1:] != batch.row[:-1], batch.row.new_ones(1, dtype=torch.bool)]).to(batch.label)

    def loss(self, batch: Solutions) -> Tensor:
        s = batch.y.extra("score")[batch.at]
        wrong = batch.label * softplus(-s) + (1 - batch.label) * softplus(s)  # -log sigma(s) = softplus(-s)
        return batch.sum(self.counts(batch) * wrong)

    def size(self, batch: Solutions) -> Tensor:
        return batch.sum(self.counts(batch))

    def advise(self, batch: Solutions) -> tuple[str, list[str]]:
        if batch.label.min() == batch.label.max():
            return f"all {len(batch.label)} steps have the label {batch.label[0]:g}; there is nothing to learn from", []
        return "", [f"{(batch.label > 0.5).float().mean():.0%} of {len(batch.label)} steps are right"]

    def metrics(self, batch: Solutions) -> dict[str, Tensor]:
        s, right = batch.y.extra("score")[batch.at], batch.label > 0.5
        hit = ((s > 0) == right).to(s.dtype)
        return {"accuracies/steps": hit, "accuracies/right_steps": hit[right], "accuracies/wrong_steps": hit[~right]}
