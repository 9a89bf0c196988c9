"""Conversions: what comes out, what is counted, what is said to be lost, and which are refused."""

from __future__ import annotations

import copy

import pytest

from trimtab.errors import ConfigError, FeedbackKindError
from trimtab.feedback import convert as c
from trimtab.feedback.records import (
    Comparison,
    Demonstration,
    Message,
    Origin,
    Prompt,
    Ranking,
    Score,
    Thumb,
)

P, Q = (Message("user", "p"),), (Message("user", "q"),)
RANKING = Ranking(P, ("c", "a", "b", "d"), (3, 1, 1, 4))
SCORES = [Score(P, "a", 1.0), Score(P, "b", 3.0), Score(P, "c", 2.9), Score(Q, "z", 5.0)]
PAIRS = [Comparison(P, "a", "b"), Comparison(P, "b", "c"), Comparison(P, "c", "d", tie=True)]


def words(pairs):
    return [f"{r.chosen}{'=' if r.tie else '>'}{r.rejected}" for r in pairs]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("all", ["a=b", "a>c", "a>d", "b>c", "b>d", "c>d"]),
        ("adjacent", ["a=b", "b>c", "c>d"]),
        ("best-worst", ["a>d"]),
    ],
)
def test_rankings_to_comparisons(pairs, expected):
    out, account = c.rankings_to_comparisons([RANKING], pairs=pairs)
    assert words(out) == expected
    assert {r.strength for r in out} == {None}  # only an order was given
    assert (account.count_in, account.count_out, account.parameters) == (1, len(expected), {"pairs": pairs})


def letters(text, values, prompt=P):
    return [Score(prompt, c, v) for c, v in zip(text, values, strict=True)]


def test_the_best_against_any_other():
    """Exact: one pair each, the best always in it, and over many prompts each other answer in a third of them."""
    records = [r for i in range(900) for r in letters("abcd", (2, 5, 1, 3), (Message("user", f"{i}"),))]
    out, account = c.scores_to_comparisons(records, pairs="best-random")
    assert account.count_out == 900 and {r.chosen for r in out} == {"b"}
    drawn = [sum(r.rejected == other for r in out) for other in "acd"]
    assert sum(drawn) == 900 and all(abs(n - 300) < 60 for n in drawn)  # 4 deviations
    assert {r.strength for r in out if r.rejected == "c"} == {4.0}


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
def test_a_tournament_has_a_match_less_than_players(size):
    """Everybody but the champion loses once; who lost plays no more; by value the champion is the best."""
    text, pairings = "abcdefghijklm"[:size], set()
    for i in range(60):
        records = letters(text, range(size), (Message("user", f"{i}"),))
        out, _ = c.scores_to_comparisons(records, pairs="tournament")
        assert len(out) == size - 1 and all(r.chosen > r.rejected and r.strength > 0 for r in out)
        assert sorted(r.rejected for r in out) == list(text[:-1])  # each loses exactly once
        lost_at = {r.rejected: n for n, r in enumerate(out)}
        assert all(lost_at.get(r.chosen, size) > n for n, r in enumerate(out))
        rounds = sum(text[-1] in (r.chosen, r.rejected) for r in out)
        assert rounds <= (size - 1).bit_length()  # a knockout: the champion meets log2 of them at most
        pairings.add(tuple(words(out)))
    assert len(pairings) > 1 or size == 2


def test_lots_depend_on_the_content_alone():
    """Other prompts around them, another order of the file: the same pairs; ranks or scores: the same, too."""
    mine, others = letters("abcdef", (3, 9, 1, 4, 7, 5)), letters("xyz", (1, 2, 3), Q)
    for rule in ("best-random", "tournament"):
        alone = words(c.scores_to_comparisons(mine, pairs=rule)[0])
        among = c.scores_to_comparisons([*others, *mine[::-1]], pairs=rule)[0]
        assert [w for w in words(among) if w[0] in "abcdef"] == alone
        ranking, _ = c.scores_to_rankings(mine)
        assert words(c.rankings_to_comparisons(ranking, pairs=rule)[0]) == alone


