"""CPO against arithmetic, DPO and SFT, and over what its likelihood is averaged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import (
    close,
    completions,
    demonstrations,
    exactly,
    gradient,
    pair,
    pairs_of,
    same_gradient,
)
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, Pairs
from trimtab.objectives.cpo import CPO, chosen_nll
from trimtab.objectives.dpo import DPO
from trimtab.objectives.orpo import ORPO
from trimtab.objectives.sft import SFT

# log-probs of the chosen: -1.5 in two tokens, -3 in one
CHOSEN = [[-0.5, -1.0], [-3.0]]


def two() -> Pairs:
    return Pairs(completions(CHOSEN), completions([[-2.0, -1.0], [-1.0]]), torch.tensor([False, False]))


def test_golden() -> None:
    """log-probs: chosen -1.5, rejected -3. beta 0.2: m = 0.3.  NLL per token 0.75, weight 0.5.
    L = softplus(-0.3) + 0.375 = 0.929355244468527
    by a chosen token: -0.2 sigma(-0.3) - 0.5/2 = -0.335111496637668; by a rejected one: 0.2 sigma(-0.3) = 0.0851114966376682
    """
    batch, method = pair(refs=False), CPO(beta=0.2, nll_weight=0.5)
    assert method.loss(batch).item() == exactly(0.929355244468527)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.335111496637668] * 2) and rejected == exactly([0.0851114966376682] * 3)


@pytest.mark.parametrize(
    ("nll", "rows"), [("token", [1.0, 2.0]), ("sequence_sum", [1.5, 3.0]), ("sequence_mean", [0.75, 3.0])]
)
def test_the_likelihood_over_the_whole_batch(nll: str, rows: list[float]) -> None:
    """Token mean: 4.5 / 3 tokens = 1.5, shared out as 2 * 1.5 / 3 and 2 * 3 / 3. A part of the batch counts the same."""
    batch, demos, sft = two(), demonstrations(CHOSEN), SFT(nll)
    assert chosen_nll(batch, nll).tolist() == exactly(rows)
    assert close(chosen_nll(batch, nll).mean(), sft.loss(demos).sum() / sft.size(demos).sum())
    # as the engine gives a part: the whole batch's log-probs are NaN
    blind = replace(batch, chosen=Completions(torch.full((3,), torch.nan), batch.chosen._length))
    second = torch.tensor([1])
    part = Pairs(batch.chosen.take(second), batch.rejected.take(second), batch.tie[1:], around=blind)
    for method in (CPO(nll_normalise=nll), ORPO(nll_normalise=nll)):
        assert close(method.loss(part), method.loss(batch)[1:])


def test_the_preference_is_dpo_with_a_reference_of_0() -> None:
    h = [-3.0, 0.0, 0.4, 5.0]
    batch, cpo = pairs_of(h), CPO(beta=0.3, nll_normalise="sequence_sum")
    preference = cpo.loss(batch) - chosen_nll(batch, "sequence_sum")
    assert close(preference, DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.rejected) for o in (cpo, DPO(beta=0.3)))
    assert same_gradient(a, b)


def test_equal_likelihoods_cost_ln_2_and_the_likelihood() -> None:
    batch = Pairs(completions([[-1.0, -3.0]]), completions([[-4.0]]), torch.tensor([False]))
    assert CPO().loss(batch).item() == exactly(math.log(2) + 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_1000_apart(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), CPO(beta=1.0)
    assert method.loss(batch).tolist() == [-500.0, 1500.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[-1.0, -2.0], [0.0, 1.0]]


def test_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match=r'^cpo: nll_normalise is "mean"; expected one of token, sequence_sum, sequence_mean\.$'
    ):
        CPO(nll_normalise="mean")
    with pytest.raises(ConfigError, match=r"^cpo: nll_weight is 0\.0; expected a number above 0\.$"):
        CPO(nll_weight=0.0)
