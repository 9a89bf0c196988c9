"""A KL coefficient that steers to a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trimtab.errors import ConfigError

Named = Mapping[str, Tensor]
KL_COEF = "kl_coef"  # its name in an objective's memory, and of the column that says what a round used
LARGEST = 0.2  # the relative error above which the coefficient moves no faster


def adapted(coefficient: Tensor, log_ratio: Tensor, target: float, horizon: int) -> Tensor:
    """[] the coefficient after a round of n answers: ``coefficient (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)``.

    Args:
        coefficient: [] of the round.
        log_ratio: [n] log pi(y|x) - log pi_ref(y|x), each summed over its answer's tokens; their mean is KL, and may be negative.
        target: nats per answer, not per token.
        horizon: answers in which the largest error changes the coefficient by a fifth.

    Raises:
        ConfigError: a round is so large against the horizon that the coefficient could become 0 or negative.
    """
    n = len(log_ratio)
    if LARGEST * n >= horizon:
        raise ConfigError(
            f"horizon is {horizon} and a round has {n} answers: one round could bring the KL coefficient to 0. Set horizon "
            f"above {LARGEST * n:g}."
        )
    error = (log_ratio.mean() / target - 1).clamp(-LARGEST, LARGEST)
    return coefficient * (1 + error * n / horizon)


def steered(memory: Named, coefficient: Tensor, log_ratio: Tensor, target: float, horizon: int) -> Named:
    """An objective's memory after a round: with the adapted coefficient, or as it was where ``target`` is 0 (fixed)."""
    return {**memory, KL_COEF: adapted(coefficient, log_ratio, target, horizon)} if target else memory


def refuse_idle(method: str, coefficient: float, target: float, horizon_given: bool) -> None:
    """Refuse options of a controller that could do nothing.

    Raises:
        ConfigError: a horizon without a target, or a coefficient of 0, which no factor changes.
    """
    if horizon_given and not target:
        raise ConfigError(f"{method}: horizon has no effect with target_kl: 0, where beta is fixed. Remove it.")
    if target and not coefficient:
        raise ConfigError(f"{method}: target_kl has no effect with beta: 0, which no factor changes. Set beta above 0.")
