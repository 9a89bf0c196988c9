"""DPO + NLL: the preference loss of Iterative RPO."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class DPONLL(DPO):
    """DPO, plus the negative log-likelihood of the chosen so that it does not become less likely.

    L = -log sigma(beta log u(y_w)/u(y_l)) - alpha log pi(y_w|x)/|y_w|,   u(y) = pi(y|x)/pi_ref(y|x)

    ``nll_normalise: token`` divides by the mean |y_w| of the batch instead: a mean over all chosen tokens.
    """

    nll_weight: float = option(1.0, "alpha, weight of the likelihood of the chosen", source="paper: 1", above=0)
    nll_normalise: str = option(
        "sequence_mean",
        "what the chosen's log-prob is divided by: its own length, or tokens of the whole batch",
        source="paper; token: TRL up to 0.28",
        choices=("sequence_mean", "token"),
    )
    with_sft = True
    paper = "arXiv:2404.19733"
    use = "The chosen answers are worth imitating in themselves, such as correct derivations."
    avoid = "The chosen answers are only the lesser evil: the likelihood term imitates them all the same."
    differs = "Also called RPO, as two other methods are. OpenRLHF: sequence mean; TRL up to 0.28: token mean."

    def nll(self, batch: Pairs) -> Tensor:
        """[R] whose mean over the batch is the negative log-likelihood term."""
        whole = batch.whole
        tokens = whole.chosen.length.sum() / len(whole) if self.nll_normalise == "token" else batch.chosen.length
        return -batch.chosen.logp / tokens

    def loss(self, batch: Pairs) -> Tensor:
        return super().loss(batch) + self.nll_weight * self.nll(batch)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        return {"nll": -batch.chosen.token_logps}
