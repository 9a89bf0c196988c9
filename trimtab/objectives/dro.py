"""DRO-V: direct reward optimisation from single scored answers, with a value network."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions, Scores
from trimtab.objectives.base import Objective, option


def off_scale(batch: Scores, mean: float, std: float) -> tuple[str, list[str]]:
    """What to say about scores that shall have this mean and deviation."""
    m, s = batch.score.mean().item(), batch.score.std().item()
    if s == 0:
        return f"all {len(batch)} scores are {m:g}; there is nothing to learn from", []
    if abs(m - mean) < 0.1 * s and 0.8 < s / std < 1.25:
        return "", []
    return "", [f"scores have mean {m:.3g} and deviation {s:.3g}: set score_mean: {m:.3g}, score_std: {s:.3g}"]


@dataclass(frozen=True)
class DRO(Objective):
    """Least squares on what holds at the optimum, r - V = tau log pi/pi_ref, for the policy and for the value V(x).

    rho      = log pi(y|x)/pi_ref(y|x)
    L_policy = -sg(r - V(x)) log pi(y|x) + (tau/2) rho^2
    L_value  = (1/2) (V(x) - sg(r - tau rho))^2;   L = L_policy + L_value, each has its own network
    """

    tau: float = option(
        1.0, "strength of the pull to the reference", source="paper, section 5: 0.1 and 5 are worse", above=0
    )
    score_mean: float = option(0.0, "subtracted from the scores", source="paper: scores are brought to mean 0")
    score_std: float = option(1.0, "divides the scores", source="paper: and to variance 1", above=0)
    feedback, needs, critic = Scores, frozenset({"reference", "value"}), "network"
    paper = "arXiv:2405.19107"
    use = "Every answer has a score and there is one answer per prompt, so nothing can be compared."
    avoid = "Several scored answers per prompt: compare or rank them. Two networks are in memory, three with a copy."
    differs = "The policy's loss is divided by tau as in DRO-V; V sees the prompt only, as in the theory. AdamW, not Adafactor."

    def reward(self, y: Completions) -> Tensor:
        return self.tau * y.log_ratio

    def residual(self, batch: Scores) -> tuple[Tensor, Tensor]:
        """[R] scores on the method's scale, and V(x)."""
        score = (batch.score - self.score_mean) / self.score_std
        return score, batch.y.first(batch.y.extra("value"))

    def loss(self, batch: Scores) -> Tensor:
        (score, value), y = self.residual(batch), batch.y
        policy = self.tau / 2 * y.log_ratio**2 - (score - value.detach()) * y.logp
        return policy + 0.5 * (value - (score - self.reward(y.detach()))) ** 2

    def advise(self, batch: Scores) -> tuple[str, list[str]]:
        return off_scale(batch, self.score_mean, self.score_std)

    def metrics(self, batch: Scores) -> dict[str, Tensor]:
        score, value = self.residual(batch)
        return {"value": value, "residual": (score - value - self.reward(batch.y)) ** 2}
