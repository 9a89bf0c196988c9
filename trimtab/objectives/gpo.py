"""GPO: DPO with any convex function of the margin."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from trimtab.logprobs.scored import Pairs
from trimtab.objectives.base import option
from trimtab.objectives.dpo import DPO

CUT = 30.0  # the square of e^30 still fits float32, and so does a gradient's norm


def exp_then_line(x: Tensor, exp: Callable[[Tensor], Tensor] = torch.exp) -> Tensor:
    """e^x (or expm1) up to ``CUT``, its tangent beyond: finite, and the gradient does not vanish."""
    return exp(x.clamp(max=CUT)) + math.exp(CUT) * relu(x - CUT)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: -logsigmoid(z),
    "hinge": lambda z: relu(1 - z),
    "squared": lambda z: (z - 1) ** 2,
    "exponential": lambda z: exp_then_line(-z),
    "truncated_quadratic": lambda z: relu(1 - z) ** 2,
    "savage": lambda z: torch.sigmoid(-z) ** 2,
}


@dataclass(frozen=True)
class GPO(DPO):
    """One family for DPO, IPO and SLiC's hinge: a function f that falls at 0, of the implicit reward's margin.

    L = f(z),   z = beta log u(y_w)/u(y_l),   u(y) = pi(y|x)/pi_ref(y|x)                     (table 1)
    f = log(1 + e^-z) | max(0, 1 - z) | (z - 1)^2 | e^-z | max(0, 1 - z)^2 | 1/(1 + e^z)^2
    """

    function: str = option("logistic", "f", source="the first of table 1 (DPO)", choices=tuple(FUNCTIONS))
    paper = "arXiv:2402.05749"
    use = "You want to compare losses on one margin, or to choose how soon a won pair stops pulling."
    avoid = "You will not tune beta anew: how strongly the functions regularise at the same beta differs."
    differs = "No official code. exponential goes on as its tangent for z below -30; metrics count how often."

    def loss(self, batch: Pairs) -> Tensor:
        return FUNCTIONS[self.function](self.reward(batch.chosen) - self.reward(batch.rejected))

    def metrics(self, batch: Pairs) -> dict[str, Tensor]:
        z = self.reward(batch.chosen) - self.reward(batch.rejected)
        return {"exponent_cut": (-z > CUT).to(z.dtype)} if self.function == "exponential" else {}
