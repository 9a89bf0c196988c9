"""EXO on pairs against arithmetic, at its optimum, and where its gradient vanishes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, shifted
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.exo import EXO


def test_golden() -> None:
    """The pair of test_dpo, beta 0.5: z = r_w - r_l = 0.35, eps = 0.1.
    q_w = sigma(0.35) = 0.58661757891733
    L = q_w (log q_w - log 0.9) + (1 - q_w) (log(1 - q_w) - log 0.1) = 0.335588528301707
    dL/dz = q_w (1 - q_w) (0.35 - log 9) = -0.447947148025572; times 0.5: +0.223973574012786
    """
    batch, method = pair(), EXO(beta=0.5, label_smoothing=0.1)
    assert method.loss(batch).item() == exactly(0.335588528301707)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.223973574012786] * 2) and rejected == exactly([0.223973574012786] * 3)


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_at_the_reference(eps: float) -> None:
    """Spec 0.1: -1/2 ln(1 - eps) - 1/2 ln eps - ln 2; 2.76123 for 1e-3. The authors' code would not see eps."""
    loss = EXO(label_smoothing=eps).loss(pairs_of([0.0])).item()
    assert loss == exactly(-0.5 * math.log(1 - eps) - 0.5 * math.log(eps) - math.log(2))
    assert eps != 1e-3 or loss == pytest.approx(2.76123, abs=1e-5)


def test_the_optimum_is_0_and_flat() -> None:
    batch = pairs_of([math.log(0.999 / 0.001)])
    assert abs(EXO(beta=1.0).loss(batch).item()) < 1e-12
    assert abs(gradient(EXO(beta=1.0), batch, batch.chosen)[0][0]) < 1e-12


def test_a_very_wrong_pair_has_no_gradient_left() -> None:
    """sigma(z) sigma(-z) (z - logit(1 - eps)) at z = -20, where DPO's is -1."""
    batch = pairs_of([-20.0])
    assert -1e-7 < gradient(EXO(beta=1.0), batch, batch.chosen)[0][0] < 0


def test_a_constant_per_prompt_on_both_references_changes_nothing() -> None:
    batch, by = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64)
    assert close(
        EXO().loss(Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)), EXO().loss(batch)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = pairs_of([1000.0, -1000.0], dtype=dtype)
    assert EXO(beta=1.0).loss(batch).tolist() == pytest.approx([-math.log(0.999), -math.log(0.001)], rel=1e-4)
    assert gradient(EXO(beta=1.0), batch, batch.chosen, batch.rejected) == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_out_of_range(eps: float) -> None:
    """TRL 0.24 turns 0 into 1e-3 without a word."""
    with pytest.raises(
        ConfigError, match=rf"^exo: label_smoothing is {eps}; expected a number above 0 and below 0\.5\.$"
    ):
        EXO(label_smoothing=eps)
