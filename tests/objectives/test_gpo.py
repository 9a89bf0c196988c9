"""The functions of GPO against arithmetic, and the methods they are."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, same_gradient
from trimtab.errors import ConfigError
from trimtab.objectives.base import Objective
from trimtab.objectives.dpo import DPO
from trimtab.objectives.gpo import CUT, FUNCTIONS, GPO
from trimtab.objectives.ipo import IPO
from trimtab.objectives.rso import RSO

# f(0.35), f'(0.35), f(0): the first two by hand, the last of the specification's table
GOLDEN = {
    "logistic": (0.533382155418777, -0.413382421082670, math.log(2)),
    "hinge": (0.65, -1.0, 1.0),
    "squared": (0.4225, -1.3, 1.0),
    "exponential": (0.704688089718713, -0.704688089718713, 1.0),
    "truncated_quadratic": (0.4225, -1.3, 1.0),
    "savage": (0.170885026060170, -0.200488320521283, 0.25),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_golden(function: str) -> None:
    """The pair of test_dpo, beta 0.5: z = 0.35.  log(1 + e^-0.35), 1 - 0.35, (0.35 - 1)^2, e^-0.35, 0.65^2 and
    sigma(-0.35)^2; slopes -sigma(-z), -1, 2(z - 1), -e^-z, -2(1 - z), -2 sigma(-z)^2 sigma(z); by a token -+0.5 f'.
    """
    batch, method = pair(), GPO(beta=0.5, function=function)
    value, slope, at_reference = GOLDEN[function]
    assert method.loss(batch).item() == exactly(value)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([0.5 * slope] * 2) and rejected == exactly([-0.5 * slope] * 3)
    assert method.loss(pairs_of([0.0])).item() == exactly(at_reference)


def test_a_won_pair_stops_pulling_in_hinge_and_truncated_quadratic_only() -> None:
    """z = 3; the quadratic without truncation pulls back."""
    batch = pairs_of([3.0])
    slopes = {f: gradient(GPO(beta=1.0, function=f), batch, batch.chosen)[0][0] for f in FUNCTIONS}
    assert slopes["hinge"] == slopes["truncated_quadratic"] == 0 and slopes["squared"] == exactly(4.0)
    assert all(slopes[f] < 0 for f in ("logistic", "exponential", "savage"))


@pytest.mark.parametrize(
    ("gpo", "same", "scale"),
    [
        (GPO(beta=0.3), DPO(beta=0.3), 1.0),
        (GPO(beta=0.3, function="hinge"), RSO(gamma=0.3), 1.0),
        (GPO(beta=0.6, function="squared"), IPO(tau=0.3, aggregation="sum"), 4 * 0.3**2),
    ],
)
def test_it_is(gpo: GPO, same: Objective, scale: float) -> None:
    """logistic: DPO. hinge: RSO's hinge-norm. squared with beta = 2 tau: 4 tau^2 IPO (spec 10)."""
    batch = random_pairs()
    assert close(gpo.loss(batch), scale * same.loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (gpo, same))
    assert same_gradient(a, [[scale * x for x in side] for side in b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_goes_on_as_its_tangent_and_is_counted(dtype: torch.dtype) -> None:
    """z = -1000: e^30 (1 + 970), slope -e^30; its square, as a gradient's norm has it, is finite."""
    batch = pairs_of([1000.0, -29.0, -1000.0], dtype=dtype)
    method, top = GPO(beta=1.0, function="exponential"), math.exp(CUT)
    assert method.loss(batch).tolist() == pytest.approx([0.0, math.exp(29), 971 * top], rel=1e-6)
    slope = torch.tensor(gradient(method, batch, batch.chosen)[0], dtype=dtype)
    assert slope.tolist() == pytest.approx([0.0, -math.exp(29), -top], rel=1e-6) and torch.isfinite(slope.norm())
    assert method.metrics(batch)["exponent_cut"].tolist() == [0, 0, 1] and GPO().metrics(batch) == {}


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "exponential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(function: str, dtype: torch.dtype) -> None:
    wanted = {
        "logistic": (0, 1000),
        "hinge": (0, 1001),
        "squared": (999**2, 1001**2),
        "truncated_quadratic": (0, 1001**2),
    }
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), GPO(beta=1.0, function=function)
    assert tuple(method.loss(batch).tolist()) == wanted.get(function, (0, 1))
    assert torch.isfinite(torch.tensor(gradient(method, batch, batch.chosen))).all()


def test_unknown_function() -> None:
    with pytest.raises(
        ConfigError, match=r'^gpo: function is "sigmoid"; expected one of logistic, hinge, squared, exp'
    ):
        GPO(function="sigmoid")
    with pytest.raises(ConfigError, match=r"^gpo: beta is 0\.0; expected a number above 0\.$"):
        GPO(beta=0.0)
