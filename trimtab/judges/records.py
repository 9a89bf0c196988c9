"""Judgements as records of feedback. What was not judged gives no record: it is counted by reason.

Every function returns ``(records, Conversion)``, as those of :mod:`trimtab.feedback.convert`, which turns rankings and scores
into pairs and thumbs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trimtab.errors import ConfigError, FeedbackKindError
from trimtab.feedback.convert import SAME_TEXT, Conversion, scores_to_thumbs
from trimtab.feedback.kinds import name_of
from trimtab.feedback.records import Comparison, Ranking, Record, Score, Thumb
from trimtab.judges.base import Failure, Judgement, Preference, Question, Ranks, Scores, Verdicts


def comparisons(verdicts: Verdicts, *, tie_band: float = 0.0) -> tuple[list[Comparison], Conversion]:
    """A pair for each preference; ``strength`` is the probability that ``chosen`` is better, from 1/2 to 1.

    Probabilities within ``tie_band`` of 1/2 are ties. With hard labels from both orders 0 makes a tie of two orders that
    contradict each other, and 1/4 also of a win in one order and a tie in the other (MT-bench's rule).
    """
    if not 0 <= tie_band < 0.5:
        raise ConfigError(f"tie_band is {tie_band}; expected a number of at least 0 and below 0.5.")
    out, dropped = list[Comparison](), Counter[str]()
    for q, judgement in verdicts:
        match judgement:
            case Failure():
                dropped[judgement.reason] += 1
            case Preference(first):
                a, b = q.completions if first >= 0.5 else q.completions[::-1]
                if a.strip() == b.strip():
                    dropped[SAME_TEXT] += 1
                    continue
                tie, strength = abs(first - 0.5) <= tie_band, max(first, 1 - first)
                out.append(Comparison(q.prompt, a, b, tie, strength, origin=q.origin))
            case Scores() | Ranks():
                raise _wrong(
                    judgement, "comparisons need a pairwise judge; use rankings, and convert them to comparisons"
                )
    return out, _account(verdicts, Comparison, len(out), dropped, tie_band=tie_band)


def rankings(verdicts: Verdicts, *, at_least: int = 2) -> tuple[list[Ranking], Conversion]:
    """A ranking for each question, of the answers that were judged; equal scores share a place (1, 2, 2, 4).

    ``at_least``: questions with fewer judged answers give none. One answer is enough for methods on rollouts, but a feedback
    file takes rankings of two and more.
    """
    out, dropped = list[Ranking](), Counter[str]()
    for q, judgement in verdicts:
        match judgement:
            case Failure():
                dropped[judgement.reason] += 1
            case Ranks(ranks):
                out.append(Ranking(q.prompt, q.completions, ranks, origin=q.origin))
            case Scores(given):
                kept = _kept(q, given, dropped)
                if len(kept) < at_least:
                    dropped["too few judged answers to its prompt"] += len(kept)
                    continue
                texts, scores = tuple(c for c, _ in kept), tuple(s for _, s in kept)
                ranks = tuple(1 + sum(other > s for other in scores) for s in scores)
                out.append(Ranking(q.prompt, texts, ranks, scores, origin=q.origin))
            case Preference():
                raise _wrong(judgement, "rankings need a pointwise judge; wrap the pairwise one in RoundRobin")
    return out, _account(verdicts, Ranking, len(out), dropped, at_least=at_least)


def scores(verdicts: Verdicts) -> tuple[list[Score], Conversion]:
    """A score for each judged answer."""
    out, dropped = list[Score](), Counter[str]()
    for q, judgement in verdicts:
        match judgement:
            case Failure():
                dropped[judgement.reason] += 1
            case Scores(given):
                out += [Score(q.prompt, c, s, origin=q.origin) for c, s in _kept(q, given, dropped)]
            case Preference() | Ranks():
                raise _wrong(judgement, "scores need a pointwise judge")
    return out, _account(verdicts, Score, len(out), dropped)


def thumbs(verdicts: Verdicts, *, threshold: float) -> tuple[list[Thumb], Conversion]:
    """A thumb for each judged answer, up where its score is at least ``threshold``."""
    scored, account = scores(verdicts)
    out, done = scores_to_thumbs(scored, threshold=threshold)
    return out, account.then(done)


def _kept(q: Question, given: Sequence[float | Failure], dropped: Counter[str]) -> list[tuple[str, float]]:
    dropped.update(s.reason for s in given if isinstance(s, Failure))
    return [(c, s) for c, s in zip(q.completions, given, strict=True) if not isinstance(s, Failure)]


def _wrong(judgement: Judgement, what: str) -> FeedbackKindError:
    return FeedbackKindError(f"the judge gave {type(judgement).__name__.lower()}: {what}.")


def _account(
    verdicts: Verdicts, kind: type[Record], made: int, dropped: Counter[str], **parameters: float
) -> Conversion:
    return Conversion("judgement", name_of(kind), verdicts.asked, made, "", dict(dropped), parameters)
