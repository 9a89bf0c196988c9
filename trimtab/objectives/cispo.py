"""CISPO: REINFORCE on every token, with a capped weight for what was sampled by an older policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.credit.clip import cut, ratio
from trimtab.credit.group import standardised
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class CISPO(Objective):
    """The weight is clipped and not the update, so that no token ever loses its gradient.

    A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4),   ratio_t = pi(y_t|.) / pi_old(y_t|.)
    L   = -1/(sum_i |y_i|) sum_i sum_t sg(min(ratio_t, cap)) A_i log pi(y_t|.)           (equations 4 and 5)
    """

    cap: float = option(
        5.0, "largest weight of a token", source="ScaleRL (arXiv:2510.13786): 4, 5 or 8; the paper has none", at_least=1
    )
    deviation: Literal["sample", "population"] = option(
        "sample", "divides by K - 1 or by K", source="TRL 1.16", choices=("sample", "population")
    )
    feedback = Rollouts
    paper = "arXiv:2506.13585"
    use = "Answers are learned from in many steps, and rare tokens that turn an answer must not be clipped away."
    avoid = "Many passes over bad answers: nothing stops the push, the weight only falls with the token's probability."
    differs = (
        "TRL's epsilon_high is this cap; verl's is the cap less 1, and it has the lower bound that the paper turns off."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.logp

    def credit(
        self, batch: Rollouts, memory: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return {"advantage": standardised(batch.score, batch.prompt, self.deviation)[batch.y.owner]}, memory

    def moved(self, batch: Rollouts) -> Tensor:
        """[N] how many times as likely each token has become since it was sampled, without a gradient."""
        return ratio(batch.y.detach().token_logps - batch.behaviour)

    def loss(self, batch: Rollouts) -> Tensor:
        weight = self.moved(batch).clamp(max=self.cap)
        return -batch.per_prompt(batch.y.sum(weight * batch.advantage * batch.y.token_logps))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(batch.y.length)

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return {
            "clip_ratio/high_mean": cut(self.moved(batch), batch.advantage, 1.0, self.cap - 1)["clip_ratio/high_mean"]
        }
