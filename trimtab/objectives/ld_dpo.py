"""LD-DPO: length-desensitised DPO."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO


@dataclass(frozen=True)
class LDDPO(DPO):
    """DPO in which tokens beyond the shorter answer's length count only by alpha.

    w_t = 1 for t <= min(|y_w|, |y_l|), alpha beyond
    s(y) = sum_t w_t log pi(y_t|x, y_<t)/pi_ref(y_t|x, y_<t)
    L    = -log sigma(beta s(y_w) - beta s(y_l))
    """

    alpha: float = option(0.5, "weight of the longer answer's tail; 1 is DPO", source="paper: 0.5 to start", at_least=0)
    weigh: str = option(
        "both",
        "whose tail counts less: policy and reference, or the policy's alone",
        source="TRL from 0.29: both; earlier TRL and LLaMA-Factory: policy",
        choices=("both", "policy"),
    )
    length_control = True
    paper = "arXiv:2409.06411"
    use = "Answers of one pair differ much in length, and the model must not learn length from that."
    avoid = "What makes an answer good stands at its end, such as a result after a derivation."
    differs = "With weigh: policy the margin is not 0 at the reference. Rewards are logged over all tokens, as DPO's."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:
            raise ConfigError(f"ld_dpo: alpha is {self.alpha}; expected a number at least 0 and at most 1.")
        if self.alpha == 1 and self.weigh != "both":
            raise ConfigError("ld_dpo: weigh has no effect with alpha: 1, where no tail counts less. Remove it.")

    def score(self, y: Completions, shared: Tensor) -> Tensor:
        """[R] the log-ratio, tokens beyond ``shared`` [R] weighted by alpha."""
        tokens = y.token_log_ratios if self.weigh == "both" else y.token_logps
        weighted = torch.where(y.position < shared[y.owner], tokens, self.alpha * tokens)
        return y.sum(weighted) if self.weigh == "both" else y.sum(weighted - y.ref_token_logps)

    def loss(self, batch: Pairs) -> Tensor:
        shared = torch.minimum(batch.chosen.length, batch.rejected.length)
        return -logsigmoid(self.beta * (self.score(batch.chosen, shared) - self.score(batch.rejected, shared)))
