"""PPO: reinforcement learning from human feedback, with a critic."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.credit.clip import clipped_error, clipped_gain, moved
from trimtab.credit.controller import KL_COEF, Named, refuse_idle, steered
from trimtab.credit.gae import at_end, forecast, gae
from trimtab.credit.whiten import rescaled, whiten
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class PPO(Objective):
    """Every token is an action; its advantage is what came of it beyond what the critic had expected. ratio = pi/pi_old.

    r_t = score at the end - beta log(pi_old/pi_ref),   A = whitened GAE(gamma, lambda) of r and V_old,   R = bare A + V_old
    L   = mean_t -min(ratio A, clip(ratio) A) + c_v/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2)
    """

    beta: float = option(0.05, "weight of the KL to the reference, in the reward", source="TRL", at_least=0)
    target_kl: float = option(0.0, "nats an answer that beta steers to; 0: fixed", source="TRL; OpenAI: 6", at_least=0)
    horizon: int = option(10_000, "answers over which beta adapts", source="OpenAI, OpenRLHF", above=0)
    clip: float = option(0.2, "ratio in [1 - c, 1 + c]", source="OpenAI, TRL", above=0)
    value_clip: float = option(0.2, "V in [V_old - c, V_old + c]", source="OpenAI, TRL", above=0)
    value_weight: float = option(0.1, "c_v", source="OpenAI, TRL", at_least=0)
    gamma: float = option(1.0, "discount", source="OpenAI, TRL", above=0, at_most=1)
    gae_lambda: float = option(0.95, "lambda of GAE", source="OpenAI, TRL", at_least=0, at_most=1)
    whiten_rewards: bool = option(False, "divide r by its deviation", source="TRL; OpenAI: true")
    feedback, needs, critic, level = Rollouts, frozenset({"reference", "value"}), "network", "token"
    paper = "arXiv:2203.02155"
    use = "You can sample much, learn from each answer several times, and want credit by token."
    avoid = "Memory is short: the critic is a second network that learns. RLOO needs none."
    differs = "A is whitened over the round as in TRL, not by minibatch. TRL puts the score one place after the end."

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_idle(self.name(), self.beta, self.target_kl, self.horizon != PPO.horizon)

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio if self.beta else y.logp

    def credit(self, batch: Rollouts, memory: Named) -> tuple[Named, Named]:
        y, beta = batch.y.detach(), memory.get(KL_COEF, batch.score.new_tensor(self.beta)).to(batch.score)
        value, r = y.extra("value"), at_end(y, batch.score) - beta * y.token_log_ratios
        advantage, returns = gae(y, rescaled(r) if self.whiten_rewards else r, value, self.gamma, self.gae_lambda)
        columns = {"advantage": whiten(advantage), "returns": returns, "value": value, KL_COEF: beta.expand_as(value)}
        return columns, steered(memory, beta, y.log_ratio, self.target_kl, self.horizon)

    def loss(self, batch: Rollouts) -> Tensor:
        error = self.value_weight / 2 * clipped_error(batch, self.value_clip)
        return batch.per_prompt(batch.y.sum(error - clipped_gain(batch, self.clip)))

    def size(self, batch: Rollouts) -> Tensor:
        return batch.per_prompt(batch.y.length)

    def metrics(self, batch: Rollouts) -> dict[str, Tensor]:
        return {**moved(batch, self.clip), **forecast(batch), "objective/kl_coef": batch.column(KL_COEF)}
