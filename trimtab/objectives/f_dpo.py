"""f-DPO: DPO under another divergence from the reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO
from trimtab.objectives.gpo import CUT, exp_then_line

# f'(u) from log u and alpha, with the constant that makes it 0 at the reference (it cancels in the margin)
SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda log_u, alpha: log_u,
    "forward_kl": lambda log_u, alpha: -exp_then_line(-log_u, torch.expm1),
    "jensen_shannon": lambda log_u, alpha: logsigmoid(log_u) + math.log(2),
    "alpha": lambda log_u, alpha: -exp_then_line(-alpha * log_u, torch.expm1) / alpha,
}


@dataclass(frozen=True)
class FDPO(DPO):
    """The implicit reward under an f-divergence: from mode-seeking (reverse KL) to mass-covering (forward KL).

    L     = -log sigma(beta f'(u(y_w)) - beta f'(u(y_l))),   u(y) = pi(y|x)/pi_ref(y|x)
    f'(u) = log u | -1/u | log 2u/(1 + u) | (1 - u^-alpha)/alpha
    """

    f_divergence: str = option("alpha", "divergence", source="ours: reverse_kl is plain DPO", choices=tuple(SCORES))
    alpha: float = option(0.5, "0: reverse KL, 1: forward KL", source="authors' scripts: 0.3, 0.5, 0.7", above=0)
    divergence = "reverse KL, forward KL, Jensen-Shannon or alpha"
    paper = "arXiv:2309.16240"
    use = "Answers must stay diverse: the nearer to forward KL, the more of the reference's answers are kept."
    avoid = "Chosen answers fall far below the reference: their exponential score then rules the batch."
    differs = (
        "TRL from 0.29 has alpha_TRL = 1 - alpha. The authors' exp is unbounded; here a tangent past e^30, counted."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f_divergence != "alpha" and self.alpha != 0.5:
            raise ConfigError(f"f_dpo: alpha has no effect with f_divergence: {self.f_divergence}. Remove it.")
        if self.alpha > 1:
            raise ConfigError(f"f_dpo: alpha is {self.alpha}; expected a number above 0 and at most 1.")

    def reward(self, y: Completions) -> Tensor:
        return self.beta * SCORES[self.f_divergence](y.log_ratio, self.alpha)

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        rate = {"forward_kl": 1.0, "alpha": self.alpha}.get(self.f_divergence)
        log_u = torch.cat([batch.chosen.log_ratio, batch.rejected.log_ratio])
        return {} if rate is None else {"exponent_cut": (-rate * log_u > CUT).to(log_u.dtype)}