def test_ties_of_a_tournament_are_ties():
    """2 wins against both 1s by 1, and the 1s tie where they meet: 2 pairs, at most one of them a tie."""
    found = set()
    for i in range(40):
        records = letters("abc", (1, 1, 2), (Message("user", f"{i}"),))
        found.add(tuple(words(c.scores_to_comparisons(records, pairs="tournament")[0])))
    assert found == {("c>a", "c>b"), ("c>b", "c>a"), ("a=b", "c>a"), ("b=a", "c>b")}


def test_scores_to_comparisons_with_a_tie_threshold():
    out, account = c.scores_to_comparisons(SCORES, tie_threshold=0.2)
    assert words(out) == ["b=c", "b>a", "c>a"]
    assert [r.strength for r in out] == [None, 2.0, pytest.approx(1.9)]
    assert account.dropped == {"the only score of its prompt": 1}
    assert words(c.scores_to_comparisons(SCORES)[0]) == ["b>c", "b>a", "c>a"]
    assert words(c.scores_to_comparisons(SCORES, pairs="best-worst")[0]) == ["b>a"]


def test_equal_completions_make_no_pair():
    out, account = c.scores_to_comparisons([Score(P, "a", 1.0), Score(P, "a ", 2.0), Score(P, "b", 0.0)])
    assert (words(out), account.dropped) == (["a >b", "a>b"], {"pair of equal completions": 1})


def test_scores_to_thumbs_counts_the_threshold_itself_as_up():
    out, account = c.scores_to_thumbs(SCORES, threshold=2.9)
    assert [r.desirable for r in out] == [False, True, True, True]
    assert account.lost == "by how much a score is above or below 2.9."


def test_scores_to_rankings():
    out, account = c.scores_to_rankings([*SCORES[:3], Score(P, "d", 2.9), SCORES[3]])
    assert out == [Ranking(P, ("a", "b", "c", "d"), (4, 1, 2, 2), (1.0, 3.0, 2.9, 2.9))]
    assert account.dropped == {"the only score of its prompt": 1}


def test_comparisons_to_thumbs_drops_ties_and_says_who_is_both():
    out, account = c.comparisons_to_thumbs(PAIRS)
    assert [(r.completion, r.desirable) for r in out] == [("a", True), ("b", False), ("b", True), ("c", False)]
    assert account.dropped == {"tie": 1}
    assert "1 completion won one comparison and lost another: both up and down now." in account.lost


def test_thumbs_to_comparisons_pairs_within_a_prompt_only():
    thumbs = [Thumb(P, "a", True), Thumb(P, "b", False), Thumb(P, "c", False), Thumb(Q, "d", True)]
    out, account = c.thumbs_to_comparisons(thumbs)
    assert (words(out), account.dropped) == (["a>b", "a>c"], {"no other verdict on the same prompt": 1})


def test_to_demonstrations():
    out, account = c.thumbs_to_demonstrations([Thumb(P, "a", True), Thumb(P, "b", False)])
    assert (out, account.dropped) == ([Demonstration(P, "a")], {"undesirable": 1})
    out, account = c.comparisons_to_demonstrations(PAIRS)
    assert (out, account.dropped) == ([Demonstration(P, "a"), Demonstration(P, "b")], {"tie": 1})


@pytest.mark.parametrize(
    ("ties", "expected", "dropped"),
    [
        ("keep", ["a>b", "b>c", "c=d", "e=e"], {}),
        ("drop", ["a>b", "b>c"], {"tie": 2}),
        ("split", ["a>b", "b>c", "c>d", "d>c"], {"pair of equal completions": 1}),
    ],
)
def test_ties(ties, expected, dropped):
    out, account = c.settle_ties([*PAIRS, Comparison(P, "e", "e", tie=True)], ties=ties)
    assert (words(out), account.dropped) == (expected, dropped)
    assert bool(account.lost) == (ties != "keep")


