"""The weights that learn: dropout off, an adapter on, and a folder that transformers loads at the end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.logprobs.score import base_model, reward_head, uninstalled
from trimtab.logprobs.sharded import is_sharded, whole


def no_dropout(model: nn.Module) -> None:
    """Preference objectives compare two forward passes of one text: dropout would be noise between them."""
    parts: list[Any] = [
        *model.modules(),
        base_model(model).config.get_text_config(),
    ]  # some layers ask the configuration
    for part in parts:
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in [n for n, value in vars(part).items() if "drop" in n and isinstance(value, float)]:
            setattr(part, name, 0.0)


def with_adapter(model: nn.Module, rank: int, alpha: int, targets: str, new_tokens: Sequence[int] = ()) -> nn.Module:
    """A LoRA adapter on the model without dropout. ``targets``: ``all-linear`` or names separated by commas.

    ``new_tokens``: ids whose embeddings are trained too; nothing else could give a new token a meaning. The head of a
    reward model is trained whole.
    """
    from peft import LoraConfig, get_peft_model

    modules = targets if targets == "all-linear" else targets.split(",")
    more = {"trainable_token_indices": list(new_tokens)} if new_tokens else {}
    task = "SEQ_CLS" if reward_head(model) is not None else "CAUSAL_LM"  # of peft, which then trains and keeps the head
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules, task_type=task, **more)
    adapted: nn.Module = get_peft_model(model, lora)
    return adapted


def nf4() -> Any:
    """Weights of 4 bits, multiplied in bfloat16 (Dettmers et al. 2023, "QLoRA", 3)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are held in 4 bits."""
    return getattr(base_model(model), "is_quantized", False)


def _unquantised(adapted: Any, adapter: Path) -> Any:
    """The adapter on its model in bfloat16: merged into weights of 4 bits, what it learned would be rounded to them."""
    if not is_quantised(adapted):
        return adapted
    from peft import PeftModel

    return PeftModel.from_pretrained(adapted.unload().dequantize(), adapter)


def save_weights(model: nn.Module, folder: Path, write: bool = True) -> None:
    """Write full weights that plain ``AutoModelForCausalLM.from_pretrained(folder)`` loads (a reward model:
    ``AutoModelForSequenceClassification``); an adapter is merged into them, and kept beside them in ``folder/adapter``.

    ``write``: False on the other processes of a run; those of a sharded model must call this, and give their shards."""
    adapted = hasattr(model, "merge_and_unload")
    with uninstalled(model), whole(model):
        if not write:
            return
        saved: Any = copy.deepcopy(model) if adapted or is_sharded(model) else model
        if adapted:
            # the embedding of a new padding token is 0 and stays so: the adapter goes on the model without it
            # (that of trained control tokens is saved, grown as it is)
            grown = getattr(saved.active_peft_config, "trainable_token_indices", None) is not None
            more = {"save_embedding_layers": grown} if grown or reward_head(model) is not None else {}
            saved.save_pretrained(folder / "adapter", **more)
            saved = _unquantised(saved, folder / "adapter").merge_and_unload()
        saved.save_pretrained(folder)
        if reward_head(saved) is not None:  # it generates nothing, but what ends an answer must be known to score one
            base_model(saved).generation_config.save_pretrained(folder)
