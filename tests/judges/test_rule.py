"""A Python function as judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.judges.test_base import ask
from trimtab.demo.reward import reward
from trimtab.errors import ConfigError
from trimtab.feedback.records import Message
from trimtab.judges.base import Failure, Question, Scores
from trimtab.judges.rule import RuleJudge


def brief(prompt: str, answer: str) -> float:
    return -float(len(answer)) if prompt == "Which?" else 7.0


def odd(prompt: str, answer: str) -> float | None:
    if answer == "none":
        return None
    return 1 / len(answer) if answer != "nan" else float("nan")


def test_a_function_scores() -> None:
    judge = RuleJudge(brief)
    asked = Question((Message("system", "Be kind."), Message("user", "Which?")), ("ab",))
    assert judge.judge([ask("ab", "abc"), asked]).judgements == (Scores((-2.0, -3.0)), Scores((7.0,)))
    heard: list[str] = []
    RuleJudge(lambda prompt, answer: heard.append(prompt) or 0.0).judge([asked])  # type: ignore[func-returns-value]
    assert heard == ["system: Be kind.\n\nuser: Which?"]
    (found,) = (
        RuleJudge(lambda prompt, answer: reward(answer)).judge([ask("Thank you, that is lovely!", "")]).judgements
    )
    assert isinstance(found, Scores) and found.scores[1] == -2.5 < found.scores[0]  # type: ignore[operator]


def test_what_it_raises_is_a_failure() -> None:
    found = RuleJudge(odd, stop_after=1.0).judge([ask("", "none", "nan", "ab")])  # type: ignore[arg-type]
    assert found.failed == {
        "the rule raised ZeroDivisionError": 1,
        "the rule raised TypeError": 1,
        "the score is no finite number": 1,
    }
    (scores,) = found.judgements
    assert isinstance(scores, Scores) and scores.scores[3] == 0.5
    assert isinstance(scores.scores[0], Failure) and scores.scores[0].detail == "division by zero"


def test_functions_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("SIZE = 3\ndef length(prompt, answer):\n    return len(answer)\n")
    assert RuleJudge(f"{file}:length").judge([ask("four")]).judgements == (Scores((4.0,)),)
    assert RuleJudge("tests.judges.test_rule:brief").judge([ask("four")]).judgements == (Scores((-4.0,)),)
    broken = tmp_path / "broken.py"
    broken.write_text("def")
    wrong = {
        "length": "is no function: expected package.module:function or file.py:function",
        f"{tmp_path / 'none.py'}:length": "cannot be imported",
        "no.such.module:length": "cannot be imported: ModuleNotFoundError: No module named 'no'",
        f"{file}:lenght": 'has no function "lenght". Did you mean "length"?',
        f"{broken}:length": "cannot be imported: SyntaxError: ",
        f"{file}:SIZE": 'has no function "SIZE"',
    }
    for name, message in wrong.items():
        with pytest.raises(ConfigError) as e:
            RuleJudge(name)
        assert message in str(e.value)


def test_identity_follows_the_source(tmp_path: Path) -> None:
    file, seen = tmp_path / "mine.py", set()
    for body in ("len(answer)", "-len(answer)"):
        file.write_text(f"def length(prompt, answer):\n    return {body}\n")
        seen.add(RuleJudge(f"{file}:length").identity)
    assert len(seen) == 2
    assert RuleJudge(brief).identity == RuleJudge("tests.judges.test_rule:brief").identity
    with pytest.raises(ConfigError, match="cannot be read, so a cache would not see it change. Pass version."):
        _ = RuleJudge(max).identity  # type: ignore[arg-type]
    assert RuleJudge(max, version="1").identity != RuleJudge(max, version="2").identity  # type: ignore[arg-type]