def test_convert_takes_the_way_and_hands_options_to_their_step():
    out, account = c.convert([RANKING], to="comparison", pairs="adjacent", ties="drop")
    assert words(out) == ["b>c", "c>d"]
    assert str(account) == (
        "1 ranking -> 2 comparison (pairs=adjacent, ties=drop). dropped 1: tie. Lost: every order but that of the "
        "adjacent pairs, and that the pairs of one ranking belong together. 1 tie: that such completions are equally good."
    )
    out, account = c.convert(SCORES, to="demonstration", threshold=3)
    assert [r.completion for r in out] == ["b", "z"]
    assert (account.from_kind, account.to_kind, account.count_in, account.count_out) == ("score", "demonstration", 4, 2)
    assert c.convert(SCORES, to="prompt")[0] == [Prompt(P), Prompt(Q)]
    assert c.convert(PAIRS, to="Comparison")[0] == PAIRS
    same, account = c.convert(SCORES, to="score")
    assert (same, account.lost) == (SCORES, "")


def test_convert_says_which_conversions_exist():
    with pytest.raises(FeedbackKindError) as refused:
        c.convert([Thumb(P, "a", True)], to="score")
    assert str(refused.value) == (
        "thumb records cannot become score records: it would invent what nobody said. "
        "From thumb there is comparison, demonstration, prompt; to score there is a way from nothing."
    )
    with pytest.raises(FeedbackKindError, match='"thums" is not a kind of feedback. Did you mean "thumb"?'):
        c.convert(PAIRS, to="thums")
    with pytest.raises(FeedbackKindError, match="There are no records"):
        c.convert([], to="thumb")
    with pytest.raises(FeedbackKindError, match="several kinds: 1 score, 1 prompt"):
        c.convert([SCORES[0], Prompt(P)], to="thumb")


def test_every_option_has_an_effect_or_is_refused():
    with pytest.raises(ConfigError, match="threshold=1 has no effect on comparison -> thumb. Options there: none"):
        c.convert(PAIRS, to="thumb", threshold=1)
    with pytest.raises(ConfigError, match='Options there: tie_threshold, pairs, ties. Did you mean "ties"?'):
        c.convert(SCORES, to="comparison", tie="drop")
    with pytest.raises(ConfigError, match="score -> thumb needs threshold=: there is no default"):
        c.convert(SCORES, to="thumb")
    with pytest.raises(ConfigError, match='ties="half" is not known. Known: keep, drop, split'):
        c.convert(PAIRS, to="comparison", ties="half")
    with pytest.raises(ConfigError, match='pairs="worst" is not known'):
        c.convert([RANKING], to="comparison", pairs="worst")
    with pytest.raises(ConfigError, match="tie_threshold=-1"):
        c.convert(SCORES, to="comparison", tie_threshold=-1)
    with pytest.raises(ConfigError, match="threshold=nan: expected a finite number"):
        c.convert(SCORES, to="thumb", threshold=float("nan"))


def test_origins_survive_and_the_input_is_left_alone():
    pair = Comparison(P, "a", "b", tie=True, origin=Origin("f", 7))
    score = [Score(P, "a", 1.0, origin=Origin("f", 8)), Score(P, "b", 2.0, origin=Origin("f", 9))]
    before = copy.deepcopy([pair, *score])
    made = [*c.settle_ties([pair], ties="split")[0], *c.convert(score, to="comparison")[0], *c.to_prompts([pair])[0]]
    made += [*c.convert(score, to="thumb", threshold=0)[0], *c.convert(score, to="ranking")[0]]
    assert {r.origin.file for r in made} == {"f"}
    assert before == [pair, *score]
