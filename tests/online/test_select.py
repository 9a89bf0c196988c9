"""Choosing among sampled answers: the law of rejection sampling and its limits; in rounds, what is chosen and counted."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from tests.online.test_rounds import here, kill, options, steps  # noqa: F401
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.feedback.read import read
from trimtab.feedback.records import Message, Score
from trimtab.judges.base import Failure, Preference, Question, Scores, Verdicts
from trimtab.online.kept import Kept
from trimtab.online.select import best_of_kl, keep, rejection
from trimtab.run import train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
REWARD, PI = (0.0, 0.4, -0.7, 1.1, 0.5), (0.3, 0.25, 0.2, 0.1, 0.15)  # of five answers that a policy gives


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law(beta: float, n: int, candidates: int, draws: int) -> Counter[int]:
    """How often each kind of answer is accepted, n of so many candidates from PI, in so many draws."""
    chance, found = random.Random(1), Counter[int]()
    for seed in range(draws):
        kinds = chance.choices(range(5), PI, k=candidates)
        found.update(kinds[i] for i in rejection([REWARD[k] for k in kinds], n, beta, noise(seed)))
    return found


@pytest.mark.parametrize(("beta", "n"), [(0.5, 1), (0.5, 4), (0.2, 1), (2.0, 2)])
def test_what_is_accepted_follows_the_tilted_policy(beta: float, n: int) -> None:
    """n << N: pi(y) exp(r(y) / beta) / Z by a chi-square test, at each temperature and place; not pi, and not exp(r / beta)."""
    draws = 4000 // n
    found = law(beta, n, candidates=400, draws=draws)
    tilted = [p * math.exp(r / beta) for p, r in zip(PI, REWARD, strict=True)]
    seen = [found[k] for k in range(5)]
    assert sum(seen) == draws * n

    def p_value(law: list[float]) -> float:
        return float(stats.chisquare(seen, [draws * n * q / sum(law) for q in law]).pvalue)

    assert p_value(tilted) > 0.01
    for other in (
        list(PI),
        [math.exp(r / beta) for r in REWARD],
        [p * math.exp(r) for p, r in zip(PI, REWARD, strict=True)],
    ):
        assert p_value(other) < 1e-6


def test_a_beta_near_0_takes_the_best() -> None:
    chance = random.Random(3)
    scores = [chance.gauss(0, 1) for _ in range(40)]
    best = sorted(range(40), key=lambda i: -scores[i])
    for n in (1, 5, 40):
        for beta in (1e-9, 1e-300):
            assert rejection(scores, n, beta, noise(n)) == best[:n]  # in this order: the best goes first


def test_a_large_beta_takes_any_and_not_the_first() -> None:
    """Uniform over places by a chi-square test; the authors' code would take places 0 and 1 every time."""
    scores = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    found = Counter(i for seed in range(2000) for i in rejection(scores, 2, 1e9, noise(seed)))
    assert stats.chisquare([found[i] for i in range(6)]).pvalue > 0.01


def test_all_of_them_each_once() -> None:
    """A tiny acceptance rate ends all the same: each pass accepts the best that is left."""
    scores = [-1e6 * i for i in range(30)]
    assert rejection(scores, 30, 1.0, noise(0)) == list(range(30))
    assert sorted(rejection([1.0] * 7, 7, 1.0, noise(0))) == list(range(7))
    assert rejection(scores, 3, 1.0, noise(5)) == rejection(scores, 3, 1.0, noise(5))


