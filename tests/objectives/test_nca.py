"""NCA on pairs against arithmetic, and its absolute targets."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, shifted
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.nca import NCA


def test_golden() -> None:
    """The pair of test_dpo, beta 0.5: r_w = 0.25, r_l = -0.1.
    L = softplus(-0.25) + softplus(0.25) / 2 + softplus(-0.1) / 2 = 1.31110745985505
    dL/dr_w = 1.5 sigma(0.25) - 1, dL/dr_l = sigma(-0.1) / 2; times 0.5: -0.0783676243356515, 0.118755203130265
    """
    batch, method = pair(), NCA(beta=0.5)
    assert method.loss(batch).item() == exactly(1.31110745985505)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.0783676243356515] * 2) and rejected == exactly([0.118755203130265] * 3)


def test_golden_biased() -> None:
    """L = softplus(-0.25) + softplus(-0.1) = 1.22033607995241 (TRL's bco_pair from 0.29).
    times 0.5: -sigma(-0.25) -> -0.218911749557101, sigma(-0.1) -> 0.23751040626053
    """
    batch, method = pair(), NCA(beta=0.5, noise="rejected")
    assert method.loss(batch).item() == exactly(1.22033607995241)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.218911749557101] * 2) and rejected == exactly([0.23751040626053] * 3)


@pytest.mark.parametrize("noise", ["both", "rejected"])
def test_at_the_reference(noise: str) -> None:
    assert NCA(noise=noise).loss(pairs_of([0.0])).item() == exactly(2 * math.log(2))


def test_the_chosen_reward_has_a_target() -> None:
    """1.5 sigma(r_w) = 1 at r_w = ln 2, wherever the rejected one is."""
    batch = pairs_of([2 * math.log(2), 2 * math.log(2) + 1])
    low, high = gradient(NCA(beta=1.0), batch, batch.chosen)[0]
    assert abs(low) < 1e-12 and high > 0


def test_a_constant_on_both_references_matters() -> None:
    batch, by = random_pairs(), torch.ones(7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert not close(NCA(beta=0.5).loss(moved), NCA(beta=0.5).loss(batch), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Rewards of +-500: 0 + 250 + 0, and 500 + 0 + 250."""
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), NCA(beta=1.0)
    assert method.loss(batch).tolist() == [250.0, 750.0]
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.5, -1.0]) and rejected == exactly([0.0, 0.5])


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r'^nca: noise is "chosen"; expected one of both, rejected\.$'):
        NCA(noise="chosen")
