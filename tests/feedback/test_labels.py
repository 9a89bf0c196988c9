"""Label codes are never guessed: a layout defines them, or the user does."""

from __future__ import annotations

import pytest

from trimtab.errors import DataError
from trimtab.feedback.labels import code_of
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Message, Thumb

P = (Message("user", "p"),)


def thumbs(*labels):
    return [{"prompt": "p", "completion": f"c{n}", "label": label} for n, label in enumerate(labels)]


def pairs(*codes):
    return [{"prompt": "p", "response_a": f"a{n}", "response_b": f"b{n}", "winner": c} for n, c in enumerate(codes)]


def test_integers_are_not_booleans_until_somebody_says_so(jsonl):
    with pytest.raises(DataError) as refused:
        read(jsonl(*thumbs(1, 0, 1)))
    assert str(refused.value) == (
        "prefs.jsonl: the codes in \"label\" mean different things in different data sets. Rows per code: '1' 2, '0' 1. "
        'Say what each one means, for example labels={"1": "desirable", "0": "undesirable"}; '
        "known meanings: desirable, undesirable, drop."
    )


@pytest.mark.parametrize("codes", [("yes", "no"), (-1, 1), (1, 2), ("up",), (True, 1)])
def test_other_codes_are_refused_too(jsonl, codes):
    with pytest.raises(DataError, match="mean different things in different data sets"):
        read(jsonl(*thumbs(*codes)))


def test_a_mapping_decides(jsonl):
    reading = read(jsonl(*thumbs(1, 0)), labels={"1": "undesirable", "0": "desirable"})
    assert [r.desirable for r in reading.records] == [False, True]
    # a mapping also overrules what the layout would say
    reading = read(jsonl(*thumbs(True, False)), labels={"True": "undesirable", "false": "desirable"})
    assert [r.desirable for r in reading.records] == [False, True]


def test_codes_of_pairs(jsonl):
    path = jsonl(*pairs(1, 2, 0, 1))
    with pytest.raises(
        DataError, match=r"""codes in "winner" .* '1' 2, '2' 1, '0' 1. .*"1": "first", "2": "second", "0": "tie\""""
    ):
        read(path)
    expected = [
        Comparison(P, "a0", "b0"),
        Comparison(P, "b1", "a1"),
        Comparison(P, "a2", "b2", tie=True),
        Comparison(P, "a3", "b3"),
    ]
    assert read(path, labels={"1": "chosen_first", "2": "second", "0": "tie"}).records == expected


def test_words_speak_for_themselves(jsonl):
    assert [r.tie for r in read(jsonl(*pairs("first", "Tie", "second"))).records] == [False, True, False]


def test_a_code_can_be_dropped_and_is_counted(jsonl):
    reading = read(jsonl(*pairs(1, 2, 3)), labels={"1": "first", "2": "second", "3": "drop"})
    assert (len(reading.records), reading.dropped) == (2, {'label 3, mapped to "drop"': 1})


def test_a_row_without_a_label_is_dropped(jsonl):
    reading = read(jsonl(*thumbs(True, None, False)))
    assert reading.dropped == {'missing column "label"': 1}
    assert reading.records == [Thumb(P, "c0", True), Thumb(P, "c2", False)]


def test_llmbar_codes_are_its_own_but_zero_is_not_among_them(jsonl):
    row = {"input": "p", "output_1": "a", "output_2": "b"}
    assert read(jsonl({**row, "label": 1})).records == [Comparison(P, "a", "b")]
    with pytest.raises(DataError, match="Rows per code: '1' 2, '0' 1"):
        read(jsonl(*({**row, "label": code} for code in (1, 0, 1))))


def test_options_that_cannot_work_are_refused_or_noted(jsonl):
    with pytest.raises(DataError, match='"desireable"} is not a meaning here. .* Did you mean "desirable"?'):
        read(jsonl(*thumbs(1)), labels={"1": "desireable"})
    with pytest.raises(DataError, match='labels= has no effect, because "trl preference" has no label column'):
        read(jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}), labels={"1": "first"})
    notes = read(jsonl(*thumbs(1)), labels={"1": "desirable", "7": "undesirable"}).notes
    assert notes == ['labels= names codes that "label" never holds: 7']


def test_the_message_names_the_column_of_the_file(jsonl):
    path = jsonl({"prompt": "p", "completion": "c", "liked": 1})
    with pytest.raises(DataError, match='the codes in "liked" mean'):
        read(path, columns={"label": "liked"})


@pytest.mark.parametrize(
    ("value", "code"), [(True, "true"), (" TRUE", "true"), (1, "1"), (1.0, "1"), ("1.0", "1"), (0.5, "0.5"), ("A", "a")]
)
def test_one_spelling_per_code(value, code):
    assert code_of(value) == code


def test_not_a_number_is_a_code_like_any_other():
    assert (code_of(float("nan")), code_of(float("inf"))) == ("nan", "inf")
