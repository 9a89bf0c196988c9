"""ORPO: supervised fine-tuning with an odds ratio that sets chosen and rejected apart."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import Objective, option
from trimtab.objectives.cpo import NORMALISATIONS, chosen_nll


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0. Each branch sees only what it is exact for: the gradient of the other would be NaN."""
    near = x > -math.log(2)
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-large.exp()))


@dataclass(frozen=True)
class ORPO(Objective):
    """Likelihood of the chosen, and the odds of chosen against rejected; P(y) is the mean probability per token.

    P(y) = exp((1/|y|) log pi(y|x)),   odds(y) = P(y) / (1 - P(y))
    L    = NLL(y_w) - lambda log sigma(log odds(y_w)/odds(y_l))
    """

    odds_weight: float = option(
        0.1, "lambda: weight of the odds ratio", source="authors' script for Mistral; TRL's beta", above=0
    )
    nll_normalise: str = option(
        "token", "what the sum of -log pi(y_w|x) is divided by", source="authors' code", choices=NORMALISATIONS
    )
    feedback, with_sft, length_control = Pairs, True, True
    paper = "arXiv:2403.07691"
    use = "A base model and pairs, with one stage of training instead of SFT and then preferences."
    avoid = "The model is already tuned: the likelihood term dominates and moves it toward the chosen answers' style."
    differs = "The authors' code and TRL count the prompt in the NLL and are not stable near P = 1; LLaMA-Factory: sequence_mean."

    def reward(self, y: Completions) -> Tensor:
        """log odds(y). A mean log-prob rounded to 0 would have infinite odds."""
        mean = y.mean_logp
        return mean - log1mexp(mean.clamp(max=-torch.finfo(mean.dtype).eps))

    def loss(self, batch: Pairs) -> Tensor:
        log_odds_ratio = self.reward(batch.chosen) - self.reward(batch.rejected)
        return chosen_nll(batch, self.nll_normalise) - self.odds_weight * logsigmoid(log_odds_ratio)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        ratio = self.reward(batch.chosen) - self.reward(batch.rejected)
        # TRL's names: the first is the log sigma, the second the log odds ratio
        return {"log_odds_ratio": logsigmoid(ratio), "log_odds_chosen": ratio, "nll": -batch.chosen.token_logps}
