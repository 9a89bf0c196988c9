"""Make the world's model again: ``python -m trimtab.world.train --output FOLDER`` (a few minutes on one core).

A byte-pair tokenizer is trained on dialogues from the grammar, then a small Llama on the same text, by trimtab's own
engine and its SFT objective. Same seed, versions and kind of processor: same weights; elsewhere floating point may
differ in the last digit, and the model is then another one of the same kind.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from trimtab.feedback.records import Demonstration, Message
from trimtab.logprobs.score import Scorer, install
from trimtab.objectives.sft import SFT
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template
from trimtab.update.trainer import Update
from trimtab.update.weights import save_weights
from trimtab.world.grammar import draw_answer, draw_prompt, read_prompt
from trimtab.world.model import FOLDER

SEED = 7
VOCAB = 2400  # every word of the world is one token then
REPEAT, STEPS, BATCH, LEARNING_RATE = 700, 1100, 32, 2e-3
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def dialogues(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompt and answer, ``n`` times."""
    rng = Random(f"dialogues {seed}")
    for _ in range(n):
        prompt = draw_prompt(rng)
        yield prompt, draw_answer(read_prompt(prompt), rng)


def repetitions(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts, answered by all their facts in some order. Copying is hard to learn from answers that are often wrong:
    without these first, 5 % of the stated facts were right after 1,000 steps, which is chance."""
    rng = Random(f"repetitions {seed}")
    for _ in range(n):
        prompt = draw_prompt(rng)
        facts = list(read_prompt(prompt).facts.items())
        yield prompt, " ".join(f"The {a} is {v}." for a, v in rng.sample(facts, len(facts)))


def make_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs: any text has tokens, and most words of the world are one."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [USER, ASSISTANT, END]
    trainer: Any = trainers.BpeTrainer
    pairs.train_from_iterator(
        text, trainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=pairs,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=special[:2],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT
    return made


def encode(pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Dialogues as token ids."""
    template = Template(tokenizer)
    return [template.encode(Demonstration((Message("user", p),), a)) for p, a in pairs]


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Untrained; 1.6 million parameters."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def pretrain(model: nn.Module, examples: list[Example], steps: int, seed: int, progress: Any = None) -> float:
    """Maximum likelihood of the answers; returns the mean loss in nats per token over the last tenth of the steps."""
    install(model, torch.float32, "shared")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.01,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        scorer = Scorer(model, "shared", 8192)
        trainer = Update(model, SFT(), scorer, None, examples, BATCH, args, callbacks=progress or [])
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return float(sum(losses[-2:]) / len(losses[-2:]))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.world.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    started = time.perf_counter()
    pairs = list(dialogues(asked.steps * BATCH, asked.seed))
    tokenizer = make_tokenizer([part for pair in pairs for part in pair])
    first, examples = encode(repetitions(REPEAT * BATCH, asked.seed), tokenizer), encode(pairs, tokenizer)
    model = make_model(tokenizer, asked.seed)
    size = sum(p.numel() for p in model.parameters())
    tokens = sum(e.tokens for e in examples) / len(examples)
    print(f"{size:,} parameters, {len(tokenizer):,} tokens, {len(examples):,} dialogues of {tokens:.0f} tokens")
    pretrain(model, first, REPEAT, asked.seed)
    loss = pretrain(model, examples, asked.steps, asked.seed)
    save_weights(model.half(), asked.output)
    tokenizer.save_pretrained(asked.output)
    note = {
        "made by": "python -m trimtab.world.train",
        "seed": asked.seed,
        "steps": [REPEAT, asked.steps],
        "parameters": size,
        "nats per answer token": round(loss, 4),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "torch": torch.__version__,
        "licence": "Apache-2.0",
    }
    (asked.output / "model.safetensors").chmod(0o644)  # written as private
    (asked.output / "made.json").write_text(json.dumps(note, indent=2) + "\n")
    print(json.dumps(note))


if __name__ == "__main__":
    main()
