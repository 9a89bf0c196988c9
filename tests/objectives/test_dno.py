"""DNO against arithmetic, DPO and cDPO, and which strengths it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, exactly, gradient, pair, pairs_of, random_pairs, same_gradient, sigma
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.cdpo import CDPO
from trimtab.objectives.dno import DNO
from trimtab.objectives.dpo import DPO


def strong(batch: Pairs, *strength: float) -> Pairs:
    return replace(batch, strength=torch.tensor(strength, dtype=batch.chosen.length.dtype))


@pytest.mark.parametrize(("meaning", "strength"), [("probability", 0.7), ("reward_difference", math.log(7 / 3))])
def test_golden(meaning: str, strength: float) -> None:
    """The pair of test_dpo, beta 0.5: m = 0.35; P = 0.7, or sigma(log(7/3)).
    L = 0.7 softplus(-0.35) + 0.3 softplus(0.35) = 0.638382155418777
    dL/dm = sigma(0.35) - 0.7 = -0.11338242108267; times 0.5: -+0.0566912105413349
    """
    batch, method = strong(pair(), strength), DNO(beta=0.5, strength=meaning)
    assert method.loss(batch).item() == exactly(0.638382155418777)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.0566912105413349] * 2) and rejected == exactly([0.0566912105413349] * 3)


def test_ln_2_at_the_reference_whatever_was_said() -> None:
    batch = strong(pairs_of([0.0] * 4), -3.0, 0.0, 0.3, 1000.0)
    assert DNO().loss(batch).tolist() == exactly([math.log(2)] * 4)


@pytest.mark.parametrize(("meaning", "strength"), [("probability", 1.0), ("ignored", 0.3), ("probability", math.nan)])
def test_sure_labels_are_dpo(meaning: str, strength: float) -> None:
    batch = strong(random_pairs(), *[strength] * 7)
    assert close(DNO(beta=0.3, strength=meaning).loss(batch), DPO(beta=0.3).loss(batch))
    a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (DNO(0.3, meaning), DPO(beta=0.3)))
    assert same_gradient(a, b)
    assert close(DNO(beta=0.3).loss(random_pairs()), DPO(beta=0.3).loss(batch))


def test_it_is_cdpo_with_an_eps_per_pair() -> None:
    s = [0.1, 0.5, 1.0, 2.0, 3.0, 0.7, 5.0]
    loss = DNO(beta=0.3).loss(strong(random_pairs(), *s))
    wanted = [CDPO(0.3, sigma(-x)).loss(random_pairs())[i].item() for i, x in enumerate(s)]
    assert loss.tolist() == exactly(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch = strong(pairs_of([1000.0, -1000.0], dtype=dtype), 0.75, 0.75)
    assert DNO(1.0, "probability").loss(batch).tolist() == [250.0, 750.0]
    assert gradient(DNO(1.0, "probability"), batch, batch.chosen) == [[0.25, -0.75]]


def test_it_refuses_what_it_cannot_read() -> None:
    three = pairs_of([math.nan] * 3)
    said, _ = DNO().advise(strong(three, 0.1, math.nan, math.nan))
    assert said.startswith("2 of 3 comparisons have no strength; dno needs one for each, or strength: ignored")
    assert DNO().advise(three)[0].startswith("3 of 3 comparisons")
    assert DNO().advise(strong(three, -4.0, 0.0, 9.0)) == DNO(strength="ignored").advise(three) == ("", [])
    said, _ = DNO(strength="probability").advise(strong(three, 0.1, 1.0, 4.0))
    assert said == "strengths from 0.1 to 4 are no probabilities; see the option strength"
    assert DNO(strength="probability").advise(strong(three, 0.0, 0.5, 1.0)) == ("", [])


def test_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match='^dno: strength is "margin"; expected one of reward_difference, probability, ig'
    ):
        DNO(strength="margin")
