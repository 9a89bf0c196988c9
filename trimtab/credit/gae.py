"""What came of every token and what a critic had expected of it; what PPO then makes of both.

``V_t`` [N] is the value before token t. An answer is over after its last token, whether it came to its end or was cut off
by the length limit: nothing is expected after it (the terminal bootstrap is 0, as in all public code).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.logprobs.scored import Completions, Rollouts


def at_end(y: Completions, score: Tensor) -> Tensor:
    """[B] -> [N]: each answer's score at its last token, 0 before. Summed over an answer it is the score again."""
    return torch.where(y.position == y.length[y.owner] - 1, score[y.owner], 0)


def reward_to_go(y: Completions, reward: Tensor, gamma: float) -> Tensor:
    """[N] -> [N]: ``G_t = r_t + gamma G_{t+1}``, 0 after the last token."""
    return y.discounted(reward, gamma)


def gae(y: Completions, reward: Tensor, value: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """([N] advantages, [N] returns) from token rewards and values (arXiv:1506.02438, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   R_t = A_t + V_t;  V and A are 0 after the end
    """
    delta = reward + gamma * y.following(value) - value
    advantage = y.discounted(delta, gamma * gae_lambda)
    return advantage, advantage + value


def forecast(batch: Rollouts) -> dict[str, Tensor]:
    """How good the critic is.

    ``val/error`` is (V - R)^2, ``val/var_explained`` 1 - error / variance of all returns of the batch: 1 for a perfect critic,
    0 for one that knows their mean, below 0 for a worse one. It is left out where the returns vary by rounding alone.
    """
    error, every = (batch.y.extra("value") - batch.column("returns")) ** 2, batch.whole.column("returns")
    spread = every.var(correction=0)
    varies = spread > 1e-12 * (1 + (every**2).mean())
    return {"val/error": error} | ({"val/var_explained": 1 - error / spread} if varies else {})
