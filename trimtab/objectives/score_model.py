"""A reward model that predicts the score of an answer."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Completions, Scores
from trimtab.objectives.base import Objective, option
from trimtab.objectives.dro import off_scale


@dataclass(frozen=True)
class ScoreModel(Objective):
    """Least squares, s(y) the model's number at the last token of an answer.

    L = (s(y) - (score - mean)/std)^2
    """

    score_mean: float = option(0.0, "subtracted from the scores", source="HelpSteer2: scores as they are")
    score_std: float = option(1.0, "divides the scores", source="HelpSteer2: scores as they are", above=0)
    feedback, needs = Scores, frozenset({"score"})
    paper = "arXiv:2406.08673"
    use = "Each answer was rated on its own, on a scale that means the same for every prompt."
    avoid = (
        "Raters or prompts use the scale differently: compare within a prompt (convert: comparison) with reward_model."
    )
    differs = (
        "HelpSteer2 predicts five attributes at once; here one number, on the scale that score_mean and score_std set."
    )

    def reward(self, y: Completions) -> Tensor:
        return y.score

    def error(self, batch: Scores) -> Tensor:
        return self.reward(batch.y) - (batch.score - self.score_mean) / self.score_std

    def loss(self, batch: Scores) -> Tensor:
        return self.error(batch) ** 2

    def advise(self, batch: Scores) -> tuple[str, list[str]]:
        return off_scale(batch, self.score_mean, self.score_std)

    def metrics(self, batch: Scores) -> dict[str, Tensor]:
        return {"error/absolute": self.error(batch).abs() * self.score_std}  # in the unit of the scores
