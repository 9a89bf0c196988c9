"""Unpaired APO-zero against arithmetic and against KTO."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, random_pairs, same_gradient, thumbs
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Thumbs
from trimtab.objectives.apo_zero import APOZero
from trimtab.objectives.apo_zero_unpaired import APOZeroUnpaired
from trimtab.objectives.kto import KTO


def test_golden() -> None:
    """beta 0.5, lambda_D 1.5, lambda_U 2: up 0.5: 1.5 sigma(-0.25) = 0.656735248671303; down -0.2: 2 sigma(-0.1) =
    0.95004162504212. dL/drho = -1.5 0.5 sigma(0.25) sigma(-0.25) = -0.184600562053199, 2 0.5 sigma(0.1) sigma(-0.1) =
    0.249376040192892
    """
    batch = thumbs([0.5, -0.2], [True, False], [])
    method = APOZeroUnpaired(beta=0.5, desirable_weight=1.5, undesirable_weight=2.0)
    assert method.loss(batch).tolist() == exactly([0.656735248671303, 0.95004162504212])
    assert gradient(method, batch, batch.y) == [exactly([-0.184600562053199, 0.249376040192892])]


def test_is_kto_with_reference_point_0() -> None:
    rho, up = [0.5, -0.2, 3.0, -7.0], [True, False, False, True]
    zero, positive = thumbs(rho, up, [0.0, 0.0]), thumbs(rho, up, [1.0, 2.0])
    a, b = APOZeroUnpaired(beta=0.3, undesirable_weight=1.7), KTO(beta=0.3, undesirable_weight=1.7)
    assert close(a.loss(zero), b.loss(zero)) and same_gradient(*(gradient(o, zero, zero.y) for o in (a, b)))
    assert close(a.loss(positive), a.loss(zero)) and not close(b.loss(positive), b.loss(zero))


def test_a_pair_costs_what_it_costs_as_two_thumbs() -> None:
    pairs = random_pairs()
    halves = APOZeroUnpaired().loss(pairs.seen_as(Thumbs)).view(2, -1)
    assert close(halves.sum(0), APOZero().loss(pairs))


def test_at_the_reference_and_far_from_it() -> None:
    assert APOZeroUnpaired().loss(thumbs([0.0, 0.0], [True, False], [])).tolist() == exactly([0.5, 0.5])
    for dtype in (torch.float32, torch.float64):
        batch = thumbs([1000.0, -1000.0, 1000.0, -1000.0], [True, True, False, False], [], dtype)
        method = APOZeroUnpaired(beta=1.0)
        assert method.loss(batch).tolist() == [0.0, 1.0, 1.0, 0.0]
        assert gradient(method, batch, batch.y) == [[0.0] * 4]


def test_needs_no_mismatched_rows() -> None:
    batch = thumbs([0.5], [True], [])
    alone = Thumbs(batch.y, batch.desirable)
    assert APOZeroUnpaired().loss(alone).shape == (1,) and APOZeroUnpaired().metrics(alone) == {}


def test_bad_options_and_data() -> None:
    with pytest.raises(ConfigError, match=r"^apo_zero_unpaired: beta is 0; expected a number above 0\.$"):
        APOZeroUnpaired(beta=0)
    said = APOZeroUnpaired().advise(thumbs([math.nan] * 2, [True] * 2, []))[0]
    assert said == "all 2 thumbs point up; apo_zero_unpaired needs both kinds"
