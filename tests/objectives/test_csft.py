"""CSFT: the loss by hand; the control tokens in a whole run are in spec 30's trap tests (tests/test_control_tokens.py)."""

from __future__ import annotations

import torch

from tests.objectives.by_hand import completions, exactly
from trimtab.logprobs.scored import Thumbs
from trimtab.objectives.csft import CSFT


def batch() -> Thumbs:
    """The first token of each answer is its control token."""
    return Thumbs(completions([[-3.0, -0.5, -1.0], [-2.0, -0.25]]), torch.tensor([True, False]))


def test_golden() -> None:
    """4.5 and 2.25 over 5 tokens: good and bad alike are imitated."""
    thumbs, method = batch(), CSFT()
    assert method.loss(thumbs).tolist() == exactly([4.5, 2.25]) and method.size(thumbs).tolist() == [3, 2]
    (slope,) = torch.autograd.grad(method.loss(thumbs).sum(), thumbs.y._token_logps)
    assert slope.tolist() == [-1.0] * 5


def test_golden_without_the_token() -> None:
    """1.5 and 0.25 over 3 tokens; no gradient to the control token."""
    thumbs, method = batch(), CSFT(token_in_loss=False)
    assert method.loss(thumbs).tolist() == exactly([1.5, 0.25]) and method.size(thumbs).tolist() == [2, 1]
    (slope,) = torch.autograd.grad(method.loss(thumbs).sum(), thumbs.y._token_logps)
    assert slope.tolist() == [0.0, -1.0, -1.0, 0.0, -1.0]
