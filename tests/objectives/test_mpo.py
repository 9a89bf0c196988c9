"""MPO: the sum of its parts, each averaged as it would be alone; options of parts; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, gradient, random_pairs, same_gradient
from trimtab.errors import ConfigError, NeedError
from trimtab.logprobs.scored import Demonstrations, Pairs, Rankings, Thumbs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.mpo import MPO
from trimtab.objectives.sft import SFT
from trimtab.objectives.simpo import SimPO


def test_one_part_is_that_method() -> None:
    batch = random_pairs()
    a, b = MPO(parts="1.0 * dpo(beta=0.3)"), DPO(beta=0.3)
    assert close(a.loss(batch), b.loss(batch))
    assert same_gradient(*(gradient(o, batch, batch.chosen, batch.rejected) for o in (a, b)))
    assert a.needs == {"reference"} and not a.has_memory()
    assert MPO(parts="1.0 * simpo").needs == frozenset()


def test_sum_of_means() -> None:
    """0.8 mean(DPO) + 0.2 mean(SimPO) + 0.5 (sum of NLL)/(number of chosen tokens), as the mean over rows."""
    batch = random_pairs()
    found = (
        MPO(parts="0.8 * dpo(beta=0.3) + 0.2 * simpo(beta=2.5, gamma_beta_ratio=0.1) + 0.5 * sft").loss(batch).mean()
    )
    demos = Demonstrations(batch.chosen)
    nll = SFT().loss(demos).sum() / SFT().size(demos).sum()
    wanted = 0.8 * DPO(beta=0.3).loss(batch).mean() + 0.2 * SimPO(2.5, 0.1).loss(batch).mean() + 0.5 * nll
    assert close(found, wanted)


def test_a_microbatch_uses_the_denominator_of_the_whole() -> None:
    batch, method = random_pairs(6), MPO(parts="1.0 * sft")
    rows = torch.tensor([0, 2, 5])
    part = Pairs(batch.chosen.take(rows), batch.rejected.take(rows), batch.tie[rows], around=batch)
    assert close(method.loss(part), method.loss(batch)[rows])
    assert not close(method.loss(replace(part, around=None)), method.loss(batch)[rows])


def test_thumbs_see_both_answers() -> None:
    batch = random_pairs(3)
    seen = batch.seen_as(Thumbs)
    assert seen.desirable.tolist() == [True] * 3 + [False] * 3
    assert torch.equal(seen.y.logp, torch.cat([batch.chosen.logp, batch.rejected.logp]))
    with pytest.raises(NeedError, match="pairs cannot be seen as rankings"):
        batch.seen_as(Rankings)


@pytest.mark.parametrize("parts", ["dpo", "0.5 * dpo - 0.5 * sft", "", "x * dpo"])
def test_not_a_sum(parts: str) -> None:
    with pytest.raises(ConfigError, match="expected a sum such as"):
        MPO(parts=parts)


def test_unknown_part_and_unknown_option() -> None:
    with pytest.raises(ConfigError, match='There is no method "dop"'):
        MPO(parts="1.0 * dop")
    with pytest.raises(ConfigError, match="dpo has no option gamma; known: beta"):
        MPO(parts="1.0 * dpo(gamma=1)")
    with pytest.raises(ConfigError, match="dpo: beta is -1"):
        MPO(parts="1.0 * dpo(beta=-1)")
