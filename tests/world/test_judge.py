"""Judges: probabilities by hand, rates as asked for, and views that agree with each other."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from trimtab.errors import ConfigError
from trimtab.feedback.records import Comparison, Demonstration, Ranking, Score, Thumb
from trimtab.world.grammar import distinct_prompts, draw_answer, read_prompt
from trimtab.world.judge import PRAISED, Judge
from trimtab.world.named import WORLDS, world
from trimtab.world.utility import utility, word_count

N = 1000


def judged(n: int = N, k: int = 4, seed: int = 0) -> list[tuple[str, list[str]]]:
    rng = Random(seed)
    return [(p, [draw_answer(read_prompt(p), rng) for _ in range(k)]) for p in distinct_prompts(n, seed)]


POOL = judged()


def near(found: float, expected: float, n: int) -> bool:
    """Within four standard errors of a share of n."""
    return abs(found - expected) < 4 * math.sqrt(max(expected * (1 - expected), 1e-9) / n)


def gap(pair: Comparison, judge: Judge) -> float:
    prompt = pair.prompt[0].content
    return judge.score(prompt, pair.chosen) - judge.score(prompt, pair.rejected)


def test_probabilities_by_hand() -> None:
    """Temperature 2, s_1 - s_2 = 1, band 0.5: P(1) = sigma(0.25), P(2) = sigma(-0.75), the rest is a tie."""
    first, second, tie = Judge(temperature=2.0).probabilities([1.0], 0.5)
    assert first[0] == pytest.approx(1 / (1 + math.exp(-0.25)))
    assert second[0] == pytest.approx(1 / (1 + math.exp(0.75)))
    assert first[0] + second[0] + tie[0] == pytest.approx(1)
    certain = Judge(temperature=0.0).probabilities([1.0, 0.4, -1.0], 0.5)
    assert np.array_equal(np.stack(certain, 1), [[1, 0, 0], [0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("judge", [Judge(), Judge(temperature=0.3, tie_rate=0.4), Judge(length_bias=0.1)])
def test_pairs_follow_the_model(judge: Judge) -> None:
    """Outcomes have the mean and, by bins of the predicted probability, the shape of Bradley-Terry or Rao-Kupper."""
    pairs = judge.pairs(POOL, 0)
    gaps = np.array([gap(p, judge) for p in pairs])
    band = judge.band(gaps)
    first, second, tie = judge.probabilities(np.abs(gaps), band)
    better = np.array([not p.tie and g > 0 for p, g in zip(pairs, gaps, strict=True)])
    tied = np.array([p.tie for p in pairs])
    differ = gaps != 0
    for outcome, chance in ((better, first), (tied, tie)):
        for low in np.arange(0, 1, 0.2):
            rows = differ & (chance >= low) & (chance < low + 0.2)
            if rows.sum() > 50:
                assert near(outcome[rows].mean(), chance[rows].mean(), int(rows.sum()))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_tie_rate(rate: float, temperature: float) -> None:
    judge = Judge(tie_rate=rate, temperature=temperature)
    pairs = judge.pairs(POOL, 0)
    share = np.mean([p.tie for p in pairs])
    # without noise many differences are equal, and the band takes all of one size or none
    assert near(share, rate, len(pairs)) or (temperature == 0 and rate <= share < rate + 0.1)
    assert not any(p.tie for p in Judge(temperature=temperature).pairs(POOL, 0))


def test_flips() -> None:
    straight, flipped = Judge().pairs(POOL, 0), Judge(flip=0.2).pairs(POOL, 0)
    turned = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(straight, flipped, strict=True)]
    assert near(np.mean(turned), 0.2, len(turned))
    up, down = Judge().thumbs(POOL, 0), Judge(flip=0.2).thumbs(POOL, 0)
    assert near(np.mean([a.desirable != b.desirable for a, b in zip(up, down, strict=True)]), 0.2, len(up))
    all_turned = zip(Judge().rankings(POOL, 0), Judge(flip=1.0).rankings(POOL, 0), strict=True)
    assert all(tuple(5 - r for r in a.ranks) == b.ranks for a, b in all_turned)


def test_length_bias_prefers_the_longer_one() -> None:
    def longer(judge: Judge) -> float:
        return float(np.mean([word_count(p.chosen) > word_count(p.rejected) for p in judge.pairs(POOL, 0)]))

    assert longer(Judge()) < 0.5 < 0.6 < longer(Judge(length_bias=0.1))
    prompt, answers = POOL[0]
    expected = utility(prompt, answers[0]) + 0.1 * word_count(answers[0])
    assert Judge(length_bias=0.1).score(prompt, answers[0]) == pytest.approx(expected)


def test_certain_judge_is_always_right() -> None:
    judge = Judge(temperature=0.0)
    assert all(gap(p, judge) >= 0 for p in judge.pairs(POOL, 0))
    for ranking in judge.rankings(POOL[:100], 0):
        worth = [judge.score(ranking.prompt[0].content, a) for a in ranking.ranked]
        assert ranking.ranks == tuple(1 + sum(w > v for w in worth) for v in worth)
        assert np.argsort(ranking.scores or ()).tolist() == np.argsort(worth).tolist()


def test_views_are_of_one_judgement() -> None:
    """The pair's winner stands higher in the ranking, and is the demonstration."""
    judge = Judge()
    ranks = {(r.prompt, a): k for r in judge.rankings(POOL, 0) for a, k in zip(r.ranked, r.ranks, strict=True)}
    twice = {p for p, answers in POOL if len(set(answers)) < len(answers)}
    pairs = judge.pairs(POOL, 0)
    clear = [p for p in pairs if p.prompt[0].content not in twice]
    assert all(ranks[p.prompt, p.chosen] < ranks[p.prompt, p.rejected] for p in clear)
    assert [(d.prompt, d.completion) for d in judge.demonstrations(POOL, 0)] == [(p.prompt, p.chosen) for p in pairs]


