"""AOT, paired, against arithmetic, against DPO, and against a plain sort."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import (
    close,
    completions,
    exactly,
    gradient,
    pairs_of,
    random_pairs,
    same_gradient,
    shifted,
    softplus,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.aot import AOT
from trimtab.objectives.cdpo import CDPO
from trimtab.objectives.dpo import DPO


def two() -> Pairs:
    chosen = completions([[-1.0], [-2.0]], [[-1.2], [-1.4]])
    return Pairs(chosen, completions([[-2.0], [-1.5]], [[-1.5], [-2.2]]), torch.tensor([False, False]))


def test_golden() -> None:
    """Margins of the policy 1.0, -0.5; of the reference 0.3, 0.8. Sorted: -0.5 meets 0.3, 1.0 meets 0.8.
    beta 0.5: d = 0.5 (1.0 - 0.8) = 0.1 and 0.5 (-0.5 - 0.3) = -0.4 (DPO: 0.35 and -0.65)
    L = softplus(-0.1) = 0.644396660073571, softplus(0.4) = 0.913015252399953
    by the chosen: -0.5 sigma(-0.1) = -0.23751040626053, -0.5 sigma(0.4) = -0.299343830056226; by the rejected the opposite
    """
    batch, method = two(), AOT(beta=0.5)
    assert method.loss(batch).tolist() == exactly([0.644396660073571, 0.913015252399953])
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.23751040626053, -0.299343830056226]) and rejected == exactly([-x for x in chosen])


def test_ln_2_at_the_reference() -> None:
    batch = random_pairs(scale=0.0)
    assert close(AOT(label_smoothing=0.2).loss(batch), torch.full((7,), math.log(2), dtype=torch.float64))


def test_one_pair_is_dpo_and_with_smoothing_cdpo() -> None:
    batch = random_pairs(n=1)
    for aot, other in ((AOT(beta=0.3), DPO(beta=0.3)), (AOT(0.3, 0.1), CDPO(0.3, 0.1))):
        assert close(aot.loss(batch), other.loss(batch))
        assert same_gradient(*(gradient(o, batch, batch.chosen, batch.rejected) for o in (aot, other)))


def test_the_sum_is_that_of_the_sorted_margins() -> None:
    """TRL's aot: -log sigma(beta (sort - sort)), in the order of the sort."""
    batch = random_pairs(n=20)
    policy = sorted((batch.chosen.logp - batch.rejected.logp).tolist())
    reference = sorted((batch.chosen.ref_logp - batch.rejected.ref_logp).tolist())
    wanted = sum(softplus(-0.3 * (p - r)) for p, r in zip(policy, reference, strict=True))
    assert AOT(beta=0.3).loss(batch).sum().item() == exactly(wanted)


def test_a_constant_per_prompt_on_both_references_changes_nothing() -> None:
    batch, by = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert close(AOT().loss(moved), AOT().loss(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = pairs_of([1000.0, -1000.0], dtype=dtype)
    assert AOT(beta=1.0).loss(batch).tolist() == [0.0, 1000.0]
    assert gradient(AOT(beta=1.0), batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match=r"^aot: label_smoothing is 0\.5; expected a number at least 0 and below 0\.5\.$"
    ):
        AOT(label_smoothing=0.5)
