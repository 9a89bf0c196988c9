"""How far the policy has moved from the one that sampled, and the surrogate of PPO that stops paying for it."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Rollouts

FAR = 20.0  # nats: far outside every clip, and the square of its exponential is finite in float32


def ratio(log_ratio: Tensor) -> Tensor:
    """``pi/pi_old`` from its logarithm, of tokens or of answers; constant beyond e^20: no overflow, and no gradient there."""
    return log_ratio.clamp(max=FAR).exp()


def surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """``min(ratio A, clip(ratio, 1 - low, 1 + high) A)``, to be made large (PPO, arXiv:1707.06347 eq. 7)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def cut(ratio: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Where the surrogate has no gradient, under the names that TRL logs: below and A < 0, above and A > 0."""
    ratio = ratio.detach()
    below, above = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)
    return {"clip_ratio/low_mean": below.to(ratio), "clip_ratio/high_mean": above.to(ratio)}


def importance(y: Completions, gap: Tensor, cap: float, by_answer: bool) -> Tensor:
    """[N] ``min(pi_old/pi_sampler, cap)``: what each token's advantage is worth where another program sampled it.

    Truncated importance sampling. ``gap`` [N] is log pi_old - log pi_sampler of each token. A method whose ratio is the whole
    answer's (``by_answer``) takes one weight for all tokens of an answer: the exponential of its summed gaps.
    """
    return (y.sum(gap)[y.owner] if by_answer else gap).exp().clamp(max=cap)


# --- by token, under the names that lm-human-preferences and TRL log -------------------------------------------------------


def clipped_gain(batch: Rollouts, clip: float) -> Tensor:
    """[N] ``min(ratio A, clip(ratio, 1 - c, 1 + c) A)``, ratio = pi/pi_old of each token; reads the column ``advantage``."""
    return surrogate(ratio(batch.y.token_logps - batch.behaviour), batch.advantage, clip, clip)


def clipped_error(batch: Rollouts, clip: float) -> Tensor:
    """[N] ``max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)``: no gain from moving further than c.

    Reads the columns ``value`` (V_old, when the answer was sampled) and ``returns`` (R).
    """
    value, before, returns = batch.y.extra("value"), batch.column("value"), batch.column("returns")
    held = before + (value - before).clamp(-clip, clip)
    return torch.maximum((value - returns) ** 2, (held - returns) ** 2)


def moved(batch: Rollouts, clip: float) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled: half its squared log-ratio, and the share of tokens that are cut."""
    log_ratio = batch.y.detach().token_logps - batch.behaviour
    low, high = cut(ratio(log_ratio), batch.advantage, clip, clip).values()
    return {"policy/approxkl": log_ratio**2 / 2, "policy/clipfrac": low + high}
