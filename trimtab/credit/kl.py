"""Estimators of the divergence from the reference, from the tokens that the policy sampled."""

from __future__ import annotations

from torch import Tensor

from trimtab.credit.clip import FAR
from trimtab.errors import ConfigError

ESTIMATORS = ("k1", "k2", "k3", "corrected")


def kl(log_ratio: Tensor, estimator: str, ratio: Tensor | None = None) -> Tensor:
    """[N] -> [N] an estimate in nats of KL(pi || pi_ref) at each token (Schulman, "Approximating KL divergence", 2020).

    What it is worth and what it does are two things. On tokens from the policy, with l = log pi - log pi_ref:

    ==========  ===============  =============  ========================  ======================================
    estimator   value            its mean       in the loss, it descends  in the reward, it descends
    ==========  ===============  =============  ========================  ======================================
    k1          l                KL(pi || ref)  nothing: mean gradient 0  KL(pi || ref)
    k2          l^2 / 2          another        KL(pi || ref)             E[k2] - KL(pi || ref)
    k3          e^-l - 1 + l     KL(pi || ref)  KL(ref || pi)             KL(pi || ref) - KL(ref || pi)
    corrected   pi/pi_old k3     KL(pi || ref)  KL(pi || ref)             as k3: in a reward its ratio is 1
    ==========  ===============  =============  ========================  ======================================

    So k1 belongs into rewards and the others into losses; k1 to k3 mean this on-policy only, ``corrected`` on tokens from any
    pi_old. Per token, a loss descends the divergence at the prefixes that were sampled, and not the choice of prefixes.

    Args:
        log_ratio: [N] log pi(y_t|x, y_<t) - log pi_ref(y_t|x, y_<t).
        estimator: one of :data:`ESTIMATORS`.
        ratio: [N] pi/pi_old with its gradient (:func:`trimtab.credit.clip.ratio`); only ``corrected`` reads it.

    e^-l is constant below l = -20: such a token has less than e^-20 of the reference's probability, so the policy does not
    sample it, and the estimate stays finite.

    Raises:
        ConfigError: there is no such estimator, or ``corrected`` has no ratio.
    """
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio**2 / 2
        case "k3":
            back = -log_ratio.clamp(min=-FAR)  # log(pi_ref / pi)
            return back.expm1() - back
        case "corrected":
            if ratio is None:
                raise ConfigError('kl: "corrected" was asked for without a ratio; pass pi/pi_old, or use k1, k2 or k3.')
            return ratio * kl(log_ratio, "k3")
        case _:
            raise ConfigError(f'kl: the estimator is "{estimator}"; expected one of {", ".join(ESTIMATORS)}.')
