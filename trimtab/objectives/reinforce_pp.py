"""REINFORCE++: PPO's clip and token rewards, with the whole round's mean in place of a critic."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.credit.clip import clipped_gain, moved
from trimtab.credit.controller import Named
from trimtab.credit.gae import at_end, reward_to_go
from trimtab.credit.group import centred
from trimtab.credit.whiten import whiten
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class ReinforcePP(Objective):
    """What came after a token is compared with what came after all tokens of the round, not of the same prompt.

    r_t = score at the last token - beta log(pi_old(y_t|.) / pi_ref(y_t|.));  baseline group: score less its prompt's mean
    G_t = r_t + gamma G_{t+1},   A_t = (G_t - mean G) / std G over all tokens of the round
    L   = -mean_t min(ratio_t A_t, clip(ratio_t) A_t),   ratio_t = pi(y_t|.) / pi_old(y_t|.)
    """

    beta: float = option(0.01, "weight of the KL to the reference, in the reward", source="OpenRLHF", at_least=0)
    clip: float = option(0.2, "ratio in [1 - c, 1 + c]", source="OpenRLHF", above=0)
    gamma: float = option(1.0, "discount", source="OpenRLHF", above=0, at_most=1)
    baseline: str = option(
        "none", "group: REINFORCE++-baseline, for several answers a prompt", source="paper", choices=("none", "group")
    )
    feedback, needs, level = Rollouts, frozenset({"reference"}), "token"
    paper = "arXiv:2501.03262"
    use = "One answer to each of many prompts, a reward model, no room for a critic."
    avoid = "Prompts differ much in how well they can be answered: take baseline: group, or RLOO. Rounds are small."
    differs = (
        "Means over the round's tokens as in the authors' OpenRLHF; verl divides by N - 1 in the deviation. With baseline: "
        "group the authors' runs move the KL (k2) into the loss; here it stays in the reward."
    )

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio if self.beta else y.logp

    def credit(self, batch: Rollouts, memory: Named) -> tuple[Named, Named]:
        y, score = batch.y.detach(), centred(batch.score, batch.prompt) if self.baseline == "group" else batch.score
        reward = at_end(y, score) - self.beta * y.token_log_ratios
        return {"advantage": whiten(reward_to_go(y, reward, self.gamma))}, memory

    def loss(self, batch: Rollouts) -> Tensor:
        return -batch.per_prompt(batch.y.sum(clipped_gain(batch, self.clip)))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(batch.y.length)

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return moved(batch, self.clip)
