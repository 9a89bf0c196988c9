"""DPO + NLL against arithmetic, and its two means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of, random_pairs
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.dpo_nll import DPONLL


def test_golden() -> None:
    """The pair of test_dpo, beta 0.5: 0.533382155418777. The chosen's log-prob is -1.5 over 2 tokens; weight 0.8:
    L = 0.533382155418777 + 0.8 * 0.75;  by a chosen token -0.206691210541335 - 0.8/2, by a rejected one as DPO
    """
    batch, method = pair(), DPONLL(beta=0.5, nll_weight=0.8)
    assert method.loss(batch).item() == exactly(1.133382155418777)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.606691210541335] * 2) and rejected == exactly([0.206691210541335] * 3)
    assert method.metrics(batch)["nll"].tolist() == exactly([0.5, 1.0])


def two_lengths() -> Pairs:
    """Chosen of 1 and 3 tokens, all at the reference."""
    chosen, rejected = [[-2.0], [-0.5, -0.25, -0.75]], [[-1.0], [-1.0]]
    return Pairs(completions(chosen, chosen), completions(rejected, rejected), torch.zeros(2, dtype=torch.bool))


def test_golden_of_both_means() -> None:
    """NLL 2 over 1 token and 1.5 over 3.  Mean of sequence means: (2 + 0.5)/2 = 1.25; mean over tokens: 3.5/4 = 0.875.
    Gradient of the mean loss by the chosen tokens, beyond DPO's: -1/2 and -1/6 each; or -1/4 each.
    """
    batch = two_lengths()
    for normalise, mean, slopes in (("sequence_mean", 1.25, [1 / 2] + [1 / 6] * 3), ("token", 0.875, [1 / 4] * 4)):
        method = DPONLL(nll_normalise=normalise)
        extra = method.loss(batch) - DPO().loss(batch)
        assert (extra.sum() / 2).item() == exactly(mean)
        (found,) = torch.autograd.grad(extra.sum() / 2, batch.chosen._token_logps)
        assert found.tolist() == exactly([-s for s in slopes])


def test_the_token_mean_is_of_the_whole_batch() -> None:
    """Cut into rows, with the whole batch around them (NaN log-probs), the losses are those of the uncut batch."""
    batch, method = random_pairs(), DPONLL(nll_normalise="token")
    nan = [y.with_policy(torch.full_like(y._token_logps, torch.nan)) for y in (batch.chosen, batch.rejected)]
    around = Pairs(nan[0], nan[1], batch.tie)
    rows = [torch.tensor(r) for r in ([0, 1], [2], [3, 4, 5, 6])]
    cut = [method.loss(Pairs(batch.chosen.take(r), batch.rejected.take(r), batch.tie[r], around=around)) for r in rows]
    assert close(torch.cat(cut), method.loss(batch)) and close(
        method.loss(replace(batch, around=around)), torch.cat(cut)
    )


def test_at_the_reference() -> None:
    """ln 2 + the mean negative log-likelihood; the reference's log-prob is 0 there."""
    assert DPONLL().loss(pairs_of([0.0])).item() == exactly(math.log(2))
    assert DPONLL().loss(two_lengths()).tolist() == exactly([math.log(2) + 2.0, math.log(2) + 0.5])


@pytest.mark.parametrize("normalise", ["sequence_mean", "token"])
def test_no_weight_is_dpo(normalise: str) -> None:
    batch = random_pairs()
    assert close(DPONLL(nll_weight=1e-14, nll_normalise=normalise).loss(batch), DPO().loss(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """The chosen at +-500 nats: -log sigma(+-1000) -+ 500."""
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), DPONLL(beta=1.0)
    assert method.loss(batch).tolist() == [-500.0, 1500.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[-1.0, -2.0], [0.0, 1.0]]


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"^dpo_nll: nll_weight is 0\.0; expected a number above 0\.$"):
        DPONLL(nll_weight=0.0)
    with pytest.raises(
        ConfigError, match=r'^dpo_nll: nll_normalise is "batch"; expected one of sequence_mean, token\.$'
    ):
        DPONLL(nll_normalise="batch")
