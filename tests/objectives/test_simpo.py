"""SimPO against arithmetic and against DPO."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of, same_gradient
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.simpo import SimPO


def test_golden() -> None:
    """mean log-probs: chosen (-0.5 - 1.0) / 2 = -0.75, rejected (-2.0 - 0.25 - 0.75) / 3 = -1.
    beta 2, gamma = 2 * 0.4 = 0.8:  m = 2 * 0.25 - 0.8 = -0.3,  L = log(1 + e^0.3) = 0.854355244468527
    dL/dm = -sigma(0.3) = -0.574442516811659; by a chosen token times 2/2, by a rejected one times -2/3.
    """
    batch, method = pair(refs=False), SimPO(beta=2.0, gamma_beta_ratio=0.4)
    assert method.loss(batch).item() == exactly(0.854355244468527)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.574442516811659] * 2)
    assert rejected == exactly([0.574442516811659 * 2 / 3] * 3)


@pytest.mark.parametrize(("beta", "ratio"), [(2.0, 0.25), (10.0, 0.3)])
def test_equal_rewards_cost_the_margin(beta: float, ratio: float) -> None:
    """m = -gamma:  L = log(1 + e^gamma)."""
    batch = Pairs(completions([[-1.0, -3.0]]), completions([[-2.0]]), torch.tensor([False]))
    loss = SimPO(beta=beta, gamma_beta_ratio=ratio).loss(batch).item()
    assert loss == exactly(math.log1p(math.exp(beta * ratio)))


def test_no_margin_and_single_tokens_is_dpo_with_reference_0() -> None:
    w, l = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # noqa: E741
    one, zero = torch.ones(9, dtype=torch.long), torch.zeros(9, dtype=torch.float64)
    batch = Pairs(
        Completions(w.clone().requires_grad_(), one, zero),
        Completions(l.clone().requires_grad_(), one, zero),
        torch.zeros(9, dtype=torch.bool),
    )
    simpo, dpo = SimPO(beta=1.7, gamma_beta_ratio=0.0), DPO(beta=1.7)
    assert close(simpo.loss(batch), dpo.loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (simpo, dpo))
    assert same_gradient(a, b)


def test_repeating_an_answer_changes_nothing() -> None:
    """The mean over tokens does not see length."""
    once, thrice = pair(refs=False), pair(refs=False)
    thrice = Pairs(completions([[-0.5, -1.0] * 3]), thrice.rejected, thrice.tie)
    assert close(SimPO().loss(once), SimPO().loss(thrice))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_1000_apart(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), SimPO(beta=1.0, gamma_beta_ratio=1.0)
    assert method.loss(batch).tolist() == [0.0, 1001.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^simpo: beta is 0\.0; expected a number above 0\.$"):
        SimPO(beta=0.0)
    with pytest.raises(ConfigError, match=r"^simpo: gamma_beta_ratio is -0\.1; expected a number at least 0\.$"):
        SimPO(gamma_beta_ratio=-0.1)
