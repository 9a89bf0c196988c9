"""BCO against arithmetic, and what its shift remembers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.objectives.by_hand import close, exactly, gradient, same_gradient, thumbs
from trimtab.errors import ConfigError
from trimtab.objectives.bce import BCE
from trimtab.objectives.bco import BCO


def after(method: BCO, *batches: tuple[list[float], list[bool]]) -> Mapping[str, Tensor]:
    """What is remembered after these batches of (log-ratios, thumbs)."""
    memory: Mapping[str, Tensor] = {}
    for rho, up in batches:
        memory = method.remember(thumbs(rho, up, []), memory)
    return memory


def delta(method: BCO, memory: Mapping[str, Tensor]) -> float:
    return method.delta(replace(thumbs([0.0], [True], []), memory=memory)).item()


def test_golden() -> None:
    """rho 0.5 up, -0.2 down, 0.1 up; beta 0.5: r = 0.25, -0.1, 0.05, class means 0.15 and -0.1, delta = 0.025; w = 2.
    L: 3/2 log(1 + e^-0.225) = 0.880443003074556, 3 * 2 log(1 + e^-0.125) = 3.795594211903015,
    3/2 log(1 + e^-0.025) = 1.021087955288287
    dL/drho, delta held: -0.75 sigma(-0.225) = -0.332989582091535, 3 sigma(-0.125) = 1.406371879878731,
    -0.75 sigma(-0.025) = -0.370312744125367
    Pairs (0.225, 0.125) and (0.025, 0.125): BCE 1.219561037366873, 1.313324338842694; DPO 0.533382155418777,
    0.620957047789532; error 0.686178881948096, 0.692367291053162
    """
    method, batch = BCO(beta=0.5), thumbs([0.5, -0.2, 0.1], [True, False, True], [])
    memory = method.remember(batch, {})
    batch = replace(batch, memory=memory, weight=torch.tensor([9.0, 2.0, 9.0], dtype=torch.float64))
    assert method.loss(batch).tolist() == exactly([0.880443003074556, 3.795594211903015, 1.021087955288287])
    assert gradient(method, batch, batch.y) == [exactly([-0.332989582091535, 1.406371879878731, -0.370312744125367])]
    found = {name: value.tolist() for name, value in method.metrics(batch).items()}
    assert found["delta"] == exactly([0.025]) and found["density_weight"] == [2]
    assert found["bound/bce"] == exactly([1.219561037366873, 1.313324338842694])
    assert found["bound/dpo"] == exactly([0.533382155418777, 0.620957047789532])
    assert found["bound/error"] == exactly([0.686178881948096, 0.692367291053162])


def test_at_the_reference() -> None:
    """All rewards are 0, so delta is 0 whatever came before: 2 log 2."""
    method, batch = BCO(), thumbs([0.0] * 4, [True, False, False, False], [])
    batch = replace(batch, memory=method.remember(batch, {}))
    assert method.loss(batch).mean().item() == exactly(2 * math.log(2))


def test_the_middle_of_two_moving_means() -> None:
    """beta 0.5. First batch: up (1 + 3)/2 * 0.5 = 1, down -2; delta = -0.5, not the mean of all (0).
    Second, decay 0.75: up 1 + (5 - 1)/4 = 2, down -2 + (0 + 2)/4 = -1.5; delta = 0.25.
    """
    method = BCO(beta=0.5, decay=0.75)
    first, second = ([1.0, 3.0, -4.0], [True, True, False]), ([10.0, 0.0], [True, False])
    assert delta(method, after(method, first)) == exactly(-0.5)
    assert delta(method, after(method, first, second)) == exactly(0.25)


def test_the_default_decay_is_099() -> None:
    memory = after(BCO(beta=1.0), ([0.0, 0.0], [True, False]), ([1.0, 0.0], [True, False]))
    assert memory["desirable"].item() == exactly(0.01)


def test_a_class_that_is_missing_keeps_its_mean() -> None:
    method, both, up = BCO(beta=1.0, decay=0.5), ([4.0, -2.0], [True, False]), ([8.0], [True])
    assert delta(method, after(method, both)) == exactly(1.0)
    assert delta(method, after(method, both, up)) == exactly((6 - 2) / 2)


def test_a_class_that_was_never_seen_is_at_the_reference() -> None:
    method = BCO(beta=1.0)
    assert delta(method, {}) == 0 and delta(method, after(method, ([3.0], [True]))) == exactly(1.5)
    # and its first batch is its mean
    assert delta(method, after(method, ([3.0], [True]), ([-1.0], [False]))) == exactly(1.0)


def test_running_mean_is_the_mean_of_all_rewards_so_far() -> None:
    """TRL's: the commoner class decides."""
    batches = [([1.0, 2.0, -3.0], [True, True, False]), ([4.0], [True]), ([5.0, 6.0, -7.0, 8.0], [True] * 4)]
    method = BCO(beta=0.5, shift="running_mean")
    rewards = [0.5 * r for rho, _ in batches for r in rho]
    assert delta(method, after(method, *batches)) == exactly(sum(rewards) / len(rewards))


