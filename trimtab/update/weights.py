"""The weights that learn: dropout off, an adapter on, and a folder that transformers loads at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.logprobs.score import uninstalled


def no_dropout(model: nn.Module) -> None:
    """Preference objectives compare two forward passes of one text: dropout would be noise between them."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def with_adapter(model: nn.Module, rank: int, alpha: int, targets: str) -> nn.Module:
    """A LoRA adapter on the model without dropout. ``targets``: ``all-linear`` or names separated by commas."""
    from peft import LoraConfig, get_peft_model

    modules = targets if targets == "all-linear" else targets.split(",")
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules, task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(model, lora)
    return adapted


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write full weights that plain ``AutoModelForCausalLM.from_pretrained(folder)`` loads; an adapter is merged into
    them, and kept beside them in ``folder/adapter``."""
    with uninstalled(model):
        whole: Any = copy.deepcopy(model) if hasattr(model, "merge_and_unload") else model
        if whole is not model:
            whole.save_pretrained(folder / "adapter")
            whole = whole.merge_and_unload()
        whole.save_pretrained(folder)
