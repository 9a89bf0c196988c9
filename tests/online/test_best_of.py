"""`trimtab generate --best_of`: the answer that the judge likes best of those that are sampled, and what is told of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.command import done, trimtab
from tests.judges.server import Reply, serving
from tests.judges.test_endpoint import SHOWN
from tests.tiny_folder import tiny_folder
from trimtab.errors import ConfigError
from trimtab.feedback.records import Message
from trimtab.judges.base import Failure, Question, Ranks, Scores, Verdicts
from trimtab.models import end_tokens, load_model
from trimtab.online.sample import sample
from trimtab.online.select import best
from trimtab.report.text import visible
from trimtab.tokens.template import Template

JUDGE = '''
def letters(prompt, answer):
    """Fails on an answer in three, by its length."""
    if len(answer) % 3 == 0:
        raise ValueError("threes")
    return sum(c.isalpha() for c in answer) / 10

def all_letters(prompt, answer):
    return sum(c.isalpha() for c in answer) / 10

def never(prompt, answer):
    raise ValueError("never")

def only_hi(prompt, answer):
    return 1.0 if prompt == "Hi" else None
'''


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny")
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def drawn(prompt: str, n: int, seed: int = 0, temperature: float = 1.0) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    ids = Template(tokenizer, eos_ids=end_tokens("./tiny")).prompt_ids((Message("user", prompt),))
    more = {"per_prompt": n, "max_new_tokens": 8, "seed": seed, "temperature": temperature}
    (answers,) = sample(load_model("./tiny"), tokenizer, [ids], **more)  # type: ignore[arg-type]
    return [tokenizer.decode(list(a.ids), skip_special_tokens=True) for a in answers]


def worth(text: str) -> float:
    return sum(c.isalpha() for c in text) / 10


COMMON = ("--model", "./tiny", "--max_new_tokens", 8)


@pytest.mark.parametrize(("seed", "temperature"), [(0, 1.0), (3, 1.7)])
def test_the_best_of_what_is_sampled(seed: int, temperature: float) -> None:
    flags = ("--seed", seed, *(("--temperature", temperature) if temperature != 1 else ()))
    told = done("generate", "Hi", "Who?", *COMMON, *flags, "--best_of", 6, "--judge", "rule:judge.py:all_letters")
    scores = [float(s) for s in re.findall(r"\[score (\S+), the best of 6 by rule:judge\.py:all_letters\]", told)]
    wanted = [max(map(worth, drawn(p, 6, seed, temperature))) for p in ("Hi", "Who?")]
    assert scores == pytest.approx(wanted) and sum(wanted) > sum(
        worth(drawn(p, 6, seed, temperature)[0]) for p in ("Hi", "Who?")
    )
    assert "12 of 12 judged. KL from the model's own answers: at most log n - (n - 1)/n = 0.958 nats." in told


def test_what_cannot_be_judged_is_counted_and_not_chosen() -> None:
    told = done("generate", "Hi", *COMMON, "--best_of", 8, "--judge", "rule:judge.py:letters")
    texts = drawn("Hi", 8)
    able = [t for t in texts if len(t) % 3]
    assert 0 < len(able) < 8  # the seed gives some of both
    assert f"[score {max(map(worth, able)):.4g}, the best of 8" in told
    assert re.search(rf"\d of 8 judged; failed: {8 - len(able)} × the rule raised ValueError", told)


def test_a_prompt_without_any_judgement_says_so() -> None:
    told = done("generate", "Hi", "Ho", *COMMON, "--best_of", 2, "--judge", "rule:judge.py:only_hi")
    assert told.count("(no answer could be judged)") == 1 and "[score 1, the best of 2" in told
    assert "[best of 2 by rule:judge.py:only_hi]" in told and "2 of 4 judged" in told
    failed = trimtab("generate", "Hi", *COMMON, "--best_of", 2, "--judge", "rule:judge.py:never").error
    assert failed.startswith("the judge failed on 2 of 2 so far (2 × the rule raised ValueError)")


def test_a_judge_of_pairs_compares_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def more_letters(body: dict[str, Any], _: int) -> Reply:
        answers = dict(SHOWN.findall(body["messages"][0]["content"]))
        a, b = (worth(answers[f"ANSWER {label}"]) for label in "AB")
        return Reply("A", [("A", {"A": 0.9, "B": 0.1} if a > b else {"A": 0.2, "B": 0.8})])

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(more_letters) as server:
        Path("judge.yaml").write_text(f"url: {server.url}\nmodel: m\nprompt: pairwise\n")
        told = done("generate", "Hi", *COMMON, "--best_of", 5, "--judge", "language:judge.yaml")
    assert 0 < len(server.requests) <= 2 * 10  # both orders of each pair
    letters = [worth(text) for text in drawn("Hi", 5)]
    assert sorted(letters)[-1] > sorted(letters)[-2]
    assert visible(drawn("Hi", 5)[letters.index(max(letters))]) in told
    assert "[score 0.85, the best of 5" in told  # it wins by 0.9 where it is shown first and by 0.8 where second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--best_of", 4), "best_of says how many answers are sampled and judge who chooses: pass both, or neither."),
        (("--judge", "rule:judge.py:letters"), "pass both, or neither."),
        (
            ("--best_of", 4, "--judge", "rule:judge.py:letters", "--temperature", 0),
            "temperature 0 gives the same answer",
        ),
    ],
)
def test_refused(flags: tuple[object, ...], message: str) -> None:
    assert message in trimtab("generate", "Hi", *COMMON, *flags).error


def test_without_it_nothing_changes() -> None:
    assert done("generate", "Hi", *COMMON) == f"{drawn('Hi', 1, temperature=0.0)[0]}\n"


def test_the_best_of_each_question() -> None:
    ask = Question((), ("a", "b", "c"))
    said = (Scores((1.0, 2.0, 2.0)), Scores((Failure("gone"), -3.0, Failure("gone"))), Failure("gone"))
    assert best(Verdicts((ask,) * 3, said)) == [(1, 2.0), (1, -3.0), None]
    with pytest.raises(ConfigError, match="this judge gives ranks"):
        best(Verdicts((ask,), (Ranks((1, 2, 3)),)))
