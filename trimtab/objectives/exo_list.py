"""EXO on K scored answers."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.logprobs.scored import Rankings
from trimtab.objectives.base import option
from trimtab.objectives.exo import reverse_kl
from trimtab.objectives.info_nca import InfoNCA


@dataclass(frozen=True)
class EXOList(InfoNCA):
    """Reverse KL from the policy's distribution over K answers to the one that their scores imply.

    q = softmax(r_1, .., r_K),   r_k = beta log pi(y_k|x)/pi_ref(y_k|x),   p = softmax(s_1 / tau, .., s_K / tau)
    L = sum_k q_k (log q_k - log p_k)
    """

    beta: float = option(
        0.5, "beta_pi: strength of the pull to the reference", source="authors' scripts (TL;DR, HH)", above=0
    )
    temperature: float = option(
        0.5, "tau = beta_r: scale of the scores", source="authors' scripts (TL;DR, HH)", above=0
    )
    paper = "arXiv:2402.00856"
    use = "Answers of the reference, scored by a reward model, and the policy shall seek the mode of the reward."
    avoid = "The best answers start out unlikely: the gradient vanishes where q is near 0."
    differs = "The authors' code divides logits by a sampling temperature of 0.8 first."

    def loss(self, batch: Rankings) -> Tensor:
        return reverse_kl(*self.logs(batch))
