"""A tiny Llama with a byte-level tokenizer and chat template in a folder, and small feedback files. Nothing is fetched.

>>> model = tiny_folder(tmp_path / "model")                      # doctest: +SKIP
>>> data = feedback_file(tmp_path / "pairs.jsonl", "comparison", 24)    # doctest: +SKIP
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, START, END = "<s>", "</s>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
KINDS = ("comparison", "ties", "thumb", "demonstration", "ranking", "score", "solution", "prompt")


def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and no merges: any text becomes tokens, one per byte."""
    special = (BOS, EOS, START, END, "<|system|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate((*special, *alphabet))}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=list(special[2:]),
        model_max_length=512,
    )
    fast.chat_template = TEMPLATE
    return fast


def workplace(folder: Path, monkeypatch: pytest.MonkeyPatch, **config: object) -> Path:
    """Work in ``folder`` from here on, with the model ``./model``; what trimtab caches goes there, too."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRIMTAB_HOME", str(folder / "home"))
    return tiny_folder(folder / "model", **config)  # type: ignore[arg-type]


def tiny_folder(path: Path, seed: int = 0, **config: object) -> Path:
    """Write model and tokenizer to ``path`` (about 60 kB); any ``from_pretrained`` opens it."""
    words = tokenizer()
    torch.manual_seed(seed)
    values = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.eos_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**values, **config}))
    ids = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def feedback_file(path: Path, kind: str, n: int, seed: int = 0) -> Path:
    """``n`` rows in canonical form, distinct prompts, mixed lengths. ``ties``: comparisons of which every third is a tie."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(rng.randint(1, most)))

    rows = []
    for i in range(n):
        prompt = [{"role": "user", "content": f"{i}: {words(5)}?"}]
        a, b, c = (f"{x}{words(4)}" for x in "ABC")  # the first letter keeps the answers apart
        said: dict[str, object]
        match kind:
            case "comparison" | "ties":
                said = {"chosen": a, "rejected": b, "tie": kind == "ties" and i % 3 == 2, "strength": 0.5 + i % 5 / 10}
            case "thumb":
                said = {"completion": a, "desirable": i % 2 == 0}
            case "demonstration":
                said = {"completion": a}
            case "ranking":
                ranks = rng.sample([1, 2, 3], 3)
                said = {"ranked": [a, b, c], "ranks": ranks, "scores": [(4 - r) / 3 for r in ranks]}
            case "score":
                said = {"completion": a, "score": rng.random()}
            case "solution":
                said = {"steps": [a, b, c], "labels": [1, i % 2, rng.random()]}
            case "prompt":
                said = {}
            case _:
                raise ValueError(f"{kind} is none of {', '.join(KINDS)}")
        rows.append({"kind": "comparison" if kind == "ties" else kind, "prompt": prompt, **said})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