def test_running_mean_stays_exact_over_many_batches() -> None:
    method = BCO(beta=1.0, shift="running_mean")
    memory: Mapping[str, Tensor] = {}
    for _ in range(500):
        memory = method.remember(thumbs([0.1] * 3, [True] * 3, [], torch.float32), memory)
    assert delta(method, memory) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("shift", ["midpoint", "running_mean"])
def test_what_is_remembered_has_no_graph(shift: str) -> None:
    """Otherwise the shift would absorb the gradient."""
    memory = BCO(shift=shift).remember(thumbs([0.5, -0.2], [True, False], []), {})
    assert memory and not any(value.requires_grad for value in memory.values())


def test_the_loss_changes_no_memory() -> None:
    method, memory = BCO(), {"desirable": torch.tensor(0.3), "undesirable": torch.tensor(0.1)}
    batch = replace(thumbs([5.0, -2.0], [True, False], []), memory=memory)
    method.loss(batch), method.metrics(batch)
    assert delta(method, memory) == pytest.approx(0.2)


def test_without_memory_it_is_bce() -> None:
    batch = thumbs([0.5, -0.2, 3.0], [True, False, False], [])
    for average in ("class", "row"):
        a, b = BCO(average=average), BCE(average=average)
        assert close(a.loss(batch), b.loss(batch))
        assert same_gradient(gradient(a, batch, batch.y), gradient(b, batch, batch.y))


def test_a_constant_on_all_log_ratios_is_absorbed() -> None:
    up = [True, False, True]
    a, b = thumbs([0.5, -0.2, 0.1], up, []), thumbs([7.5, 6.8, 7.1], up, [])
    a, b = (replace(x, memory=BCO().remember(x, {})) for x in (a, b))
    assert close(BCO().loss(a), BCO().loss(b)) and not close(BCE().loss(a), BCE().loss(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    """Means 500 and -500 of the classes: delta 0."""
    method = BCO(beta=1.0)
    batch = thumbs([1000.0, 0.0, -1000.0, 0.0], [True, True, False, False], [], dtype)
    batch = replace(batch, memory=method.remember(batch, {}))
    assert method.loss(batch).tolist() == pytest.approx([0, 2 * math.log(2)] * 2, rel=1e-6)
    assert gradient(method, batch, batch.y) == [[0.0, -1.0, 0.0, 1.0]]


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"^bco: decay has no effect with shift: running_mean\. Remove it\.$"):
        BCO(shift="running_mean", decay=0.5)
    with pytest.raises(ConfigError, match=r"^bco: decay is 1; expected a number at least 0 and below 1\.$"):
        BCO(decay=1)
    with pytest.raises(ConfigError, match=r'^bco: shift is "ema"; expected one of midpoint, running_mean\.$'):
        BCO(shift="ema")
    assert BCO().advise(thumbs([math.nan], [False], []))[0] == "all 1 thumbs point down; bco needs both kinds"
