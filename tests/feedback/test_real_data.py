"""The public files under TRIMTAB_DATA: every one is recognised, and its counts are those that were counted by hand."""

from __future__ import annotations

import pytest

from trimtab.feedback.convert import convert
from trimtab.feedback.read import read, write

# file, layout, kind, rows, records, dropped
FILES = [
    (
        "hh-rlhf/harmless-base-test.jsonl.gz",
        "hh-rlhf transcript",
        "Comparison",
        2312,
        2303,
        {"chosen and rejected do not share the prompt": 5, "empty completion": 4},
    ),
    ("finegrained-qa-feedback/dev_feedback.json", "finegrained comparisons", "Comparison", 500, 3000, {}),
    ("halueval/general_data.json", "halueval", "Thumb", 4507, 4507, {}),
    ("gsm8k/train.jsonl", "question and answer", "Demonstration", 7473, 7473, {}),
    ("gsm8k/example_model_solutions.jsonl", "gsm8k graded solutions", "Thumb", 1319, 5276, {}),
    ("truthfulqa/finetune_truth.jsonl", "truthfulqa judge", "Thumb", 22434, 22367, {"empty completion": 67}),
    ("self-instruct/seed_tasks.jsonl", "self-instruct seed tasks", "Demonstration", 175, 175, {}),
    ("hhh-alignment/hhh_alignment_eval.json", "hhh grading prompts", "Comparison", 221, 221, {}),
    ("llmbar/natural.json", "llmbar", "Comparison", 100, 100, {}),
    ("llmbar/adversarial_GPTInst.json", "llmbar", "Comparison", 92, 92, {}),
    ("llmbar/adversarial_GPTOut.json", "llmbar", "Comparison", 47, 47, {}),
    ("llmbar/adversarial_Manual.json", "llmbar", "Comparison", 46, 46, {}),
    ("llmbar/adversarial_Neighbor.json", "llmbar", "Comparison", 134, 134, {}),
    ("llamafactory/dpo_en_demo.json", "sharegpt preference", "Comparison", 300, 300, {}),
    ("llamafactory/kto_en_demo.json", "messages thumb", "Thumb", 300, 300, {}),
    ("zh/llamafactory/dpo_zh_demo.json", "sharegpt preference", "Comparison", 300, 300, {}),
    ("zh/halluqa/HalluQA.json", "halluqa", "Comparison", 450, 4893, {}),
    ("zh/cvalues/cvalues_responsibility_prompts.jsonl", "prompt only", "Prompt", 664, 664, {}),
]


@pytest.mark.parametrize(("name", "shape", "kind", "rows", "records", "dropped"), FILES, ids=[f[0] for f in FILES])
def test_a_public_file_is_read_in_full_and_survives_a_round_trip(
    real, tmp_path, name, shape, kind, rows, records, dropped
):
    reading = read(real(name))
    assert (reading.shape, reading.kind.__name__, reading.rows) == (shape, kind, rows)
    assert (len(reading.records), reading.dropped) == (records, dropped)
    write(reading.records, tmp_path / "x.jsonl")
    assert read(tmp_path / "x.jsonl").records == reading.records


@pytest.mark.parametrize(
    ("name", "up"),
    [
        ("halueval/general_data.json", 3692),
        ("llamafactory/kto_en_demo.json", 150),
        ("gsm8k/example_model_solutions.jsonl", 2001),
    ],
)
def test_as_many_thumbs_up_as_were_counted(real, name, up):
    assert sum(r.desirable for r in read(real(name)).records) == up


def test_hh_rlhf_prompts_end_with_the_human(real):
    records = read(real("hh-rlhf/harmless-base-test.jsonl.gz")).records
    assert {r.prompt[0].role for r in records} == {"user"}
    assert not any("\n\nAssistant:" in text or "\n\nHuman:" in text for r in records for text in r.completions)
    assert read(real("hh-rlhf/harmless-base-test.jsonl.gz")).examples["empty completion"] == [87, 517, 926, 1104]


def test_finegrained_ties_and_rankings(real):
    path = real("finegrained-qa-feedback/dev_feedback.json")
    pairs = read(path).records
    assert sum(r.tie for r in pairs) == 384
    rankings = read(path, shape="finegrained ranking")
    assert rankings.dropped == {"judgements that no ranking agrees with": 22}
    assert sum(len(set(r.ranks)) == 4 for r in rankings.records) == 298  # a full strict order
    # The ranking, paired again, says what the people said.
    again, _ = convert(rankings.records, to="comparison")
    rows = {r.origin.row for r in rankings.records}
    said = {(r.origin.row, r.tie, frozenset(r.completions) if r.tie else r.completions) for r in pairs}
    made = {(r.origin.row, r.tie, frozenset(r.completions) if r.tie else r.completions) for r in again}
    assert made == {item for item in said if item[0] in rows}


def test_gsm8k_solutions_pair_up(real):
    thumbs = read(real("gsm8k/example_model_solutions.jsonl")).records
    pairs, _ = convert(thumbs, to="comparison")
    assert (len(pairs), len({r.prompt for r in pairs})) == (2429, 731)
