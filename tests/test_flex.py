"""One kernel over the whole row gives what group by group gives. Forward only: torch has no backward of it on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.test_layouts import EXAMPLES, model_of
from trimtab.logprobs import attention, flex
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.score import Scorer, install


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mode", ["shared", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "llama tied multi-query"])
def test_flex_attention_is_ours(kind: str, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without windows, soft-caps and shared keys."""
    model = model_of(kind).double()
    install(model, torch.float64, mode)
    scorer, calls = Scorer(model, mode, 60), list[int]()
    ours = scorer.score_all(EXAMPLES)[0]
    row: Callable[..., Any] = flex.whole_row
    monkeypatch.setattr(flex, "whole_row", lambda *args: [calls.append(1), row(*args)][1])
    monkeypatch.setattr(attention, "FLEX", True)
    assert (scorer.score_all(EXAMPLES)[0] - ours).abs().max() < 1e-10
    assert calls
