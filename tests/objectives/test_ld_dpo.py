"""LD-DPO against arithmetic: which tokens count less, and of whom."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.objectives.by_hand import close, completions, exactly, gradient, pair, pairs_of, random_pairs, same_gradient
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Pairs
from trimtab.objectives.dpo import DPO
from trimtab.objectives.ld_dpo import LDDPO


def test_golden() -> None:
    """The pair of test_dpo: 2 and 3 tokens, so the third of the rejected counts by alpha = 0.25.  beta 0.5
    rejected: -0.5 + 0.25 + 0.25 * 0.05 = -0.2375;  m = 0.5 (0.5 + 0.2375) = 0.36875
    L = log(1 + e^-0.36875) = 0.525673814799514;  0.5 sigma(-m) = 0.204421550065856, of the tail a quarter
    """
    batch, method = pair(), LDDPO(beta=0.5, alpha=0.25)
    assert method.loss(batch).item() == exactly(0.525673814799514)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.204421550065856] * 2)
    assert rejected == exactly([0.204421550065856, 0.204421550065856, 0.0511053875164641])


def test_golden_policy_only() -> None:
    """rejected: (-2 - 0.25 - 0.25 * 0.75) - (-1.5 - 0.5 - 0.8) = 0.3625;  m = 0.5 (0.5 - 0.3625) = 0.06875
    L = log(1 + e^-0.06875) = 0.659362884552883;  0.5 sigma(-m) = 0.241409633308907
    """
    batch, method = pair(), LDDPO(beta=0.5, alpha=0.25, weigh="policy")
    assert method.loss(batch).item() == exactly(0.659362884552883)
    chosen, rejected = gradient(method, batch, batch.chosen, batch.rejected)
    assert chosen == exactly([-0.241409633308907] * 2)
    assert rejected == exactly([0.241409633308907, 0.241409633308907, 0.0603524083272268])


def test_rows_have_their_own_shared_length() -> None:
    """1 against 3 tokens, and 3 against 2: the tails are the rejected's last two and the chosen's last one."""
    batch = Pairs(
        completions([[-1.0], [-1.0] * 3], [[-1.5], [-1.5] * 3]),
        completions([[-1.0] * 3, [-1.0] * 2], [[-1.5] * 3, [-1.5] * 2]),
        torch.zeros(2, dtype=torch.bool),
    )
    chosen, rejected = gradient(LDDPO(beta=1.0, alpha=0.1), batch, batch.chosen, batch.rejected)
    a, b = rejected[0], rejected[3]  # what each row pulls
    assert chosen == exactly([-a, -b, -b, -0.1 * b]) and rejected == exactly([a, 0.1 * a, 0.1 * a, b, b])


def test_at_the_reference() -> None:
    """ln 2, but not where only the policy's tail is weighted: one tail token of log-prob -2 at alpha 0.5 gives m = -beta."""
    w, l = [[-1.0]], [[-1.0, -2.0]]  # noqa: E741
    batch = Pairs(completions(w, w), completions(l, l), torch.tensor([False]))
    assert LDDPO().loss(batch).item() == exactly(math.log(2))
    assert LDDPO(beta=1.0, weigh="policy").loss(batch).item() == exactly(math.log(1 + math.e))


def test_full_weight_or_equal_lengths_is_dpo() -> None:
    for batch, method in ((random_pairs(), LDDPO(alpha=1.0)), (pairs_of([-2.0, 0.1, 3.0]), LDDPO(alpha=0.3))):
        assert close(method.loss(batch), DPO().loss(batch))
        a, b = (gradient(o, batch, batch.chosen, batch.rejected) for o in (method, DPO()))
        assert same_gradient(a, b)
    assert not close(LDDPO(alpha=0.3).loss(random_pairs()), DPO().loss(random_pairs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_1000(dtype: torch.dtype) -> None:
    batch, method = pairs_of([1000.0, -1000.0], dtype=dtype), LDDPO(beta=1.0)
    assert method.loss(batch).tolist() == [0.0, 1000.0]
    assert gradient(method, batch, batch.chosen, batch.rejected) == [[0.0, -1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha is -0\.1; expected a number at least 0\."),
        ({"alpha": 1.1}, r"alpha is 1\.1; expected a number at least 0 and at most 1\."),
        ({"alpha": 1.0, "weigh": "policy"}, "weigh has no effect with alpha: 1"),
        ({"weigh": "reference"}, 'weigh is "reference"; expected one of both, policy'),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^ld_dpo: {message}"):
        LDDPO(**options)
