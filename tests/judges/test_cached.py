"""The cache of judgements: what it gives back, what it does not keep, and what a crash leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.judges.test_base import Scripted, ask
from trimtab.errors import ConfigError, JudgeError
from trimtab.feedback.records import Message
from trimtab.judges.base import Failure, Judgement, Preference, Question, Ranks, Scores
from trimtab.judges.cached import Cached

GIVEN: list[Judgement] = [
    Scores((math.pi, -0.0, 1e-300)),
    Preference(0.1 + 0.2, 0.25, (1 / 3, 2 / 3)),
    Preference(1.0),
    Ranks((2, 1, 2)),
]


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    questions, file = [ask("a", "b", str(i)) for i in range(len(GIVEN))], tmp_path / "kept.jsonl"
    fresh = Cached(Scripted(GIVEN, kind="ranking"), file).judge(questions)
    nobody = Scripted([], kind="ranking")
    again = Cached(nobody, file).judge(questions)
    assert again.judgements == fresh.judgements == tuple(GIVEN)
    assert [str(j) for j in again.judgements] == [str(j) for j in GIVEN]  # -0.0 too
    assert nobody.heard == [] and again.notes == {"from the cache": 4} and not fresh.notes["from the cache"]


def test_only_what_is_new_is_asked_and_equal_questions_once(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    Cached(Scripted([Scores((1.0,)), Scores((2.0,))]), file).judge([ask("a"), ask("b")])
    judge = Scripted([Scores((3.0,)), Scores((4.0,))])
    found = Cached(judge, file).judge([ask("c"), ask("a"), ask("c"), ask("d"), ask("b")])
    assert [q.completions for q in judge.heard] == [("c",), ("d",)]
    assert [j.scores[0] for j in found.judgements if isinstance(j, Scores)] == [3, 1, 3, 4, 2]
    assert len(file.read_text().splitlines()) == 4


def test_the_key_is_the_judge_and_every_character(tmp_path: Path) -> None:
    file, base = tmp_path / "kept.jsonl", ask("a", "b")
    Cached(Scripted([Scores((1.0, 2.0))]), file).judge([base])
    system = Question((Message("system", "Which?"),), ("a", "b"))
    for question in (
        ask("a", "b "),
        ask("ab", ""),
        ask("b", "a"),
        Question((Message("user", "which?"),), ("a", "b")),
        system,
    ):
        judge = Scripted([Scores((0.0, 0.0))])
        Cached(judge, file).judge([question])
        assert judge.heard, question
    other = Scripted([Scores((0.0, 0.0))], identity="another")
    Cached(other, file).judge([base])
    assert other.heard


def test_failures_are_not_kept(tmp_path: Path) -> None:
    file, late = tmp_path / "kept.jsonl", Failure("timeout")
    script = [Scores((1.0, late)), Scores((2.0, 2.0))]
    found = Cached(Scripted(script, stop_after=0.9), file).judge([ask("a", "b"), ask("c", "d"), ask("a", "b")])
    assert found.failed == {"timeout": 2} and len(file.read_text().splitlines()) == 1
    again = Scripted([Scores((1.0, 5.0))])
    assert not Cached(again, file).judge([ask("a", "b"), ask("c", "d")]).failed
    assert [q.completions for q in again.heard] == [("a", "b")]


def test_what_was_judged_before_an_error_is_kept(tmp_path: Path) -> None:
    file, questions = tmp_path / "kept.jsonl", [ask(str(i)) for i in range(40)]
    dying = Scripted([Scores((1.0,))] * 15 + [Failure("no connection")] * 25, stop_after=0.5)
    with pytest.raises(JudgeError, match="failed on 16 of 31"):  # the inner judge's stop_after holds
        Cached(dying, file).judge(questions)
    alive = Scripted([Scores((2.0,))] * 40)
    found = Cached(alive, file).judge(questions)
    assert [q.completions[0] for q in alive.heard] == [str(i) for i in range(15, 40)]
    assert [j.scores[0] for j in found.judgements if isinstance(j, Scores)] == [1.0] * 15 + [2.0] * 25


def test_a_torn_line_is_counted_and_asked_again(tmp_path: Path) -> None:
    """As kill -9 leaves it: the last line has no end. The next line does not grow onto it."""
    file, questions = tmp_path / "kept.jsonl", [ask(x) for x in "abc"]
    Cached(Scripted([Scores((float(i),)) for i in range(3)]), file).judge(questions)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    judge = Scripted([Scores((9.0,))])
    found = Cached(judge, file).judge(questions)
    assert [q.completions for q in judge.heard] == [("c",)]
    assert found.judgements == (Scores((0.0,)), Scores((1.0,)), Scores((9.0,)))
    judge = Scripted([])
    cached = Cached(judge, file)
    assert cached.notes["damaged line of the cache, asked again"] == 1
    assert cached.judge(questions).judgements == found.judgements and not judge.heard
    for line in (
        '{"key": "1"}',
        '{"key": "1", "judgement": {"kind": "loss"}}',
        '{"key": "1", "judgement": {"kind": "scores"}}',
        "[]",
    ):
        file.write_text(line + "\n")
        assert not Cached(judge, file).table, line


def test_where_it_can_be_kept(tmp_path: Path) -> None:
    for place in (tmp_path / "kept.txt", tmp_path / "none" / "kept.jsonl"):
        with pytest.raises(ConfigError, match="kept as .jsonl in a folder that exists"):
            Cached(Scripted([]), place)
    file = tmp_path / "kept.jsonl"
    Cached(Scripted([Scores((1.0,))]), file).judge([ask("half of \ud83d")])
    assert json.loads(file.read_text())["judge"] == "scripted"
