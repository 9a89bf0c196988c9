"""InfoNCA: the scores of K answers as soft labels of a softmax over rewards."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives.base import Objective, option
from trimtab.objectives.plackett_luce import places


def worth(batch: Rankings, by: str) -> Tensor:
    """[B] the score of each completion (NaN: unknown), or (K - place)/(K - 1): 1 for the best of K, 0 for the last."""
    if by == "scores":
        return torch.full_like(batch.y.length, torch.nan) if batch.score is None else batch.score
    place, k = places(batch), torch.bincount(batch.prompt)[batch.prompt]
    return (k - place[~place.isnan()]) / (k - 1).clamp(min=1)


def unscored(batch: Rankings, by: str, method: str) -> str:
    """Why it cannot be learned from, where scores are wanted and some are unknown."""
    unknown = int(worth(batch, by).isnan().sum())
    said = f"{unknown} of {len(batch.y)} completions have no score; {method} needs one for each, or by: ranks"
    return said if unknown else ""


@dataclass(frozen=True)
class InfoNCA(Objective):
    """Cross-entropy between what answers are worth and what the policy implies; on pairs with sure labels it is DPO.

    p = softmax(s_1 / tau, .., s_K / tau),   r_k = beta log pi(y_k|x)/pi_ref(y_k|x)
    L = -sum_k p_k log softmax(r)_k
    """

    beta: float = option(0.01, "strength of the pull to the reference", source="authors' README", above=0)
    temperature: float = option(1e-4, "tau, in units of s", source="authors' code (temperature_alpha)", above=0)
    by: str = option("scores", "s: scores, or (K - place)/(K - 1)", source="paper", choices=("scores", "ranks"))
    feedback, needs = Rankings, frozenset({"reference"})
    paper = "arXiv:2402.05369"
    use = "Several scored answers to each prompt; a larger temperature lets scores say more than which is best."
    avoid = "The likelihood of the best answer must not fall: nca_list holds it up."
    differs = "The authors' code adds 0.01 to a prompt's first score to break ties; equal scores share the label here."

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def logs(self, batch: Rankings) -> tuple[Tensor, Tensor]:
        """[R, K] log softmax(r) and log p; a place without a completion is so low that its softmax is 0."""
        r, s = self.reward(batch.y), worth(batch, self.by) / self.temperature
        log_q, log_p = (batch.table(t, torch.finfo(t.dtype).min).log_softmax(1) for t in (r, s))
        return log_q, log_p

    def loss(self, batch: Rankings) -> Tensor:
        log_q, log_p = self.logs(batch)
        return -(log_p.exp() * log_q).sum(1)

    def advise(self, batch: Rankings) -> tuple[str, list[str]]:
        return unscored(batch, self.by, self.name()), []
