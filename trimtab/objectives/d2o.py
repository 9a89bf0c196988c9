"""D2O: distributional dispreference optimization, one bad answer against samples of the model itself."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option


@dataclass(frozen=True)
class D2O(Objective):
    """The worst-ranked answer y_l must fall below the others, y_1 ... y_K, which the reference itself sampled.

    rho(y) = log pi(y|x)/pi_ref(y|x)
    L      = -log sigma((beta/K) sum_i rho(y_i) - alpha rho(y_l))
    """

    beta: float = option(0.1, "weight of the anchors, the model's own samples", source="paper", above=0)
    alpha: float = option(0.1, "weight of the bad answer", source="paper", above=0)
    feedback, needs, negatives_only = Rankings, frozenset({"reference"}), True
    paper = "arXiv:2403.03419"
    use = "Bad answers only: sample K others from the model (the paper: 11) and rank all of them above the bad one."
    avoid = "The others are known to be good: rank them, and use a method that learns from their order."
    differs = "The paper allows two references; both are the initial model here, as in its runs. No code was released."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def sides(self, batch: Rankings) -> tuple[Tensor, Tensor]:
        """[R] mean rho of the anchors, and of the bad answer (of all that share the last rank)."""
        rank, rho = batch.table(batch.rank, 0), batch.table(batch.y.log_ratio, 0)
        worst = rank == rank.amax(1, keepdim=True)
        anchor = (rank > 0) & ~worst
        anchors, bad = ((rho * rows).sum(1) / rows.sum(1).clamp(min=1) for rows in (anchor, worst))
        return anchors, bad

    def loss(self, batch: Rankings) -> Tensor:
        anchors, bad = self.sides(batch)
        return -logsigmoid(self.beta * anchors - self.alpha * bad)

    def advise(self, batch: Rankings) -> tuple[str, list[str]]:
        rank = batch.table(batch.rank, 0)
        level = int(((rank == 0) | (rank == rank[:, :1])).all(1).sum())
        said = (
            f"{level} of {len(batch)} rankings have one rank for all answers; d2o needs a worst one and others above it"
        )
        return said if level else "", []

    def metrics(self, batch: Rankings) -> dict[str, Tensor]:
        anchors, bad = self.sides(batch)
        margin = self.beta * anchors - self.alpha * bad
        return {"rewards/margins": margin, "rewards/accuracies": (margin > 0).to(margin.dtype), "log_ratio/bad": bad}
