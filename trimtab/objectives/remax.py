"""ReMax: REINFORCE with the score of the greedy answer as baseline."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.credit.clip import clipped_gain, moved
from trimtab.credit.controller import Named
from trimtab.credit.gae import at_end, reward_to_go
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class ReMax(Objective):
    """An answer is worth what it scores above the answer that the policy gives when nothing is left to chance.

    gap = score(y) - score(greedy),   k_t = log(pi_old(y_t|.) / pi_ref(y_t|.)),   ratio_t = pi(y_t|.) / pi_old(y_t|.)
    A_t = gamma^(T-t) gap - beta sum_{s >= t} gamma^(s-t) k_s;   kl own: - beta k_t alone
    L   = -mean_t min(ratio_t A_t, clip(ratio_t) A_t)
    """

    beta: float = option(0.05, "weight of the KL to the reference", source="authors' script", at_least=0)
    kl: str = option("to_go", "tokens whose KL a token answers for", source="verl", choices=("to_go", "own"))
    score_clip: float = option(0.0, "gap in [-c, c]; 0: as it is", source="verl; authors' code: 5", at_least=0)
    gamma: float = option(1.0, "discount", source="verl; authors' script: 0.99", above=0, at_most=1)
    clip: float = option(0.2, "ratio in [1 - c, 1 + c]; only answers used again are touched", source="verl", above=0)
    feedback, needs, level = Rollouts, frozenset({"reference", "greedy"}), "token"
    paper = "arXiv:2310.10505"
    use = "One answer per prompt, and no room for a critic."
    avoid = "Several answers per prompt are sampled anyway: their mean costs no further one (RLOO)."
    differs = (
        "The authors' code: kl own, score_clip 5, top-p 0.9, one step of -A log pi per answer, and the last token discounted "
        "too. A token changes the KL of later ones as well, so the default is to_go, as in verl."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio if self.beta else y.logp

    def credit(self, batch: Rollouts, memory: Named) -> tuple[Named, Named]:
        y, gap = batch.y.detach(), batch.score - batch.baseline
        gap = gap.clamp(-self.score_clip, self.score_clip) if self.score_clip else gap
        won, paid = at_end(y, gap), self.beta * y.token_log_ratios
        if self.kl == "own":
            return {"advantage": reward_to_go(y, won, self.gamma) - paid}, memory
        return {"advantage": reward_to_go(y, won - paid, self.gamma)}, memory

    def loss(self, batch: Rollouts) -> Tensor:
        return -batch.per_prompt(batch.y.sum(clipped_gain(batch, self.clip)))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(batch.y.length)

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return moved(batch, self.clip)
