"""Length-normalised DPO against arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of, random_pairs, same_gradient
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.ln_dpo import LNDPO
from trimtab.objectives.simpo import SimPO


def test_golden() -> None:
    """Log-ratios 0.5 over 2 tokens and -0.2 over 3, beta 3:  m = 3 (0.25 + 0.0666...) = 0.95
    L = log(1 + e^-0.95) = 0.326956406850952; by a chosen token -3/2 sigma(-0.95), by a rejected one +3/3 sigma(-0.95)
    """
    batch, method = pair(), LNDPO(beta=3.0)
    assert method.loss(batch).item() == exactly(0.326956406850952)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.418327232965705] * 2) and rejected == exactly([0.278884821977137] * 3)


def test_ln_2_at_the_reference() -> None:
    assert LNDPO().loss(pairs_of([0.0])).item() == exactly(math.log(2))


def test_single_tokens_are_dpo() -> None:
    batch = pairs_of([-2.0, 0.1, 3.0])
    assert close(LNDPO(beta=0.3).loss(batch), DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (LNDPO(beta=0.3), DPO(beta=0.3)))
    assert same_gradient(a, b) and not close(LNDPO(beta=0.3).loss(random_pairs()), DPO(beta=0.3).loss(random_pairs()))


def test_with_a_reference_of_0_it_is_simpo_without_margin() -> None:
    w, l = [[-0.5, -1.0]], [[-2.0, -0.25, -0.75]]  # noqa: E741
    batch = Pairs(completions(w, [[0.0] * 2]), completions(l, [[0.0] * 3]), torch.tensor([False]))
    assert close(LNDPO(beta=2.0).loss(batch), SimPO(beta=2.0, gamma_beta_ratio=0.0).loss(batch))


def test_repeating_an_answer_changes_nothing() -> None:
    once = pair()
    thrice = Pairs(completions([[-0.5, -1.0] * 3], [[-0.7, -1.3] * 3]), once.rejected, once.tie)
    assert close(LNDPO().loss(once), LNDPO().loss(thrice)) and not close(DPO().loss(once), DPO().loss(thrice))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), LNDPO(beta=1.0)
    assert method.loss(batch).tolist() == [0.0, 1000.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^ln_dpo: beta is 0\.0; expected a number above 0\.$"):
        LNDPO(beta=0.0)
