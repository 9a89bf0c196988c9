"""Which of the sampled answers are used: statistical rejection sampling (RSO), and the best of n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from trimtab.errors import ConfigError
from trimtab.judges.base import Failure, Preference, Question, Ranks, Scores, Verdicts


def rejection(scores: Sequence[float], n: int, beta: float, noise: torch.Generator) -> list[int]:
    """Places of ``n`` candidates, in the order in which they were accepted (RSO, arXiv:2309.06657, algorithm 1).

    A candidate is accepted with probability exp((score - M) / beta), M the largest score of those that remain. For n far
    below the number of candidates that makes samples of pi into samples of pi exp(score / beta) / Z; as beta goes to 0 the
    n best are left, as it grows any n. Candidates are shuffled first: the authors' code takes them in their order, and a
    large beta then gives the first n.

    Args:
        scores: one per candidate, finite, in the unit of beta.

    Raises:
        ConfigError: n is no number from 1 to that of the candidates, or beta is not above 0.
    """
    if not 1 <= n <= len(scores):
        raise ConfigError(
            f"rejection sampling of {n} from {len(scores)} candidates: expected at least 1, and no more than there are. Sample "
            "more answers, or keep fewer."
        )
    if not 0 < beta < math.inf:
        raise ConfigError(
            f"rejection sampling at beta={beta}: expected a finite number above 0, in the unit of the scores."
        )
    left, accepted = torch.randperm(len(scores), generator=noise).tolist(), list[int]()
    while len(accepted) < n:  # the best of those that are left is accepted with certainty: this ends
        best = max(scores[i] for i in left)
        drawn = torch.rand(len(left), generator=noise, dtype=torch.float64).tolist()
        taken = {i for i, u in zip(left, drawn, strict=True) if u < math.exp((scores[i] - best) / beta)}
        accepted += [i for i in left if i in taken]
        left = [i for i in left if i not in taken]
    return accepted[:n]


def keep(verdicts: Verdicts, n: int, beta: float, *seed: int) -> tuple[Verdicts, int]:
    """(verdicts on ``n`` accepted answers of each question, how many questions had fewer than ``n``).

    Answers that read alike are one candidate, answers that were not judged are none. What is accepted depends on the scores,
    ``seed`` and the prompt alone. A question with fewer than ``n`` candidates keeps all of them.
    """
    questions, judgements, short = list[Question](), list[Scores | Failure](), 0
    for q, judgement in verdicts:
        match judgement:
            case Failure():
                questions.append(q)
                judgements.append(judgement)
                short += 1
            case Scores(scores):
                first: dict[str, tuple[int, float]] = {}
                for place, (text, score) in enumerate(zip(q.completions, scores, strict=True)):
                    if not isinstance(score, Failure):
                        first.setdefault(text.strip(), (place, score))
                found = list(first.values())
                mixed = int.from_bytes(replace(q, completions=()).digest("keep", *seed)[:7], "little")
                noise = torch.Generator().manual_seed(mixed)
                number = min(n, len(found))
                places = rejection([s for _, s in found], number, beta, noise) if found else []
                questions.append(replace(q, completions=tuple(q.completions[found[i][0]] for i in places)))
                judgements.append(Scores(tuple(found[i][1] for i in places)))
                short += number < n
            case Preference() | Ranks():
                raise _no_score(judgement)
    return Verdicts(tuple(questions), tuple(judgements), verdicts.notes), short


def best(verdicts: Verdicts) -> list[tuple[int, float] | None]:
    """Per question the place and the score of the best answer, the first of equals; None where no answer was judged."""
    found = list[tuple[int, float] | None]()
    for _, judgement in verdicts:
        match judgement:
            case Scores(scores):
                judged = [(i, s) for i, s in enumerate(scores) if not isinstance(s, Failure)]
                found.append(max(judged, key=lambda place: place[1], default=None))
            case Failure():
                found.append(None)
            case Preference() | Ranks():
                raise _no_score(judgement)
    return found


def _no_score(judgement: Preference | Ranks) -> ConfigError:
    return ConfigError(
        f"choosing among answers needs a score for each, and this judge gives {type(judgement).__name__.lower()}. Use a judge of "
        "answers, or one of pairs."
    )


def best_of_kl(n: int) -> float:
    """log n - (n - 1)/n, in nats: an upper bound of KL(best of n || policy), and its value where no two answers are alike
    (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n
