"""read(): every layout, every refusal in its words, every dropped row with a count and a reason."""

from __future__ import annotations

import pytest

from trimtab.errors import DataError
from trimtab.feedback.read import read, write
from trimtab.feedback.records import (
    Comparison,
    Demonstration,
    Message,
    Origin,
    Prompt,
    Ranking,
    Score,
    Solution,
    Thumb,
)

P = (Message("user", "p"),)
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "p"), ("assistant", "a"), ("assistant", "b")))
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}
HH = "\n\nHuman: p\n\nAssistant: m\n\nHuman: q\n\nAssistant: "
HH_PROMPT = (Message("user", "p"), Message("assistant", "m"), Message("user", "q"))
WIN = Comparison(P, "a", "b")

LAYOUTS = [
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "trl preference", WIN),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "trl preference", WIN),
    (
        {"prompt": "p", "prompt_id": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        "trl preference",
        WIN,
    ),
    (
        {"prompt": "p", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        "trl preference",
        Comparison((Message("system", "s"), *P), "a", "b"),
    ),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "tie": True}, "trl preference", Comparison(P, "a", "b", tie=True)),
    (
        {"prompt": "p", "chosen": "a", "rejected": "a ", "is_tie": True},
        "trl preference",
        Comparison(P, "a", "a ", True),
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 1.5},
        "trl preference",
        Comparison(P, "a", "b", strength=2.5),
    ),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "trl preference, implicit prompt", WIN),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "trl preference, implicit prompt",
        Comparison((Message("user", "The sky is"),), " blue.", " green."),
    ),
    ({"chosen": HH + "yes", "rejected": HH + "no"}, "hh-rlhf transcript", Comparison(HH_PROMPT, "yes", "no")),
    (
        {"prompt": HH.rstrip(), "chosen": " yes", "rejected": " no"},
        "hh-rlhf transcript, prompt given",
        Comparison(HH_PROMPT, " yes", " no"),
    ),
    (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}, "system": "s"},
        "sharegpt preference",
        Comparison((Message("system", "s"), *P), "a", "b"),
    ),
    (
        {"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"},
        "alpaca preference",
        Comparison((Message("user", "p\nq"),), "a", "b"),
    ),
    ({"messages": [USER, GOOD], "rejected_response": "b"}, "ms-swift preference", WIN),
    ({"input": "p", "output_1": "b", "output_2": "a", "label": 2}, "llmbar", WIN),
    ({"prompt": "p", "completion": "a", "label": True}, "trl thumb", Thumb(P, "a", True)),
    ({"prompt": "p", "completion": [BAD], "label": "False"}, "trl thumb", Thumb(P, "b", False)),
    ({"messages": [USER, GOOD], "label": False}, "messages thumb", Thumb(P, "a", False)),
    ({"conversations": [HUMAN, GPT], "kto_tag": True}, "sharegpt thumb", Thumb(P, "a", True)),
    ({"instruction": "p", "input": "", "output": "a", "kto_tag": False}, "alpaca thumb", Thumb(P, "a", False)),
    ({"user_query": "p", "chatgpt_response": "a", "hallucination": "no"}, "halueval", Thumb(P, "a", True)),
    ({"prompt": "Q: p\nA: a\nTrue:", "completion": " no"}, "truthfulqa judge", Thumb(P, "a", False)),
    ({"prompt": "p", "completion": "a", "score": 3}, "scores", Score(P, "a", 3.0)),
    ({"messages": [USER, GOOD], "reward": -0.5}, "messages score", Score(P, "a", -0.5)),
    ({"prompt": "p", "completions": ["a"], "scores": [1.5]}, "score list", Score(P, "a", 1.5)),
    ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2.0]}, "ranking", Ranking(P, ("a", "b"), (1, 2))),
    ({"prompt": "p", "completion": "a"}, "trl prompt and completion", Demonstration(P, "a")),
    ({"messages": [USER, GOOD]}, "messages", Demonstration(P, "a")),
    ({"conversations": [HUMAN, GPT]}, "sharegpt", Demonstration(P, "a")),
    (
        {"instruction": "p", "output": "a", "history": [["h", "i"]]},
        "alpaca",
        Demonstration((Message("user", "h"), Message("assistant", "i"), *P), "a"),
    ),
    (
        {"instruction": "p", "instances": [{"input": "", "output": "a"}]},
        "self-instruct seed tasks",
        Demonstration(P, "a"),
    ),
    ({"question": "p", "answer": "a"}, "question and answer", Demonstration(P, "a")),
    (
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, 0, 0.25]},
        "trl stepwise",
        Solution(P, ("a", "b", "c"), (1.0, 0.0, 0.25)),
    ),
    ({"prompt": "p", "domain_en": "physics", "id_": 7}, "prompt only", Prompt(P)),
    ({"Question": "p", "Best Answer1": "a", "Wrong_Answer1": "b"}, "halluqa", WIN),
]


