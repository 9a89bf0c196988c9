"""Weights held in bfloat16 or in 4 bits: what learns is kept in float32, and the folder at the end is whole."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.tiny_folder import tiny_folder
from trimtab import run
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.update.master import MasterAdamW, full_gradients

# of transformers and peft, about each other's names
pytestmark = pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning")
RATE = 1e-5  # of weights around 1: far below what bfloat16 can hold


def steps(optimiser: torch.optim.Optimizer, weight: nn.Parameter, n: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(n):
        gradient = torch.randn(weight.shape, generator=draw) + 1
        weight.grad = gradient.to(weight.grad_dtype or weight.dtype)
        optimiser.step()


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    """The same numbers in bfloat16 and in float32."""
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    full_gradients([low, high])
    return low, high


@pytest.mark.parametrize("fused", [True, False])
def test_master_weights_learn_as_float32_weights(fused: bool) -> None:
    low, high = pair()
    options: dict[str, Any] = {"lr": RATE, "weight_decay": 0.1, "betas": (0.8, 0.95), "fused": fused}
    ours = MasterAdamW([low], **options)
    steps(ours, low, 60)
    steps(torch.optim.AdamW([high], **options), high, 60)
    torch.testing.assert_close(ours.state[low]["master"], high.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(low, ours.state[low]["master"].bfloat16())
    start = pair()[0].detach()
    plain = nn.Parameter(start.clone())
    steps(torch.optim.AdamW([plain], **options), plain, 60)
    assert (ours.state[low]["master"] - start.float()).abs().min() > 1e-4  # what bfloat16 alone would have lost
    assert (plain == start).float().mean() > 0.5


def test_the_state_goes_on_as_it_was_saved() -> None:
    low, _ = pair()
    whole = MasterAdamW([low], lr=RATE)
    steps(whole, low, 3)
    steps(whole, low, 3, seed=1)
    first, _ = pair()
    half = MasterAdamW([first], lr=RATE)
    steps(half, first, 3)
    second = nn.Parameter(first.detach().clone())
    full_gradients([second])
    other = MasterAdamW([second], lr=RATE)
    other.load_state_dict(half.state_dict())
    steps(other, second, 3, seed=1)
    for name, value in whole.state[low].items():
        assert torch.equal(value, other.state[second][name]) and value.dtype == torch.float32, name


def test_gradients_of_microbatches_are_added_in_float32() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    full_gradients([weight])
    for scale in (1.0, 1e-3):  # the second is lost beside the first in bfloat16
        (weight * scale).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert weight.grad.tolist() == pytest.approx([1.001] * 4, abs=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def trained(folder: Path, **more: Any) -> tuple[dict[str, Any], list[float], Path]:
    """(run card, losses, output) of a small DPO run."""
    tiny_folder(folder / "tiny", hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4)
    rows = [{"prompt": f"say {i}", "chosen": "yes, gladly", "rejected": "no, not now"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = {
        "data": str(folder / "pairs.jsonl"), "model": str(folder / "tiny"), "output": str(folder / "out"), "epochs": 6,
        "batch_size": 8, "samples": 0, "holdout": 0.0, "learning_rate": 1e-3, **more,
    }  # fmt: skip
    out = run.train(resolve(asked))
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "run.json").read_text()), [x["loss"] for x in losses if "loss" in x], out


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_a_run_with_weights_in_bfloat16(finetune: str, tmp_path: Path) -> None:
    card, losses, out = trained(tmp_path, weights="bfloat16", finetune=finetune)
    assert card["engine"]["weights"] == card["engine"]["precision"] == "bfloat16"
    assert losses[-1] < 0.9 * losses[0]
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert all(check["ok"] for check in card["checks"])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, which computes 4 bits slowly on a CPU and says so
def test_a_run_with_weights_in_four_bits(tmp_path: Path) -> None:
    card, losses, out = trained(tmp_path, weights="nf4")
    assert card["engine"]["weights"] == "nf4"
    assert losses[-1] < 0.9 * losses[0]
    assert not getattr(AutoModelForCausalLM.from_pretrained(out), "is_quantized", False)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"weights": "bfloat16", "precision": "float32"}, "precision is float32"),
        ({"weights": "nf4", "finetune": "full"}, "Use finetune: lora"),
        ({"weights": "nf4", "method": "reward_model"}, "a reward model is trained on weights: bfloat16"),
        ({"weights": "bfloat16", "finetune": "full", "optimizer": "adafactor"}, "optimizer is adafactor"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve({"data": "x.jsonl", **more})