def test_strengths_and_scores_are_what_was_felt() -> None:
    """The same noise behind all of them: strength = logit of one score - logit of the other."""
    rankings, twice = Judge().rankings(POOL, 0), {p for p, answers in POOL if len(set(answers)) < len(answers)}
    felt = {(r.prompt, a): math.log(s / (1 - s)) for r in rankings for a, s in zip(r.ranked, r.scores or (), strict=True)}
    pairs = [p for p in Judge().pairs(POOL, 0) if p.prompt[0].content not in twice]
    assert all(p.strength == pytest.approx(felt[p.prompt, p.chosen] - felt[p.prompt, p.rejected]) for p in pairs)
    scores = np.array([s.score for s in Judge().scores(POOL, 0)])
    assert len(scores) == 4 * N and scores.mean() == pytest.approx(0, abs=1e-9) and scores.std() == pytest.approx(1)
    z = np.array([math.log(s / (1 - s)) for r in rankings for s in r.scores or ()])
    assert scores == pytest.approx((z - z.mean()) / z.std())


def test_thumbs() -> None:
    thumbs = Judge().thumbs(POOL, 0)
    worth = np.array([utility(t.prompt[0].content, t.completion) for t in thumbs])
    expected = 1 / (1 + np.exp(np.median(worth) - worth))
    assert len(thumbs) == 4 * N and near(np.mean([t.desirable for t in thumbs]), expected.mean(), len(thumbs))
    assert abs(expected.mean() - 0.5) < 0.1
    certain = Judge(temperature=0.0, threshold=1.0).thumbs(POOL, 0)
    assert all(t.desirable == (utility(t.prompt[0].content, t.completion) > 1) for t in certain)
    rare = Judge(keep_desirable=0.1).thumbs(POOL, 0)
    up, down = (sum(t.desirable is side for t in rare) for side in (True, False))
    assert down == sum(not t.desirable for t in thumbs)
    assert near(up / (4 * N - down), 0.1, 4 * N - down)


def test_prompt_shift_parts_the_prompts_of_ups_and_downs() -> None:
    def praised(judge: Judge, up: bool) -> float:
        rows = [t for t in judge.thumbs(POOL, 0) if t.desirable is up]
        return float(np.mean([read_prompt(t.prompt[0].content).kind in PRAISED for t in rows]))

    assert abs(praised(Judge(), True) - praised(Judge(), False)) < 0.1
    # of 100 ups on either half, all and 10 are left: 100 / 110
    assert praised(Judge(prompt_shift=0.9), True) == pytest.approx(1 / 1.1, abs=0.03)
    assert praised(Judge(prompt_shift=0.9), False) == pytest.approx(0.1 / 1.1, abs=0.03)


def test_small_edits_differ_in_one_word() -> None:
    pairs = Judge(edits=1.0).pairs(POOL, 0)
    differing = [sum(a != b for a, b in zip(p.chosen.split(), p.rejected.split(), strict=False)) for p in pairs]
    same_size = [word_count(p.chosen) == word_count(p.rejected) for p in pairs]
    one = [n == 1 and s for n, s in zip(differing, same_size, strict=True)]
    assert np.mean(one) > 0.75  # the others claim nothing that could be changed
    assert np.mean([round(abs(gap(p, Judge())), 6) in (1, 2, 4) for p in pairs]) > 0.75


@pytest.mark.parametrize("kind", [Comparison, Thumb, Ranking, Demonstration, Score])
@pytest.mark.parametrize("name", list(WORLDS))
def test_same_seed_same_feedback(kind: type, name: str) -> None:
    few, judge = POOL[:60], WORLDS[name]
    assert judge.feedback(kind, few, 1) == judge.feedback(kind, few, 1)
    if judge.temperature:
        assert judge.feedback(kind, few, 1) != judge.feedback(kind, few, 2)
    assert all(type(r) is kind for r in judge.feedback(kind, few, 1))


def test_worlds_by_name() -> None:
    assert world("ties,flip=0.2") == Judge(tie_rate=0.4, flip=0.2)
    for wrong, why in {
        "tie": 'Did you mean "ties"',
        "plain,flop=1": 'Did you mean "flip"',
        "plain,flip=x": "expected a number",
        "plain,flip=2": "flip is 2.0; expected 0 to 1",
    }.items():
        with pytest.raises(ConfigError, match=why):
            world(wrong)
