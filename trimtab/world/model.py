"""The world's own model, and its answers: what feedback is given on.

The folder ``model`` beside this file is a Llama of 1.6 million parameters, made by :mod:`trimtab.world.train`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from trimtab.feedback.records import Message
from trimtab.models import home, load_model, load_tokenizer
from trimtab.online import sample as sampling
from trimtab.tokens.template import Template
from trimtab.update.weights import no_dropout
from trimtab.world.grammar import WORDS, distinct_prompts

FOLDER = Path(__file__).with_name("model")
MAX_NEW_TOKENS = 72  # all but about one answer in a thousand end before
ROWS = 512  # sampled side by side


@dataclass(frozen=True)
class Pool:
    """Prompts and the start model's answers to them, for one seed.

    Attributes:
        train: prompts to give feedback on, each with its answers.
        held_out: other prompts, to evaluate on, each with its answers.
    """

    train: list[tuple[str, list[str]]]
    held_out: list[tuple[str, list[str]]]


def load_start() -> nn.Module:
    """The start model in float32, dropout off."""
    model: nn.Module = load_model(FOLDER, dtype=torch.float32)
    no_dropout(model)
    return model


@cache
def template() -> Template:
    """Its chat template and tokenizer, shared: nobody may change it."""
    return new_template()


def new_template() -> Template:
    """One to add tokens to."""
    return Template(load_tokenizer(FOLDER))


@cache
def fingerprint() -> str:
    """Hash of the files that the model is loaded from, and of the words of the grammar."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (*sorted(FOLDER.iterdir()), WORDS):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def prompt_ids(prompt: str) -> tuple[int, ...]:
    """Token ids that an answer is sampled from."""
    return tuple(template().prompt_ids((Message("user", prompt),)))


def answers(
    model: nn.Module, prompts: Sequence[tuple[int, ...]], per_prompt: int, seed: int
) -> list[list[tuple[int, ...]]]:
    """Token ids of sampled answers, ``per_prompt`` for each prompt; under one seed every model meets the same noise."""
    tokenizer = template().tokenizer
    drawn = sampling.sample(
        model, tokenizer, prompts, per_prompt=per_prompt, max_new_tokens=MAX_NEW_TOKENS, seed=seed, rows=ROWS
    )
    return [[answer.ids for answer in row] for row in drawn]


def text(ids: Sequence[int]) -> str:
    """An answer as text."""
    return str(template().tokenizer.decode(list(ids), skip_special_tokens=True))


def pool(seed: int, prompts: int, answers_each: int, held_out: int, held_out_answers: int) -> Pool:
    """Sampled once for each seed and size, then read from disk (``trimtab.models.home()/world``)."""
    said: dict[str, Any] = {
        "seed": seed,
        "prompts": [prompts, answers_each],
        "held_out": [held_out, held_out_answers],
        "model": fingerprint(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": [hashlib.blake2b(Path(str(f)).read_bytes()).hexdigest() for f in (__file__, sampling.__file__)],
    }
    wanted = distinct_prompts(prompts + held_out, seed)
    # the prompts' own text is in the key: another grammar is another pool
    key = hashlib.blake2b(json.dumps([said, wanted]).encode(), digest_size=16).hexdigest()
    file = home() / "world" / f"{key}.json"
    if file.exists():
        return Pool(**{k: [(p, a) for p, a in v] for k, v in json.loads(file.read_text()).items()})
    model, found = load_start(), Pool([], [])
    parts = (found.train, wanted[:prompts], answers_each, seed), (found.held_out, wanted[prompts:], held_out_answers, evaluation_seed(seed))  # fmt: skip  # noqa: E501
    for part, texts, each, noise in parts:
        drawn = answers(model, [prompt_ids(p) for p in texts], each, noise)
        part += [(p, [text(a) for a in row]) for p, row in zip(texts, drawn, strict=True)]
    _write(file, json.dumps(asdict(found)))
    return found


def evaluation_seed(seed: int) -> int:
    """The sampling noise of a seed's evaluation, the same before and after training and for all methods."""
    return seed + 1_000_000


def _write(file: Path, content: str) -> None:
    """Whole or not at all: two processes may make the same pool at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".part")
    with os.fdopen(handle, "w") as f:
        f.write(content)
    os.replace(temporary, file)
