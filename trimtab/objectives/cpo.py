"""CPO: DPO without a reference, plus likelihood of the chosen."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Demonstrations, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.sft import SFT

NORMALISATIONS = ("token", "sequence_sum", "sequence_mean")


def chosen_nll(batch: Pairs, normalise: str) -> Tensor:
    """[R] -log pi(y_w|x), scaled so that its mean over the batch is the loss of SFT on the chosen answers."""
    sft, chosen = SFT(normalise), batch.seen_as(Demonstrations)
    return sft.loss(chosen) * len(batch.whole) / sft.size(chosen.whole).sum()


@dataclass(frozen=True)
class CPO(Objective):
    """Contrastive preference optimization: a uniform reference, and the chosen answer's likelihood as an anchor.

    L = -log sigma(beta log pi(y_w|x) - beta log pi(y_l|x)) + w NLL(y_w),   NLL a token mean over the batch's chosen
    """

    beta: float = option(0.1, "scale of the log-probability", source="paper", above=0)
    nll_weight: float = option(1.0, "w: weight of the chosen answer's likelihood", source="paper", above=0)
    nll_normalise: str = option(
        "token", "what the sum of -log pi(y_w|x) is divided by", source="authors' code", choices=NORMALISATIONS
    )
    feedback, with_sft = Pairs, True
    paper = "arXiv:2401.08417"
    use = "Memory is short and the chosen answers are good enough to imitate (translation)."
    avoid = "Lengths differ a lot: summed log-probs without a reference favour short answers."
    differs = (
        "The paper's formula sums the NLL (nll_normalise: sequence_sum); the authors' code and TRL take the token mean."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.logp

    def loss(self, batch: Pairs) -> Tensor:
        margin = self.reward(batch.chosen) - self.reward(batch.rejected)
        return -logsigmoid(margin) + self.nll_weight * chosen_nll(batch, self.nll_normalise)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return {"nll": -batch.chosen.token_logps}
