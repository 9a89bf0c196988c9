"""Recipes of online procedures: each resolves, says where its values come from, and runs two rounds on a tiny model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.judges.server import Reply, serving
from tests.judges.test_endpoint import SHOWN
from tests.online.test_rounds import card, here, options, steps  # noqa: F401
from trimtab.config import load_yaml, resolve
from trimtab.errors import ConfigError
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Score
from trimtab.judges.base import Scores
from trimtab.judges.records import rankings
from trimtab.online.kept import Kept
from trimtab.run import plan, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FOLDER = Path(__file__).parents[2] / "trimtab" / "recipes" / "online"
RECIPES = sorted(FOLDER.glob("*.yaml"))
NAMES = [
    "bco_detector", "d2o_self", "dno", "iterative_dpo", "oaif", "online_kto", "online_todo", "pairwise_cringe", "rso", "slic_hf",
    "sppo",
]  # fmt: skip
IN_PAIRS = {"dno", "oaif", "online_todo", "sppo"}  # who need a judge of pairs
RULE = "def mixed(prompt, answer):\n    return sum(map(ord, answer)) % 97 / 97\n"


def likes(body: dict[str, Any], _: int) -> Reply:
    """P by the sum of the letters; the place shown first gets 0.1 more. One pair in some is a tie."""
    answers = dict(SHOWN.findall(body["messages"][0]["content"]))
    first, second = (sum(map(ord, answers[f"ANSWER {label}"])) % 5 for label in "AB")
    p = 0.55 + 0.1 * (first - second)
    return Reply("A", [("A", {"A": p, "B": 1 - p})])


@contextmanager
def judge(pairs: bool) -> Iterator[str]:
    """A name of one that fits."""
    if not pairs:
        Path("mixed.py").write_text(RULE)
        yield "rule:mixed.py:mixed"
        return
    with serving(likes) as server:
        Path("judge.yaml").write_text(f"url: {server.url}\nmodel: m\nprompt: pairwise\n")
        yield "language:judge.yaml"


def tiny(name: str, **more: Any) -> dict[str, Any]:
    """The recipe with sizes of a test; what it is about stays."""
    said = load_yaml(str(FOLDER / f"{name}.yaml"))
    small = {k: v for k, v in options(said["method"]).items() if k not in ("answers", "finetune", "judge")}
    found = {
        **said,
        **small,
        "learning_rate": 0.01,
        "answers": min(said["answers"], 12),
        "output": "run",
        "sample_tokens": 8,
    }
    if "max_length" in said:
        found["max_length"] = 256
    if "reference_every" in said:
        config = resolve({**found, "judge": "rule:x:y", **more})
        found["reference_every"] = plan(config).steps(config.objective().feedback.record)
    return {**found, **more}


def test_all_are_here() -> None:
    assert [r.stem for r in RECIPES] == NAMES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_each_resolves_and_says_where_values_come_from(recipe: Path) -> None:
    config = resolve({"data": "x.jsonl"}, str(recipe))
    assert set(load_yaml(str(recipe))) <= config.flat().keys(), "an option without effect"
    head, *lines = recipe.read_text().splitlines()
    assert head.startswith("# ") and re.search(r"arXiv:\d{4}\.\d{5}", recipe.read_text())
    for line in lines:
        assert line.lstrip().startswith("#") or line.startswith("method: ") or re.search(r"  # \S", line), line
    if config.reference_every is not None:
        assert config.reference_every == plan(config).steps(config.objective().feedback.record)


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_two_rounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge(name in IN_PAIRS) as who:
        values = tiny(name, judge=who)
        config = resolve(values)
        folder = train(config)
    logged, size = steps(folder), plan(config).steps(config.objective().feedback.record)
    assert card(folder)["status"] == "finished" and len(logged) == 2 * size
    assert all(math.isfinite(r["loss"]) for r in logged)
    for number in ("0001", "0002"):
        kept = Kept(folder / "rounds" / number)
        assert all(len(d.answers) == config.answers for d in kept.drawn().values())
        records = read(str(kept.records)).records
        assert {type(r) for r in records} == {Comparison if config.answers == 2 else Score}
        told = json.loads((kept.folder / "round.json").read_text())
        assert ("kept/short" in told) == (name == "rso")
        if name == "rso":
            assert len(records) <= 4 * 8 and told["kept/reward"] > told["reward"]
    if config.reference_every is not None:
        # the reference is the policy that wrote the round's answers: no margin at its start, one after a step
        assert [abs(logged[i]["rewards/margins"]) < 1e-6 for i in (0, size, size + 1)] == [True, True, False]


def test_ties_of_the_judge_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band of 0.1 around 1/2 after both orders: the tie is a record, and TODO's batch has it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge(True) as who:
        folder = train(resolve(tiny("online_todo", judge=who, prompts_per_round=12, sample_tokens=3)))
    pairs = [r for n in ("0001", "0002") for r in read(str(folder / "rounds" / n / "records.jsonl")).records]
    ties = [r.tie for r in pairs if isinstance(r, Comparison)]
    assert 0 < sum(ties) < len(ties)
    assert all(
        isinstance(r, Comparison) and r.strength is not None and (r.strength <= 0.6 + 1e-9) == r.tie for r in pairs
    )


def test_win_rates_of_dno_are_means_over_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strength of a pair is the difference of two win rates, which the option says, too."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge(True) as who:
        folder = train(resolve(tiny("dno", judge=who, rounds=1)))
        found = "that of the better answer of a pair is here"
        with pytest.raises(ConfigError, match=f"dno has strength: probability, and {found} how far its score"):
            train(resolve(tiny("dno", judge=who, output="sure", strength="probability")))
        with pytest.raises(ConfigError, match=f"dno has strength: reward_difference, and {found} the probability"):
            train(resolve(tiny("dno", judge=who, output="two", answers=2)))
    for said in Kept(folder / "rounds" / "0001").judged().values():
        assert isinstance(said, Scores) and sum(s for s in said.scores if isinstance(s, float)) == pytest.approx(2.5)


def test_the_worst_of_equals_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """D2O would push all answers down where none is worse: such prompts give no list."""
    Path("mixed.py").write_text(
        "def one_prompt(p, a):\n    return float(len(a)) if p.startswith(('1', '0')) else 0.0\n"
    )
    seen = []
    from trimtab.online.rounds import Rounds

    made = Rounds._records
    monkeypatch.setattr(
        Rounds, "_records", lambda self, own, scores: seen.append((own, made(self, own, scores))) or seen[-1][1]
    )
    train(resolve(tiny("d2o_self", judge="rule:mixed.py:one_prompt", prompts_per_round=18, rounds=1)))
    ((own, records),) = seen
    assert 0 < len(records) < 18 and len(rankings(own)[0]) == 18
    assert all(len(set(r.ranks)) > 1 for r in records)