@pytest.mark.parametrize(("row", "shape", "record"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_layout_is_recognised_and_read(jsonl, row, shape, record):
    reading = read(jsonl(row))
    assert (reading.shape, reading.records) == (shape, [record])
    assert reading.records[0].origin == Origin("prefs.jsonl", 1)


def test_a_record_of_every_kind_is_read_back_as_it_was_written(tmp_path):
    kinds = [
        [Comparison(P, "a", "b"), Comparison(P, "a", "a", tie=True), Comparison(P, " ä\u2028", "b\r\n", strength=0.25)],
        [Thumb(P, "a", True), Thumb(P, "b", False)],
        [Ranking(P, ("a", "b", "c"), (1, 2, 2))],
        [Score(P, "a", 0.1), Score(P, "b", 2)],
        [Solution(P, ("a", "b"), (1.0, 0.5)), Solution(P, ("c",), (0.0,))],
        [Demonstration((Message("system", ""), Message("user", "你好"), Message("tool", "")), "a")],
        [Prompt(P)],
    ]
    for records in kinds:
        for name in ("x.jsonl", "x.jsonl.gz"):
            write(records, tmp_path / name)
            reading = read(tmp_path / name)
            assert (reading.records, reading.shape, reading.dropped) == (records, "trimtab", {})


def test_writing_is_atomic_and_repeatable(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    write([WIN], path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r'x.jsonl.gz: record 2 could not be read back: "rejected" is empty'):
        write([WIN, Comparison(P, "a", " ")], path)
    write([WIN], tmp_path / "y.jsonl.gz")
    assert before == path.read_bytes() == (tmp_path / "y.jsonl.gz").read_bytes()
    assert before[4:8] == b"\0\0\0\0"  # gzip's time stamp, left out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl.gz", "y.jsonl.gz"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match="x.jsonl cannot be written: No space left on device"):
        write([WIN], tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_can_be_read_by_people_and_half_a_surrogate_survives(tmp_path):
    records = [Demonstration((Message("user", "你好"),), "ü"), Demonstration(P, "\ud83d")]
    write(records, tmp_path / "x.jsonl")
    assert '"你好"' in (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert read(tmp_path / "x.jsonl").records == records


def test_writing_refuses_what_reading_would_not_find(tmp_path):
    with pytest.raises(DataError, match=r"x.csv: feedback is written as .jsonl or .jsonl.gz"):
        write([WIN], tmp_path / "x.csv")
    with pytest.raises(DataError, match="there are no records to write"):
        write([], tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="cannot be written: No such file or directory"):
        write([WIN], tmp_path / "absent" / "x.jsonl")
    with pytest.raises(DataError, match='"strength" is nan'):
        write([Comparison(P, "a", "b", strength=float("nan"))], tmp_path / "x.jsonl")


# -- rows that cannot be used ----------------------------------------------------------------------------------------


def test_refuse_names_file_row_columns_and_the_fix(jsonl):
    good, twin = {"prompt": "p", "chosen": "a", "rejected": "b"}, "x" * 212
    path = jsonl(*[good] * 1283, {"prompt": "p", "chosen": f"{twin} ", "rejected": f"\n{twin}"})
    with pytest.raises(DataError) as refused:
        read(path, bad_rows="refuse")
    assert str(refused.value) == (
        'prefs.jsonl row 1,284: "chosen" equals "rejected" after stripping whitespace (both 212 characters). '
        'A pair must differ: drop the row, or label it "tie": true.'
    )


BAD_ROWS = [
    ({"prompt": "p", "chosen": "a", "rejected": "a "}, "chosen equals rejected"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ({"prompt": [SYSTEM, {"role": "user", "content": ""}], "chosen": "a", "rejected": "b"}, "empty prompt"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt"),
    ({"prompt": "p", "chosen": "a", "rejected": "\n"}, "empty completion"),
    ({"prompt": "p", "chosen": "a", "rejected": "a", "tie": "no idea"}, 'wrong type in "tie"'),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, 'wrong type in "prompt"'),
    ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, 'wrong type in "rejected"'),
    ({"prompt": "p", "chosen": "a"}, 'missing column "rejected"'),
    ({"prompt": "p", "chosen": None, "rejected": "b"}, 'missing column "chosen"'),
    ({"prompt": "p", "chosen": [GOOD, USER], "rejected": "b"}, "last message not from the assistant"),
    ({"prompt": "p", "chosen": [BAD, USER, GOOD, GOOD], "rejected": "b"}, "completion does not continue the prompt"),
    ({"prompt": "p", "chosen": [{"role": "critic", "content": "a"}], "rejected": "b"}, "unknown role"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("inf")}, "not a finite number"),
    (["not", "a", "row"], "row is not an object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_counted_with_its_reason_and_number(jsonl, row, reason):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    reading = read(jsonl(good, row, good))
    assert (reading.rows, len(reading.records)) == (3, 2)
    assert (reading.dropped, reading.examples) == ({reason: 1}, {reason: [2]})
    with pytest.raises(DataError, match=r"^prefs.jsonl row 2: "):
        read(jsonl(good, row, good), bad_rows="refuse")


def test_when_every_row_is_bad_the_error_counts_why(jsonl):
    with pytest.raises(DataError) as refused:
        read(jsonl({"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "", "chosen": "a", "rejected": "b"}))
    assert str(refused.value) == (
        'prefs.jsonl: none of 2 rows can be used as "trl preference". chosen equals rejected: 1 (first in row 1); '
        "empty prompt: 1 (first in row 2). Correct them, or pass shape=."
    )


def test_examples_stop_at_five_rows_but_counts_do_not(jsonl):
    bad = {"prompt": "", "chosen": "a", "rejected": "b"}
    reading = read(jsonl({**bad, "prompt": "p"}, *[bad] * 9))
    assert (reading.dropped["empty prompt"], reading.examples["empty prompt"]) == (9, [2, 3, 4, 5, 6])
    assert str(reading).splitlines()[1] == "  dropped 9: empty prompt (rows 2, 3, 4, 5, 6)"


def test_rankings_that_are_not_rankings(jsonl):
    def of(ranks, completions=("a", "b")):
        return {"prompt": "p", "completions": list(completions), "ranks": ranks}

    rows = [of([1, 2]), of([1]), of([0, 1]), of([1, 2.5]), of([1, 2], ("a", "a ")), of([True, 2])]
    reading = read(jsonl(*rows))
    assert reading.records == [Ranking(P, ("a", "b"), (1, 2))]
    assert reading.dropped == {
        "ranks do not fit completions": 1,
        "rank below 1": 1,
        'wrong type in "ranks"': 2,
        "one completion at two ranks": 1,
    }


def test_solutions_whose_labels_do_not_fit(jsonl):
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [1, 0]}
    bad = [
        {**row, "labels": [1]},
        {**row, "labels": [1, 2]},
        {**row, "labels": [1, -1]},
        {**row, "completions": ["a", " "]},
    ]
    assert read(jsonl(row, *bad)).dropped == {
        "labels do not fit steps": 1,
        "label outside 0 to 1": 2,
        "empty completion": 1,
    }


def test_one_bad_item_does_not_cost_the_others_of_its_row(jsonl):
    reading = read(jsonl({"prompt": "p", "completions": ["a", "", "c"], "scores": [1, 2, None]}))
    assert reading.records == [Score(P, "a", 1.0)]
    assert reading.dropped == {"empty completion": 1, 'wrong type in "scores"': 1}


def test_contradictions_are_kept_and_noted_or_refused(jsonl):
    pair, turned = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}
    reading = read(jsonl(pair, turned))
    assert len(reading.records) == 2
    assert reading.notes == ["1 pair judged in two ways (rows 1 and 2)."]
    with pytest.raises(DataError, match=r"^prefs.jsonl: 1 pair judged in two ways \(rows 1 and 2\). Keep one of them"):
        read(jsonl(pair, turned), bad_rows="refuse")
    thumbs = [{"prompt": "p", "completion": "a", "label": up} for up in (True, False)]
    assert read(jsonl(*thumbs)).notes == ["1 completion both up and down (rows 1 and 2)."]


# -- columns and layouts ---------------------------------------------------------------------------------------------


def test_unknown_columns_get_what_was_found_the_nearest_layout_and_the_fix(jsonl):
    with pytest.raises(DataError) as refused:
        read(jsonl({"prompt": "p", "chosn": "a", "rejected": "b"}))
    message = str(refused.value)
    assert message.startswith(
        "prefs.jsonl: the columns found fit no known layout. Found: prompt, chosn, rejected. "
        'Nearest: "trl preference" (prompt, chosen, rejected), which lacks chosen. '
        'Rename with columns={"chosen": "chosn"}. Known: "trimtab" (kind, prompt); '
    )
    assert '"sharegpt preference" (conversations, chosen, rejected)' in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "better": "a", "worse": "b"}, "which lacks chosen, rejected"),
        ({"foo": "p", "bar": "a"}, "None of them resembles a column of a known layout"),
        ({"prompt": "p", "completion": "a", "rating": 1}, r'"rating" beside them would be ignored, and bad answers'),
        ({"question": "p", "chosen": "I do", "rejected": "I am"}, r'pass columns=\{"prompt": "question"\}'),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "completion": "c", "label": True},
            r'fits several layouts: "trl preference" .* -> comparison, "trl thumb" .* -> thumb. Say which one',
        ),
    ],
)
def test_nothing_that_was_said_is_read_past(jsonl, row, message):
    with pytest.raises(DataError, match=message):
        read(jsonl(row))


def test_a_stray_row_of_another_layout_does_not_decide(jsonl):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    reading = read(jsonl(pair, {"prompt": "p", "completion": "a", "label": 1}, pair))
    assert (reading.shape, reading.dropped) == ("trl preference", {'missing column "chosen"': 1})
    assert reading.notes == ["columns not used: completion, label"]


def test_columns_are_renamed_and_a_rename_without_effect_is_refused(jsonl):
    path = jsonl({"question": "p", "better": "a", "worse": "b"})
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert read(path, columns=names).records == [WIN]
    with pytest.raises(DataError, match=r'no column "beter" .* Did you mean "better"\? Found: question, better, worse'):
        read(path, columns={**names, "chosen": "beter"})
    with pytest.raises(DataError, match="the other way round"):
        read(path, columns={"question": "prompt"})
    with pytest.raises(DataError, match=r'columns=\{"mood": ...\} has no effect'):
        read(jsonl({"prompt": "p", "chosen": "a", "rejected": "b", "x": 1}), columns={"mood": "x"})


def test_a_named_layout_is_read_or_refused(jsonl):
    path = jsonl({"prompt": "p", "completion": "a", "rating": 1})
    reading = read(path, shape="trl prompt and completion")
    assert (reading.records, reading.notes) == ([Demonstration(P, "a")], ["columns not used: rating"])
    with pytest.raises(DataError, match='shape="trl thum" is not known. Did you mean "trl thumb"?'):
        read(path, shape="trl thum")
    with pytest.raises(
        DataError, match='lacks label, which shape="trl thumb" needs. Columns found: prompt, completion'
    ):
        read(path, shape="trl thumb")


def test_records_of_several_kinds_are_refused_with_their_counts(jsonl):
    with pytest.raises(DataError, match="several kinds: 2 thumb, 1 score. .* Write one file per kind"):
        read(jsonl(*(r.to_json() for r in (Thumb(P, "a", True), Score(P, "a", 1.0), Thumb(P, "b", False)))))


def test_finegrained_pairs_and_ranking(jsonl):
    row = {"question": "q", "passages": [["T", "One.", "Two."]], "preference": [1, 1, 0, 0, 2, 2]}
    path = jsonl(row | {f"prediction {n}": f"p{n}" for n in (1, 2, 3, 4)})
    pairs = read(path).records
    assert pairs[0].prompt[0].content == "T\n\nOne. Two.\n\nQuestion: q"
    assert [(r.chosen, r.rejected, r.tie) for r in pairs] == [
        ("p1", "p2", False),
        ("p1", "p3", False),
        ("p1", "p4", True),
        ("p2", "p3", True),
        ("p4", "p2", False),
        ("p4", "p3", False),
    ]
    ranking = read(path, shape="finegrained ranking").records[0]
    assert (ranking.ranked, ranking.ranks) == (("p1", "p2", "p3", "p4"), (1, 3, 3, 1))
    row["preference"] = [0, 1, 0, 0, 0, 0]  # 1 = 2 and 2 = 3, but 1 > 3: pairs yes, a ranking no
    path = jsonl(row | {f"prediction {n}": f"p{n}" for n in (1, 2, 3, 4)})
    assert len(read(path).records) == 6
    with pytest.raises(DataError, match="judgements that no ranking agrees with: 1"):
        read(path, shape="finegrained ranking")


def test_limit_and_options_out_of_range(jsonl):
    path = jsonl(*[{"prompt": "p", "chosen": "a", "rejected": "b"}] * 5)
    assert read(path, limit=3).rows == 3
    with pytest.raises(DataError, match="limit=0 reads no rows"):
        read(path, limit=0)
    with pytest.raises(DataError, match='bad_rows="ignore" is not known. Known: drop, refuse'):
        read(path, bad_rows="ignore")
    with pytest.raises(DataError, match='split="test" has no effect on the file'):
        read(path, split="test")
