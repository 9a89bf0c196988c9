"""f-DPO against arithmetic, in its limits, and where the exponential would overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of, random_pairs, same_gradient
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.f_dpo import FDPO

NAMES = ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


@pytest.mark.parametrize(
    ("name", "loss", "by_chosen", "by_rejected"),
    [
        ("forward_kl", 0.551197534207429, -0.128505861102923, 0.258779025721837),
        ("jensen_shannon", 0.615409878857270, -0.0867551942212765, 0.126346534740628),
        ("alpha", 0.543218118860139, -0.163207083364653, 0.231601875703333),
    ],
)
def test_golden(name: str, loss: float, by_chosen: float, by_rejected: float) -> None:
    """The pair of test_dpo, log u = 0.5 and -0.2, beta 0.5.
    forward KL  m = 0.5 (-e^-0.5 + e^0.2)                       = 0.307436049223768
    JS          m = 0.5 (log sigma(0.5) - log sigma(-0.2))      = 0.162030942600743
    alpha 0.5   m = 0.5 ((1 - e^-0.25) - (1 - e^0.1)) / 0.5     = 0.326370135004243
    L = log(1 + e^-m); by a token -+0.5 sigma(-m) times e^-log_u, sigma(-log_u) or e^(-0.5 log_u)
    """
    batch, method = pair(), FDPO(beta=0.5, f_divergence=name)
    assert method.loss(batch).item() == exactly(loss)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([by_chosen] * 2) and rejected == exactly([by_rejected] * 3)


@pytest.mark.parametrize("name", NAMES)
def test_at_the_reference(name: str) -> None:
    batch, method = pairs_of([0.0]), FDPO(beta=0.3, f_divergence=name)
    assert method.loss(batch).item() == exactly(math.log(2)) and method.reward(batch.chosen).item() == exactly(0.0)


def same(a: FDPO, b: DPO, tolerance: float = 1e-12) -> bool:
    batch = random_pairs()
    slopes = [gradient(o, batch, batch.chosen, batch.rejected) for o in (a, b)]
    return close(a.loss(batch), b.loss(batch), tolerance) and same_gradient(*slopes, tolerance)


def test_reverse_kl_is_dpo() -> None:
    assert same(FDPO(f_divergence="reverse_kl"), DPO())


def test_alpha_runs_from_reverse_to_forward_kl() -> None:
    """The paper's alpha; TRL from 0.29 on counts from the other end."""
    assert same(FDPO(alpha=1.0), FDPO(f_divergence="forward_kl"))
    assert same(FDPO(alpha=1e-10), DPO(), 1e-8)  # 1 - exp(-alpha x) would have lost all digits here
    assert not same(FDPO(alpha=0.3), FDPO(alpha=0.7), 1e-3)


@pytest.mark.parametrize(
    ("options", "slope"),
    [
        ({"f_divergence": "reverse_kl"}, 1.0),
        ({"f_divergence": "forward_kl"}, math.exp(2)),
        ({"f_divergence": "jensen_shannon"}, 1 / (1 + math.exp(-2))),
        ({"alpha": 0.3}, math.exp(0.6)),
    ],
)
def test_slope_of_the_score(options: dict[str, Any], slope: float) -> None:
    """At log u = -2: 1, e^2, sigma(2), e^(2 alpha)."""
    y = completions([[-2.0]], [[0.0]])
    (found,) = torch.autograd.grad(FDPO(beta=1.0, **options).reward(y).sum(), y._token_logps)
    assert found.item() == exactly(slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_log_ratios_of_1000(name: str, dtype: torch.dtype) -> None:
    """Both below the reference (the authors' forward KL gives inf - inf at -100), and far apart either way."""
    u, v = [-100.0, -101.0, 1000.0, -1000.0, -1000.0], [-101.0, -100.0, -1000.0, 1000.0, -1000.0]
    zero = [[0.0]] * 5
    batch = Pairs(
        completions([[x] for x in u], zero, dtype),
        completions([[x] for x in v], zero, dtype),
        torch.zeros(5, dtype=torch.bool),
    )
    method = FDPO(f_divergence=name)
    loss = method.loss(batch)
    assert torch.isfinite(loss).all() and loss[0] < loss[1] and loss[2] < loss[3]
    assert loss[4].item() == pytest.approx(math.log(2), abs=1e-6)
    slopes = torch.tensor(gradient(method, batch, batch.chosen, batch.rejected), dtype=dtype)
    assert torch.isfinite(slopes).all() and torch.isfinite(slopes.norm())
    assert slopes[0, 1] < 0 < slopes[1, 1]  # the pair that is lost still pulls
    if name in ("forward_kl", "alpha"):
        cut = method.metrics(batch)["exponent_cut"].tolist()
        assert cut == [1, 1, 0, 1, 1, 1, 1, 1, 0, 1]
    else:
        assert method.metrics(batch) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0\.0; expected a number above 0\."),
        ({"alpha": 1.5}, r"alpha is 1\.5; expected a number above 0 and at most 1\."),
        ({"alpha": 0.3, "f_divergence": "forward_kl"}, "alpha has no effect with f_divergence: forward_kl. Remove it."),
        ({"f_divergence": "js"}, 'f_divergence is "js"; expected one of reverse_kl, forward_kl, jensen_shannon, alpha'),
        ({"beta": 0.0}, "beta is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^f_dpo: {message}"):
        FDPO(**options)
