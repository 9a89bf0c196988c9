"""A tiny random Llama, a byte-level tokenizer with a chat template, and random feedback: what most tests run on."""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trimtab.feedback.records import Comparison, Demonstration, Message, Ranking, Record, Thumb
from trimtab.tokens.batch import Example

VOCAB = 97


def model(dtype: torch.dtype = torch.float64, seed: int = 0, **config: object) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, weights large enough that every token matters."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    llama = LlamaForCausalLM(LlamaConfig(**{**values, **config}))
    for module in list(llama.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                # transformers' own norm computes in float32, which shows as 6e-8 in a float64 gradient
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                setattr(module, name, norm)
    return llama.to(dtype).eval()


def examples(kind: type[Record], n: int = 6, k: int = 2, seed: int = 0, ties: bool = False) -> list[Example]:
    """``n`` examples of mixed lengths over random tokens, labels drawn too."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randrange(2, 14)))
        count = {Comparison: 2, Ranking: k}.get(kind, 1)
        answers = tuple((*(rng.randrange(3, VOCAB) for _ in range(rng.randrange(0, 9))), 2) for _ in range(count))
        said = (Message("user", f"prompt {i}"),)
        record: Record
        if kind is Comparison:
            record = Comparison(said, "a", "b", tie=ties and rng.random() < 0.4)
        elif kind is Thumb:
            record = Thumb(said, "a", desirable=rng.random() < 0.5)
        elif kind is Ranking:
            record = Ranking(said, tuple("abcdefgh"[:k]), tuple(range(1, k + 1)))
        else:
            record = Demonstration(said, "a")
        out.append(Example(prompt, answers, record))
    return out
