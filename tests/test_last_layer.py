"""What lies behind the last layer's attention is computed where it is read, and nowhere else. That the numbers stay is shown for
every architecture in test_layouts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.test_layouts import EXAMPLES, LENGTHS, model_of, own_numbers
from trimtab.logprobs import last_layer
from trimtab.logprobs.layout import Mode, lay_out
from trimtab.logprobs.score import Scorer, install, uninstall


def layers(model: Any) -> Any:
    return model.model.layers


def watched(model: nn.Module) -> list[tuple[int, int]]:
    """(layer, positions) of every call of an MLP."""
    seen: list[tuple[int, int]] = []
    for n, layer in enumerate(layers(model)):
        layer.mlp.register_forward_pre_hook(lambda _, given, n=n: seen.append((n, given[0].shape[:-1].numel())))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2_moe"])
@pytest.mark.parametrize("mode", ["shared", "packed", "padded"])
def test_positions_that_nobody_reads_are_left_out(mode: Mode, kind: str, checkpointing: bool) -> None:
    model = model_of(kind)
    install(model, torch.float32, mode)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
    seen, layout = watched(model), lay_out(EXAMPLES, mode)
    found = model(trimtab=layout)
    first = seen[:2]
    found.sum().backward()
    every = layout.input_ids.numel()
    assert first == [(0, every), (1, every if mode == "padded" else sum(LENGTHS))]
    # once more where transformers checkpoints a layer's call and not its code
    again = [first] if mode == "padded" else [first, first[:1]]
    assert sorted(seen[2:]) in (again if checkpointing else [[]])
    assert all(p.grad is not None for p in layers(model)[-1].parameters())


def test_a_call_without_a_layout_gets_all() -> None:
    model = model_of("llama")
    install(model, torch.float32, "padded")
    seen = watched(model)
    ids = torch.tensor([[3, 4, 5]])
    assert model(input_ids=ids).logits.shape[1] == 3 and seen == [(0, 3), (1, 3)]


def test_numbers_are_those_of_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    own = own_numbers(model)
    install(model, torch.float32, "shared")
    scorer = Scorer(model, "shared", 10**6)
    ours, _ = scorer.score(EXAMPLES)
    uninstall(model)
    monkeypatch.setattr(last_layer, "replacements", lambda model: [])
    install(model, torch.float32, "shared")
    seen = watched(model)
    whole, _ = scorer.score(EXAMPLES)
    assert seen[1][1] > sum(LENGTHS)
    assert (ours - whole).abs().max() < 2e-6 and (ours - own).abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "cohere", "mixtral"])
def test_other_code_is_left_alone(kind: str) -> None:
    assert not list(last_layer.replacements(model_of(kind)))
