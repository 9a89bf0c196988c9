"""AOT, unpaired, against arithmetic, and how it differs from the paired one (TRL's old names swap them)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pairs_of, random_pairs, same_gradient, shifted, softplus
from tests.objectives.test_aot import two
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.aot import AOT
from trimtab.objectives.aot_unpaired import AOTUnpaired
from trimtab.objectives.dpo import DPO


def test_golden() -> None:
    """Log-ratios of the chosen 0.2, -0.6; of the rejected -0.5, 0.7. Sorted: -0.6 meets -0.5, 0.2 meets 0.7.
    beta 0.5: d = -0.25 and -0.05.  L = softplus(0.25) = 0.825939419878844, softplus(0.05) = 0.718459648013286
    by the chosen: -0.5 sigma(0.25) = -0.281088250442899, -0.5 sigma(0.05) = -0.256248698242105;
    by the rejected the opposite, crosswise: the first one meets the second chosen
    """
    batch, method = two(), AOTUnpaired(beta=0.5)
    assert method.loss(batch).tolist() == exactly([0.825939419878844, 0.718459648013286])
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.281088250442899, -0.256248698242105]) and rejected == exactly(
        [-x for x in chosen[::-1]]
    )


def test_ln_2_at_the_reference() -> None:
    batch = random_pairs(scale=0.0)
    assert close(AOTUnpaired().loss(batch), torch.full((7,), math.log(2), dtype=torch.float64))


def test_one_pair_is_dpo() -> None:
    batch = random_pairs(n=1)
    assert close(AOTUnpaired(beta=0.3).loss(batch), DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (AOTUnpaired(beta=0.3), DPO(beta=0.3)))
    assert same_gradient(a, b)


def test_the_sum_is_that_of_the_sorted_log_ratios() -> None:
    batch = random_pairs(n=20)
    chosen, rejected = (sorted(y.log_ratio.tolist()) for y in (batch.chosen, batch.rejected))
    wanted = sum(softplus(-0.3 * (w - l)) for w, l in zip(chosen, rejected, strict=True))  # noqa: E741
    assert AOTUnpaired(beta=0.3).loss(batch).sum().item() == exactly(wanted)


def test_who_was_paired_with_whom_does_not_matter() -> None:
    batch, order = random_pairs(), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    other = Pairs(batch.chosen, batch.rejected.take(order), batch.tie)
    assert close(AOTUnpaired().loss(batch), AOTUnpaired().loss(other))
    assert not close(AOT().loss(batch), AOT().loss(other), 1e-6)


def test_a_constant_per_prompt_on_both_references_matters() -> None:
    batch, by = random_pairs(), torch.linspace(-9, 9, 7, dtype=torch.float64)
    moved = Pairs(shifted(batch.chosen, by), shifted(batch.rejected, by), batch.tie)
    assert not close(AOTUnpaired().loss(moved), AOTUnpaired().loss(batch), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Chosen +-500, rejected -+500: sorted they are equal."""
    batch = pairs_of([1000.0, -1000.0], dtype=dtype)
    assert AOTUnpaired(beta=1.0).loss(batch).tolist() == pytest.approx([math.log(2)] * 2)
    assert gradient(AOTUnpaired(beta=1.0), batch, batch.chosen, batch.rejected) == [[-0.5, -0.5], [0.5, 0.5]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^aot_unpaired: beta is 0\.0; expected a number above 0\.$"):
        AOTUnpaired(beta=0.0)
