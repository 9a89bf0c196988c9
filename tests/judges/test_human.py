"""A person who judges through a file, blinded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.judges.test_base import ask
from trimtab.errors import DataError, JudgeError
from trimtab.judges.base import Preference, Ranks
from trimtab.judges.human import HumanJudge, read_order

PAIRS = [ask(f"good {i}", f"bad {i}") for i in range(40)]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answer(file: Path, says: Any) -> None:
    file.write_text("".join(json.dumps({**r, "answer": says(r)}) + "\n" for r in rows(file)))


def test_a_person_answers_and_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    with pytest.raises(JudgeError, match=r"20 × waiting for an answer.*pairs\.jsonl: fill in"):
        HumanJudge(file).judge(PAIRS)
    assert len(rows(file)) == 40 and set(rows(file)[0]) == {"id", "prompt", "A", "B", "answer"}
    # this person always finds the good one, wherever it stands, and leaves five out
    left = {r["id"] for r in rows(file)[:5]}
    answer(file, lambda r: "" if r["id"] in left else "A" if r["A"].startswith("good") else "b > a")
    found = HumanJudge(file).judge(PAIRS)
    assert found.failed == {"waiting for an answer": 5}
    assert {j for j in found.judgements if isinstance(j, Preference)} == {Preference(1.0)}
    assert found.outcome == {"wins": 35, "ties": 0, "losses": 0, "win_rate": 1.0}


def test_places_and_lines_are_blinded_by_the_seed(tmp_path: Path) -> None:
    layouts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        file = tmp_path / f"{name}.jsonl"
        HumanJudge(file, seed=seed, stop_after=1.0).judge(PAIRS)
        layouts.append([r["A"] for r in rows(file)])
    assert layouts[0] == layouts[1] != layouts[2]
    first = sum(text.startswith("good") for text in layouts[0])
    assert 10 <= first <= 30, "the good answer stands first about half of the time"
    assert [text.split()[1] for text in layouts[0]] != [str(i) for i in range(40)], "the lines have another order"


def test_new_questions_are_added_and_old_answers_stay(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    HumanJudge(file, stop_after=1.0).judge(PAIRS[:2])
    answer(file, lambda r: "tie")
    file.write_text(file.read_text().rstrip("\n"))  # an editor that leaves no line break at the end
    found = HumanJudge(file, stop_after=1.0).judge([*PAIRS[:3], PAIRS[2]])
    assert found.judgements[:2] == (Preference(0.5, 1.0),) * 2 and found.failed == {"waiting for an answer": 2}
    assert [r["answer"] for r in rows(file)] == ["tie", "tie", ""]


def test_rankings(tmp_path: Path) -> None:
    file, question = tmp_path / "lists.jsonl", ask("one", "two", "three", "four")
    HumanJudge(file, "ranking", stop_after=1.0).judge([question])
    at = {r[x]: x for r in rows(file) for x in "ABCD"}
    answer(file, lambda r: f"{at['three']} > {at['one']}={at['four']} > {at['two']}")
    assert HumanJudge(file, "ranking").judge([question]).judgements == (Ranks((2, 4, 1, 2)),)


def test_answers_and_lines_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    HumanJudge(file, stop_after=1.0).judge(PAIRS[:1])
    for wrong in ("C", "both", "A > A", "A B", "A > B > C", "A >"):
        answer(file, lambda r, wrong=wrong: wrong)
        with pytest.raises(JudgeError, match=r'1 × answer that cannot be read.*says ".*"; expected such as A > B'):
            HumanJudge(file).judge(PAIRS[:1])
    assert read_order(" b = A ", "AB") == [["B", "A"]] and read_order("a", "ABC") is None
    with file.open("a") as end:
        end.write('{"id": 3\n')
    with pytest.raises(DataError, match=r'pairs\.jsonl row 2: it cannot be read.*expected one JSON object with "id"'):
        HumanJudge(file).judge(PAIRS[:1])
