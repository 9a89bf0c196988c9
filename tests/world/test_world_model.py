"""The world's model: what is committed is a small Llama that answers well and badly, and its answers are repeatable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.feedback.records import Demonstration, Message
from trimtab.logprobs.score import choose_layout
from trimtab.world import model as world_model
from trimtab.world import train
from trimtab.world.grammar import claims, distinct_prompts, read_prompt
from trimtab.world.utility import terms, utility


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))


def test_it_is_small() -> None:
    model = world_model.load_start()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1.5e6 <= sum(p.numel() for p in model.parameters()) <= 2e6
    size = sum(f.stat().st_size for f in world_model.FOLDER.iterdir() if f.suffix == ".safetensors")
    assert 3e6 <= size <= 4e6
    assert 2000 <= len(world_model.template().tokenizer) <= 4000


def test_fast_layout_equals_its_own_forward_pass() -> None:
    examples = [world_model.template().encode(r) for r in _demonstrations(4)]
    assert choose_layout(world_model.load_start(), examples, "shared").mode == "shared"


def _demonstrations(n: int) -> list[Demonstration]:
    return [Demonstration((Message("user", p),), a) for p, a in train.dialogues(n, seed=5)]


def test_answers_are_diverse_finished_and_good_and_bad() -> None:
    drawn = world_model.pool(0, prompts=48, answers_each=4, held_out=2, held_out_answers=2).train
    rows = [(p, a) for p, answers in drawn for a in answers]
    worth = np.array([utility(p, a) for p, a in rows])
    assert len({a for _, a in rows}) > 150
    assert worth.std() > 1 and (worth > 2).any() and (worth < -1).any()
    assert np.mean([terms(p, a).unfinished < 0 for p, a in rows]) < 0.03
    said = [(values, read_prompt(p).facts[a]) for p, text in rows for a, values in claims(read_prompt(p), text).items()]
    right = np.mean([values == [truth] for values, truth in said if values])
    assert 0.4 < right < 0.8  # it copies from the prompt, and not always


def test_pool_is_cached_and_repeatable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = world_model.pool(1, 4, 2, 3, 2)
    assert [len(a) for _, a in first.train] == [2] * 4 and [len(a) for _, a in first.held_out] == [2] * 3
    assert not {p for p, _ in first.train} & {p for p, _ in first.held_out}
    with monkeypatch.context() as m:
        m.setattr(world_model, "load_start", lambda: pytest.fail("sampled again"))
        assert world_model.pool(1, 4, 2, 3, 2) == first
    for file in (tmp_path / "world").iterdir():
        file.unlink()
    assert world_model.pool(1, 4, 2, 3, 2) == first != world_model.pool(2, 4, 2, 3, 2)


def test_rows_see_the_same_noise_whatever_the_model() -> None:
    """A model that differs in nothing but a hair gives nearly the same answers."""
    prompts, model = [world_model.prompt_ids(p) for p in distinct_prompts(12, 0)], world_model.load_start()
    before = world_model.answers(model, prompts, 2, 3)
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-6)
    after = world_model.answers(model, prompts, 2, 3)
    assert np.mean([a == b for a, b in zip(before, after, strict=True)]) > 0.8
    assert np.mean([a == b for a, b in zip(before, world_model.answers(model, prompts, 2, 4), strict=True)]) < 0.2


def test_the_script_that_made_it_runs(tmp_path: Path) -> None:
    pairs = list(train.dialogues(64, 0))
    tokenizer = train.make_tokenizer([part for pair in pairs for part in pair])
    template = train.Template(tokenizer)
    examples = [template.encode(Demonstration((Message("user", p),), a)) for p, a in pairs]
    model = train.make_model(tokenizer, 0)
    early = train.pretrain(model, examples, 2, 0)
    assert train.pretrain(model, examples, 6, 0) < early
