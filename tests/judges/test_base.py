"""What every judge shares: counts, the rule that stops it, and judgements as records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from trimtab.errors import ConfigError, FeedbackKindError, JudgeError
from trimtab.feedback.convert import convert
from trimtab.feedback.records import Message, Origin
from trimtab.feedback.rows import check
from trimtab.judges import records
from trimtab.judges.base import Failure, Judge, Judgement, Kind, Preference, Question, Ranks, Scores, Verdicts
from trimtab.judges.round_robin import RoundRobin

SAID = (Message("user", "Which?"),)


def ask(*completions: str, row: int = 1) -> Question:
    return Question(SAID, completions, origin=Origin("f", row))


@dataclass
class Scripted(Judge):
    """Says what it was told, and remembers what it was asked."""

    script: Sequence[Judgement]
    kind: Kind = "pointwise"
    identity: str = "scripted"
    heard: list[Question] = field(default_factory=list)

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        for q, said in zip(questions, self.script, strict=False):
            self.heard.append(q)
            yield said


def test_failures_are_counted_by_reason_and_answer() -> None:
    script = [Scores((1.0, Failure("timeout"))), Failure("nonsense"), Scores((2.0, 3.0))]
    found = Scripted(script).judge([ask("a", "b")] * 3)
    assert (found.asked, found.failed) == (6, {"timeout": 1, "nonsense": 2})
    assert str(found) == "3 of 6 judged; failed: 2 × nonsense, 1 × timeout."
    assert found.to_json()["failed"] == {"timeout": 1, "nonsense": 2} and found.position == found.outcome == {}


def test_equal_answers_are_judged_once() -> None:
    """Also those that differ in white space around them, which a ranking may not put in two places."""
    judge = Scripted([Scores((1.0, 2.0))])
    found = judge.judge([ask("a", "b", "a", " b\n")])
    assert judge.heard[0].completions == ("a", "b")
    assert found.judgements == (Scores((1.0, 2.0, 1.0, 2.0)),)
    for ranking in records.rankings(found)[0]:
        check(ranking)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_failure(bad: float) -> None:
    found = Scripted([Scores((bad, 1.0))]).judge([ask("a", "b")])
    assert found.failed == {"the score is no finite number": 1}


def test_a_judge_is_stopped_in_the_middle_and_at_the_end() -> None:
    script = [Scores((0.0,))] * 30 + [Failure("no connection", "host: gone")] * 300
    judge = Scripted(script, stop_after=0.25)
    message = r"^the judge failed on 11 of 41 so far \(11 × no connection\), and stop_after allows 25%\. The last one: host: gone"
    with pytest.raises(JudgeError, match=message):
        judge.judge([ask("a")] * 330)
    assert len(judge.heard) == 41  # 11 > 41 / 4, and 10 was not more than 40 / 4
    few = [Scores((0.0,)), Failure("refused"), Failure("refused")]
    with pytest.raises(JudgeError, match="failed on 2 of 3"):
        Scripted(few).judge([ask("a")] * 3)
    assert Scripted(few, stop_after=0.7).judge([ask("a")] * 3).failed == {"refused": 2}
    assert Scripted([Failure("x")] * 50, stop_after=1.0).judge([ask("a")] * 50).failed == {"x": 50}


def test_pairwise_judges_are_asked_about_pairs() -> None:
    with pytest.raises(ConfigError, match="compares two answers, and a question has 3"):
        Scripted([], kind="pairwise").judge([ask("a", "b", "c")])


def pairs(*judgements: Judgement) -> Verdicts:
    questions = tuple(ask(f"a{i}", f"b{i}", row=i + 1) for i in range(len(judgements)))
    return Verdicts(questions, judgements)


def test_position_bias_and_outcome() -> None:
    """Two agree (a win, a loss), one has both orders at the first place, one at the second, one wins and ties, one ties."""
    orders = [(0.9, 0.7), (0.2, 0.0), (0.8, 0.1), (0.4, 0.9), (1.0, 0.5), (0.5, 0.5)]
    found = pairs(*(Preference((a + b) / 2, orders=(a, b)) for a, b in orders), Failure("timeout"))
    place = found.position
    assert place["bias"] == pytest.approx(2 / 6) and place["consistency"] == pytest.approx(3 / 6)
    # shown first: 0.9 and 1 - 0.7, ...; (1.2 + 1.2 + 1.7 + 0.5 + 1.5 + 1) / 12
    assert place["first_place"] == pytest.approx(7.1 / 12)
    assert found.outcome == {"wins": 1, "ties": 4, "losses": 1, "win_rate": 0.5}
    assert "the same answer in 50% of the pairs, the same place in 33%" in str(found)


def test_swapping_the_answers_turns_the_win_rate() -> None:
    orders = [(0.9, 0.7), (0.8, 0.1), (1.0, 0.5), (0.6, 1.0)]
    rates = [
        pairs(*(Preference(0.5, orders=o) for o in way)).outcome["win_rate"]
        for way in (orders, [(1 - b, 1 - a) for a, b in orders])
    ]
    assert rates[0] == 0.75 and sum(rates) == 1


def test_comparisons_have_the_winner_first_and_its_probability() -> None:
    verdicts = pairs(Preference(0.8), Preference(0.3), Preference(0.5), Preference(0.75), Failure("refused"))
    found, account = records.comparisons(verdicts)
    assert [(r.chosen, r.rejected, r.tie, r.strength) for r in found] == [
        ("a0", "b0", False, 0.8),
        ("b1", "a1", False, 0.7),
        ("a2", "b2", True, 0.5),
        ("a3", "b3", False, 0.75),
    ]
    assert (account.count_in, account.count_out, account.dropped) == (5, 4, {"refused": 1})
    assert [r.origin.row for r in found] == [1, 2, 3, 4]
    assert [r.tie for r in records.comparisons(verdicts, tie_band=0.25)[0]] == [False, True, True, True]
    same = Verdicts((ask("a", "a "),), (Preference(0.9),))
    assert records.comparisons(same)[1].dropped == {"pair of equal completions": 1}
    with pytest.raises(ConfigError, match="tie_band is 0.5"):
        records.comparisons(verdicts, tie_band=0.5)


def test_rankings_leave_out_what_failed_and_count_it() -> None:
    questions = tuple(ask(*(f"{x}{i}" for x in "abcd"), row=i + 1) for i in range(4))
    late = Failure("timeout")
    given = (
        Scores((1.0, late, 3.0, 1.0)),
        Scores((late, late, late, 2.0)),
        Failure("nonsense"),
        Ranks((2, 1, 4, 2)),
    )
    verdicts = Verdicts(questions, given)
    first, other = records.rankings(verdicts)[0]
    assert (first.ranked, first.ranks, first.scores) == (("a0", "c0", "d0"), (2, 1, 2), (1.0, 3.0, 1.0))
    assert (other.ranks, other.scores) == ((2, 1, 4, 2), None)
    assert records.rankings(verdicts)[1].dropped == {
        "timeout": 4,
        "nonsense": 1,
        "too few judged answers to its prompt": 1,
    }
    assert [r.ranked for r in records.rankings(verdicts, at_least=1)[0]][1] == ("d1",)
    # a failure is no loss: no pair of the failed answer comes out of the conversion
    assert {t for p in convert([first], to="comparison")[0] for t in p.completions} == {"a0", "c0", "d0"}


def test_scores_and_thumbs() -> None:
    verdicts = Verdicts((ask("a", "b", "c"),), (Scores((0.2, Failure("refused"), 0.7)),))
    assert [(r.completion, r.score) for r in records.scores(verdicts)[0]] == [("a", 0.2), ("c", 0.7)]
    thumbs, account = records.thumbs(verdicts, threshold=0.7)
    assert [(r.completion, r.desirable) for r in thumbs] == [("a", False), ("c", True)]
    assert (account.count_in, account.count_out, account.dropped) == (3, 2, {"refused": 1})
    for bad in (lambda: records.scores(pairs(Preference(1.0))), lambda: records.rankings(pairs(Preference(1.0)))):
        with pytest.raises(FeedbackKindError, match="the judge gave preference"):
            bad()
    with pytest.raises(FeedbackKindError, match="the judge gave scores: comparisons need a pairwise judge"):
        records.comparisons(verdicts)


def test_round_robin_is_the_mean_win_rate() -> None:
    """a beats b at 0.9, b against c failed, a against c 0.5: a (0.9 + 0.5) / 2, b 0.1, c 0.5."""
    script = [Preference(0.9), Preference(0.5), Failure("timeout"), Failure("refused")]
    judge = RoundRobin(Scripted(script, kind="pairwise", stop_after=0.9))
    found = judge.judge([ask("a", "b", "c"), ask("d", "e"), ask("f")])
    first, second, alone = found.judgements
    assert isinstance(first, Scores) and first.scores == pytest.approx((0.7, 0.1, 0.5))
    assert second == Scores((Failure("refused"), Failure("refused")))
    assert alone == Scores((Failure("there is no other answer to compare it with"),))
    assert found.notes["comparison left out of a round robin: timeout"] == 1
    with pytest.raises(ConfigError, match="this judge is pointwise"):
        RoundRobin(Scripted([]))