@pytest.mark.parametrize(
    ("n", "beta", "message"),
    [
        (4, 1.0, "rejection sampling of 4 from 3 candidates: expected at least 1, and no more than there are"),
        (0, 1.0, "rejection sampling of 0 from 3 candidates"),
        (2, 0.0, "rejection sampling at beta=0.0: expected a finite number above 0"),
        (2, math.inf, "rejection sampling at beta=inf"),
        (2, math.nan, "rejection sampling at beta=nan"),
    ],
)
def test_refused(n: int, beta: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rejection([1.0, 2.0, 3.0], n, beta, noise(0))


def test_candidates_are_different_and_judged() -> None:
    """ "a" and "a " are one candidate, which keeps its first place; a failure is none; what was not judged at all stays."""
    ask = tuple(Question((Message("user", u),), ("a", "b", "a ", "c")) for u in "pqr")
    gone = Failure("gone")
    said = (Scores((1.0, 3.0, 1.0, 2.0)), Scores((1.0, gone, 1.0, 2.0)), gone)
    kept, short = keep(Verdicts(ask, said), 3, 1e-9, 0, 0)
    assert [q.completions for q in kept.questions] == [("b", "c", "a"), ("c", "a"), ask[2].completions]
    assert kept.judgements == (Scores((3.0, 2.0, 1.0)), Scores((2.0, 1.0)), gone) and short == 2
    with pytest.raises(
        ConfigError, match="choosing among answers needs a score for each, and this judge gives preference"
    ):
        keep(Verdicts(ask[:1], (Preference(0.5),)), 2, 1.0)


def test_the_lot_depends_on_seed_round_and_prompt() -> None:
    answers, scores = tuple("abcdefgh"), Scores((0.0,) * 8)

    def chosen(prompt: str, *seed: int) -> tuple[str, ...]:
        kept, _ = keep(Verdicts((Question((Message("user", prompt),), answers),), (scores,)), 3, 1.0, *seed)
        return kept.questions[0].completions

    assert chosen("p", 0, 1) == chosen("p", 0, 1)
    assert len({chosen("p", 0, 1), chosen("p", 0, 2), chosen("p", 1, 1), chosen("q", 0, 1)}) == 4


def test_the_bound_of_best_of_n() -> None:
    assert best_of_kl(1) == 0 and best_of_kl(4) == pytest.approx(1.3863 - 0.75, abs=1e-4)


# --- rounds ---------------------------------------------------------------------------------------------------------------

CHOSEN = {"answers": 12, "keep_answers": 3, "keep_beta": 0.1, "pairs": "all", "judge": "rule:graded.py:graded"}


@pytest.fixture(autouse=True)
def judge(here: Path) -> None:  # noqa: F811
    """Few scores alike; an answer in four cannot be judged."""
    (here / "graded.py").write_text(
        "def graded(prompt, answer):\n    return sum(map(ord, answer)) % 101 / 100 if len(answer) % 4 else 1 / 0\n"
    )


def test_rounds_learn_from_the_chosen_alone() -> None:
    """4 prompts, 12 answers each, 3 kept: 12 records, 12 pairs; the mean of what is kept is higher, and all is on disk."""
    folder = train(resolve(options("dpo", output="run", **CHOSEN)))
    logged = steps(folder)
    assert len(logged) == 2 * 6
    kept = Kept(folder / "rounds" / "0001")
    records = read(str(kept.records)).records
    assert 4 * 2 <= len(records) <= 4 * 3 and all(isinstance(r, Score) for r in records)
    assert max(Counter(r.prompt for r in records).values()) == 3
    assert all(len(d.answers) == 12 for d in kept.drawn().values())
    assert sum(len(j.scores) for j in kept.judged().values() if isinstance(j, Scores)) == 48
    told = json.loads((kept.folder / "round.json").read_text())
    assert told["kept/reward"] == pytest.approx(sum(r.score for r in records) / len(records))  # type: ignore[attr-defined]
    assert told["kept/reward"] > told["reward"] + 0.1 and logged[0]["kept/reward"] == told["kept/reward"]
    assert told["kept/short"] == sum(n < 3 for n in Counter(r.prompt for r in records).values())
    assert told["judge/failed"] > 0


def test_fewer_candidates_than_wanted_are_all_kept_and_counted() -> None:
    """Two bytes at most: some of 12 answers read alike."""
    more = {**CHOSEN, "keep_answers": 11, "rounds": 1, "sample_tokens": 2}
    del more["pairs"]
    folder = train(resolve(options("kto", output="run", **more)))
    kept = Kept(folder / "rounds" / "0001")
    sizes = Counter(r.prompt for r in read(str(kept.records)).records)
    short = sum(n < 11 for n in sizes.values())
    assert json.loads((kept.folder / "round.json").read_text())["kept/short"] == short > 0


def test_killed_and_resumed_chooses_the_same() -> None:
    values = options(
        "dpo",
        rounds=4,
        prompts_per_round=6,
        save_every=3,
        **{**CHOSEN, "batch_size": 6, "judge": "rule:judge.py:vowels"},
    )
    whole = train(resolve({**values, "output": "whole"}))
    kill({**values, "output": "killed"}, "learning", 5)
    resumed = train(resolve({**values, "output": "killed", "resume": True}))
    for a in sorted(whole.glob("rounds/*/records.jsonl")):
        assert a.read_bytes() == (resumed / a.relative_to(whole)).read_bytes()
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
