"""Answers of a file judged again: what is asked, what is written, and agreement with the file's own labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import done, trimtab
from trimtab.errors import ConfigError, FeedbackKindError
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Message, Prompt, Ranking, Score, Thumb
from trimtab.judges.base import Failure, Judge, Judgement, Preference, Question
from trimtab.judges.label import label
from trimtab.judges.named import named_judge
from trimtab.judges.rule import RuleJudge


def said(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


@dataclass
class Longer(Judge):
    """P(the longer one is better) = 0.9; the word "fail" is a failure."""

    kind = "pairwise"
    identity = "longer"

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        for q in questions:
            a, b = map(len, q.completions)
            failed = "fail" in q.completions
            yield Failure("said fail") if failed else Preference(0.5 if a == b else 0.9 if a > b else 0.1)


PAIRS = [
    Comparison(said("1"), "long one", "short"),
    Comparison(said("2"), "a", "bbb"),
    Comparison(said("3"), "xy", "zw"),
    Comparison(said("4"), "fail", "fine"),
    Comparison(said("5"), "four", "five!", tie=True),
]


def test_a_judge_of_pairs() -> None:
    found = label(PAIRS, Longer())
    made = [(r.chosen, r.rejected) for r in found.records]  # type: ignore[attr-defined]
    assert made[:2] == [("long one", "short"), ("bbb", "a")] and made[3] == ("five!", "four")
    assert set(made[2]) == {"xy", "zw"} and [r.tie for r in found.records] == [False, False, True, False]  # type: ignore[attr-defined]
    assert [r.strength for r in found.records] == pytest.approx([0.9, 0.9, 0.5, 0.9])  # type: ignore[attr-defined]
    # right, wrong, neither; the failure and the file's own tie are not compared
    assert found.compared == 3 and found.agreement is not None and found.agreement.value == pytest.approx(0.5)
    assert found.account.dropped == {"said fail": 1}
    assert "agreement with 3 comparisons of the file" in str(found)


def test_a_judge_of_answers_sees_each_once() -> None:
    judge = RuleJudge(lambda prompt, answer: float(len(answer)))
    found = label([*PAIRS, Comparison(said("1"), "short", "tiny"), Thumb(said("6"), "up", True)], judge)
    assert {(r.prompt[0].content, r.completion, r.score) for r in found.records} >= {
        ("1", "tiny", 4.0),
        ("6", "up", 2.0),
    }  # type: ignore[attr-defined]
    assert len(found.records) == 12 and all(isinstance(r, Score) for r in found.records)
    # 8 > 5; 1 < 3; 2 = 2; 4 = 4; 5 > 4
    assert found.compared == 5 and found.agreement is not None
    assert found.agreement.value == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)


def test_the_order_of_a_question_does_not_give_the_label_away() -> None:
    """Chosen first in every question would be read off the place."""
    asked: list[Question] = []

    @dataclass
    class Listens(Longer):
        def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
            asked.extend(questions)
            return super().judgements(questions)

    label([Comparison(said(str(i)), f"chosen {i}", f"rejected {i}") for i in range(60)], Listens())
    assert 15 < sum(q.completions[0].startswith("chosen") for q in asked) < 45


def test_what_cannot_be_judged() -> None:
    with pytest.raises(FeedbackKindError, match="prompt records hold no answers that could be judged"):
        label([Prompt(said("1"))], Longer())
    with pytest.raises(FeedbackKindError, match="a judge of pairs needs a file of comparisons"):
        label([Ranking(said("1"), ("a", "b"), (1, 2))], Longer())


# --- by name, and from the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory. Name a YAML file"),
        ("- a", "expected options with their values, and among them model"),
        ("model: m\nurl: http://localhost:1/v1\ntimeouts: 3", 'the option "timeouts" has no effect on a language model behind'),
        ("model: m\nretries: 3", "has no effect on a language model in this process (url is not given)"),
        ("model: m\nurl: http://localhost:1/v1\nprompt: pairwise\nclamp: [0.4, 0.6]", "asks for no reasons"),
    ],
)  # fmt: skip
def test_a_language_judge_that_cannot_be(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        named_judge(f"language:{file}")
    assert message in str(caught.value)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text("def brief(prompt, answer):\n    return -len(answer)\n")
    rows = [{"prompt": f"{i}?", "chosen": "yes" + i * "!", "rejected": "no"} for i in range(4)]
    Path("prefs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ("judge", "prefs.jsonl", "--judge", "rule:judge.py:brief", "--out", "labels.jsonl", "--cache", "c.jsonl")
    told = done(*words)
    assert "8 of 8 judged" in told and "agreement with 4 comparisons of the file" in told and "0.000" in told
    records = read("labels.jsonl").records
    assert len(records) == 8 and {r.score for r in records} == {-2.0, -3.0, -4.0, -5.0, -6.0}  # type: ignore[attr-defined]
    assert "× from the cache" in done(*words)
    assert trimtab("judge", "prefs.jsonl", "--judge", "me", "--out", "x.jsonl").error.startswith(
        'judge is "me"; expected rule:'
    )
    told = done("judge", "prefs.jsonl", "--judge", "human:ask.jsonl", "--out", "waiting.jsonl")
    assert "4 × waiting for an answer" in told and not Path("waiting.jsonl").exists()
    lines = [json.loads(line) for line in Path("ask.jsonl").read_text().splitlines()]
    Path("ask.jsonl").write_text("".join(json.dumps({**line, "answer": "A"}) + "\n" for line in lines))
    assert "4 of 4 judged" in done("judge", "prefs.jsonl", "--judge", "human:ask.jsonl", "--out", "human.jsonl")
