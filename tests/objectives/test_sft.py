"""SFT against arithmetic: one sum, three denominators."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.by_hand import demonstrations, exactly, gradient
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Demonstrations
from trimtab.objectives.sft import SFT

ROWS = [[-0.5, -1.0, -0.3], [-2.0]]


def mean(objective: SFT, batch: Demonstrations) -> torch.Tensor:
    """What the engine makes of it: summed losses over summed sizes."""
    return objective.loss(batch).sum() / objective.size(batch).sum()


@pytest.mark.parametrize(
    ("normalise", "loss", "slopes"),
    [
        ("token", 0.95, [-0.25, -0.25, -0.25, -0.25]),
        ("sequence_sum", 1.9, [-0.5, -0.5, -0.5, -0.5]),
        ("sequence_mean", 1.3, [-1 / 6, -1 / 6, -1 / 6, -0.5]),
    ],
)
def test_golden(normalise: str, loss: float, slopes: list[float]) -> None:
    """log-probs -0.5 - 1.0 - 0.3 = -1.8 over 3 tokens, and -2.0 over 1 token.
    token:          (1.8 + 2.0) / 4     = 0.95   every token -1/4
    sequence_sum:   (1.8 + 2.0) / 2     = 1.9    every token -1/2
    sequence_mean:  (1.8 / 3 + 2.0) / 2 = 1.3    -1/6 by each of the three, -1/2 by the one
    """
    batch, objective = demonstrations(ROWS), SFT(normalise=normalise)
    value = mean(objective, batch)
    (slope,) = torch.autograd.grad(value, batch.y._token_logps)
    assert value.item() == exactly(loss) and slope.tolist() == exactly(slopes)


def test_equal_lengths_tell_only_the_sum_apart() -> None:
    batch = demonstrations([[-0.5, -1.0], [-2.0, -0.1]])
    by_token, by_sum, by_mean = (
        mean(SFT(normalise=n), batch).item() for n in ("token", "sequence_sum", "sequence_mean")
    )
    assert by_token == exactly(by_mean) and by_sum == exactly(2 * by_token)


def test_a_certain_token_still_counts() -> None:
    """log p = 0 is a token like any other (a toolkit divides by the number of non-zero log-probs)."""
    assert mean(SFT(), demonstrations([[0.0, -1.0]])).item() == exactly(0.5)


def test_extreme_log_probs_and_gradient() -> None:
    batch = demonstrations([[-1000.0, -1e-30]])
    assert SFT().loss(batch).item() == exactly(1000.0) and gradient(SFT(), batch, batch.y) == [[-1.0, -1.0]]
    assert SFT().metrics(batch)["nll"].tolist() == exactly([1000.0, 1e-30])


def test_unknown_normalisation() -> None:
    message = r'^sft: normalise is "mean"; expected one of token, sequence_sum, sequence_mean\.$'
    with pytest.raises(ConfigError, match=message):
        SFT(normalise="mean")
