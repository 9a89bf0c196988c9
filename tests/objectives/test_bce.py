"""Binary cross-entropy against arithmetic, its class means and weights, and its bound on DPO's loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, random_pairs, softplus, thumbs
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Thumbs
from trimtab.objectives.bce import BCE

UP = [True, False, True]


def weighed(batch: Thumbs, *weight: float) -> Thumbs:
    return replace(batch, weight=torch.tensor(weight, dtype=torch.float64))


def test_golden() -> None:
    """rho 0.5 up, -0.2 down, 0.1 up; beta 0.5: r = 0.25, -0.1, 0.05; w = 2 for the bad one (and 9 for the others, unread).
    L: two of three rows are up, one is down: 3/2 log(1 + e^-0.25) = 0.863909129818266,
    3/1 * 2 log(1 + e^-0.1) = 3.866379960441425, 3/2 log(1 + e^-0.05) = 1.00268947201993
    dL/drho: -3/2 0.5 sigma(-0.25) = -0.328367624335652, 3 * 2 * 0.5 sigma(-0.1) = 1.42506243756318,
    -3/2 0.5 sigma(-0.05) = -0.365626952636842
    """
    batch, method = weighed(thumbs([0.5, -0.2, 0.1], UP, []), 9, 2, 9), BCE(beta=0.5)
    assert method.loss(batch).tolist() == exactly([0.863909129818266, 3.866379960441425, 1.00268947201993])
    assert gradient(method, batch, batch.y) == [exactly([-0.328367624335652, 1.42506243756318, -0.365626952636842])]


@pytest.mark.parametrize(("average", "wanted"), [("class", 1 + 5 / 2), ("row", (2 + 5) / 4)])
def test_at_the_reference(average: str, wanted: float) -> None:
    """Every logit is 0: log 2 times the sum of the classes' mean weights, or log 2 times the mean weight."""
    batch = weighed(thumbs([0.0] * 4, [True, False, False, True], []), 7, 2, 3, 7)
    assert BCE(average=average).loss(batch).mean().item() == exactly(wanted * math.log(2))


def test_mean_of_the_batch_is_the_sum_of_two_class_means() -> None:
    rho, up = [0.4, -3.0, 2.0, 1.0, 0.3], [True, False, False, True, True]
    losses = [softplus(-r if u else r) for r, u in zip(rho, up, strict=True)]
    wanted = (losses[0] + losses[3] + losses[4]) / 3 + (losses[1] + losses[2]) / 2
    batch = thumbs(rho, up, [])
    assert BCE(beta=1.0).loss(batch).mean().item() == exactly(wanted)
    assert BCE(beta=1.0, average="row").loss(batch).tolist() == exactly(losses)


def test_a_microbatch_uses_the_counts_of_the_whole() -> None:
    whole = thumbs([0.4, -3.0, 2.0, 1.0], [True, False, True, True], [])
    part = replace(thumbs([0.4, -3.0], [True, False], []), around=whole)
    assert close(BCE().loss(part), BCE().loss(whole)[:2])
    assert not close(BCE().loss(replace(part, around=None)), BCE().loss(whole)[:2])


def test_one_class_alone_and_held_out_rows() -> None:
    """A class that is not in the batch adds 0. A held-out row is seen alone: twice its loss, so that equally many of both
    kinds give the sum of the class means."""
    assert BCE(beta=1.0).loss(thumbs([0.4, 0.4], [True, True], [])).mean().item() == exactly(softplus(-0.4))
    alone = replace(thumbs([0.4], [False], []), learning=False)
    assert BCE(beta=1.0).loss(alone).item() == exactly(2 * softplus(0.4))


def test_no_weights_are_weights_of_1() -> None:
    batch = thumbs([0.5, -0.2, 0.1], UP, [])
    assert close(BCE().loss(batch), BCE().loss(weighed(batch, 1, 1, 1)))
    assert "density_weight" not in BCE().metrics(batch)
    assert BCE().metrics(weighed(batch, 9, 2, 9))["density_weight"].tolist() == [2]


@pytest.mark.parametrize("delta", [-2.0, 0.0, 0.7])
def test_bound_on_dpo(delta: float) -> None:
    """Theorem 1: BCE > DPO for every shift, by log(1 + (e^-x + e^-y)/(1 + e^-(x+y))); DPO does not know the shift."""
    pairs = random_pairs(scale=3.0).seen_as(Thumbs)
    method = Moved(beta=1.0)
    vars(method)["by"] = delta
    found = method.bound(pairs)
    assert (found["bound/error"] > 0).all() and (found["bound/bce"] > found["bound/dpo"]).all()
    assert close(found["bound/bce"] - found["bound/dpo"], found["bound/error"], 1e-10)
    r, n = method.reward(pairs.y), len(pairs) // 2
    assert close(found["bound/dpo"].view(n, n), -torch.nn.functional.logsigmoid(r[:n, None] - r[None, n:]), 1e-10)


class Moved(BCE):
    """L = BCE with a shift"""

    by = 0.0

    def logit(self, batch: Thumbs) -> torch.Tensor:
        return super().logit(batch) - self.by


@pytest.mark.parametrize("apart", [0.1, 1.0, 6.0])
def test_the_bound_is_tightest_in_the_middle(apart: float) -> None:
    """r_w = D/2, r_l = -D/2: the error is smallest without a shift, log(1 + 1/cosh(D/2)), and BCE is 2 log(1 + e^(-D/2))."""

    def bound(shift: float) -> tuple[float, float]:
        found = BCE(beta=1.0).bound(thumbs([apart / 2 - shift, -apart / 2 - shift], [True, False], []))
        return found["bound/error"].item(), found["bound/bce"].item()

    assert bound(0.0) == exactly((math.log(1 + 1 / math.cosh(apart / 2)), 2 * softplus(-apart / 2)))
    assert bound(0.0)[0] < min(bound(0.01)[0], bound(-0.01)[0])


def test_the_bound_of_one_kind_is_not_there() -> None:
    assert not BCE().bound(thumbs([0.5], [True], []))["bound/error"].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = thumbs([1000.0, -1000.0, 1000.0, -1000.0], [True, True, False, False], [], dtype)
    method = BCE(beta=1.0)
    assert method.loss(batch).tolist() == [0.0, 2000.0, 2000.0, 0.0]
    assert gradient(method, batch, batch.y) == [[0.0, -2.0, 2.0, 0.0]]
    assert all(torch.isfinite(v).all() for v in method.bound(batch).values())


def test_one_kind_only_is_refused() -> None:
    assert BCE().advise(thumbs([math.nan] * 3, [True] * 3, []))[0] == "all 3 thumbs point up; bce needs both kinds"
    assert BCE().advise(thumbs([math.nan] * 3, UP, [])) == ("", [])


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"^bce: beta is 0; expected a number above 0\.$"):
        BCE(beta=0)
    with pytest.raises(ConfigError, match=r'^bce: average is "all"; expected one of class, row\.$'):
        BCE(average="all")
