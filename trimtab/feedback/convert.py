"""One kind of feedback from another: explicit, counted, and honest about what is lost.

Every function is pure and returns ``(records, Conversion)``. :func:`convert` picks the way by the kind that is wanted.

    >>> from trimtab.feedback.records import Message, Score
    >>> hi = (Message("user", "hi"),)
    >>> pairs, account = convert([Score(hi, "hello", 4.0), Score(hi, "go away", 1.0)], to="comparison")
    >>> pairs[0].chosen, pairs[0].strength, account.count_out
    ('hello', 3.0, 1)
"""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal, TypeVar, get_args

from trimtab.errors import ConfigError, FeedbackKindError, nearest
from trimtab.feedback.kinds import KINDS, counted, kind_of, name_of
from trimtab.feedback.records import (
    Comparison,
    Conversation,
    Demonstration,
    Prompt,
    Ranking,
    Record,
    Score,
    Thumb,
)

Pairs = Literal["all", "best-worst", "best-random", "adjacent", "tournament"]
Ties = Literal["keep", "drop", "split"]
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Conversion:
    """The account of a conversion, as the run card prints it. ``dropped`` counts by reason what gave no record."""

    from_kind: str
    to_kind: str
    count_in: int
    count_out: int
    lost: str
    dropped: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)

    def then(self, after: Conversion) -> Conversion:
        """This conversion followed by another one, as one."""
        return Conversion(
            self.from_kind,
            after.to_kind,
            self.count_in,
            after.count_out,
            " ".join(filter(None, [self.lost, after.lost])),
            dict(Counter(self.dropped) + Counter(after.dropped)),
            {**self.parameters, **after.parameters},
        )

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        head = (
            f"{self.count_in:,} {self.from_kind} -> {self.count_out:,} {self.to_kind}{f' ({chosen})' if chosen else ''}"
        )
        dropped = [f"dropped {count:,}: {reason}." for reason, count in self.dropped.items()]
        return " ".join([f"{head}.", *dropped, *([f"Lost: {self.lost}"] if self.lost else [])])


def rankings_to_comparisons(records: Iterable[Ranking], *, pairs: Pairs = "all") -> tuple[list[Comparison], Conversion]:
    """Pairs of a ranking; equal ranks are ties.

    ``all``; ``best-worst``; ``best-random``: the best against any other; ``adjacent``: each with the next; ``tournament``: the
    K - 1 matches of a knockout tournament (SLiC-HF, RSO). Chance depends on the prompt and its completions alone.
    """
    _known("pairs", pairs, Pairs)
    records, dropped, out = list(records), Counter[str](), list[Comparison]()
    for record in records:
        # Only the order is known, so a lower rank counts as a higher value and no strength is made up.
        ranked = [_Candidate(text, -rank, record) for text, rank in zip(record.ranked, record.ranks, strict=True)]
        out += _paired(ranked, pairs, 0.0, dropped, with_strength=False)
    lost = "that the pairs of one ranking belong together."
    if pairs != "all":
        lost = f"every order but that of the {pairs} pairs, and {lost}"
    return out, _account(Ranking, Comparison, records, out, lost, dropped, pairs=pairs)


def scores_to_comparisons(
    records: Iterable[Score], *, tie_threshold: float = 0.0, pairs: Pairs = "all"
) -> tuple[list[Comparison], Conversion]:
    """Pairs of the scored completions of each prompt. Scores at most ``tie_threshold`` apart are a tie; the strength of
    a win is the difference. Prompts with one completion give nothing and are counted."""
    _known("pairs", pairs, Pairs)
    if not 0 <= tie_threshold < float("inf"):
        raise ConfigError(f"tie_threshold={tie_threshold}: expected a finite number of score units, 0 or more.")
    records, dropped, out = list(records), Counter[str](), list[Comparison]()
    for group in _by_prompt(records).values():
        if len(group) == 1:
            dropped["the only score of its prompt"] += 1
        scored = [_Candidate(record.completion, record.score, record) for record in group]
        out += _paired(scored, pairs, tie_threshold, dropped, with_strength=True)
    lost = "the level of the scores; only differences remain."
    return out, _account(Score, Comparison, records, out, lost, dropped, tie_threshold=tie_threshold, pairs=pairs)


def scores_to_thumbs(records: Iterable[Score], *, threshold: float) -> tuple[list[Thumb], Conversion]:
    """``score >= threshold`` is desirable. There is no default: the unit is the judge's own."""
    if not abs(threshold) < float("inf"):
        raise ConfigError(f"threshold={threshold}: expected a finite number in the unit of the scores.")
    records = list(records)
    out = [Thumb(r.prompt, r.completion, r.score >= threshold, origin=r.origin) for r in records]
    lost = f"by how much a score is above or below {threshold:g}."
    return out, _account(Score, Thumb, records, out, lost, threshold=threshold)


def scores_to_rankings(records: Iterable[Score]) -> tuple[list[Ranking], Conversion]:
    """One ranking per prompt; equal scores share a rank (1, 2, 2, 4). Prompts with one completion are counted."""
    records, dropped, out = list(records), Counter[str](), []
    for group in _by_prompt(records).values():
        if len(group) == 1:
            dropped["the only score of its prompt"] += 1
            continue
        ranks = tuple(1 + sum(other.score > record.score for other in group) for record in group)
        texts, scores = tuple(r.completion for r in group), tuple(r.score for r in group)
        out.append(Ranking(group[0].prompt, texts, ranks, scores, origin=group[0].origin))
    return out, _account(Score, Ranking, records, out, "nothing: the scores go along.", dropped)


def comparisons_to_thumbs(records: Iterable[Comparison]) -> tuple[list[Thumb], Conversion]:
    """Chosen up, rejected down. A tie says neither, so ties are dropped and counted."""
    records, dropped, out = list(records), Counter[str](), []
    for r in records:
        if r.tie:
            dropped["tie"] += 1
            continue
        out += [Thumb(r.prompt, r.chosen, True, origin=r.origin), Thumb(r.prompt, r.rejected, False, origin=r.origin)]
    lost = "that the two completions were compared: the better of two bad ones counts as good."
    verdicts: dict[object, set[bool]] = {}
    for thumb in out:
        verdicts.setdefault((thumb.prompt, thumb.completion), set()).add(thumb.desirable)
    both = sum(len(said) == 2 for said in verdicts.values())
    if both:
        lost += f" {counted(both, 'completion')} won one comparison and lost another: both up and down now."
    return out, _account(Comparison, Thumb, records, out, lost, dropped)


def thumbs_to_comparisons(records: Iterable[Thumb]) -> tuple[list[Comparison], Conversion]:
    """Every desirable completion of a prompt against every undesirable one of the same prompt."""
    records, dropped, out = list(records), Counter[str](), []
    for group in _by_prompt(records).values():
        up, down = [r for r in group if r.desirable], [r for r in group if not r.desirable]
        if not (up and down):
            dropped["no other verdict on the same prompt"] += len(group)
        for good in up:
            for bad in down:
                if good.completion.strip() == bad.completion.strip():
                    dropped[SAME_TEXT] += 1
                    continue
                out.append(Comparison(good.prompt, good.completion, bad.completion, origin=good.origin))
    lost = "thumbs on prompts that have only one verdict, and how many thumbs each completion had."
    return out, _account(Thumb, Comparison, records, out, lost, dropped)


def thumbs_to_demonstrations(records: Iterable[Thumb]) -> tuple[list[Demonstration], Conversion]:
    """The desirable completions."""
    records = list(records)
    out = [Demonstration(r.prompt, r.completion, origin=r.origin) for r in records if r.desirable]
    dropped = Counter({"undesirable": len(records) - len(out)})
    return out, _account(Thumb, Demonstration, records, out, "what not to say.", dropped)


def comparisons_to_demonstrations(records: Iterable[Comparison]) -> tuple[list[Demonstration], Conversion]:
    """The chosen completions. Of a tie neither was chosen, so ties are dropped and counted."""
    records = list(records)
    out = [Demonstration(r.prompt, r.chosen, origin=r.origin) for r in records if not r.tie]
    dropped = Counter({"tie": len(records) - len(out)})
    return out, _account(Comparison, Demonstration, records, out, "the rejected completions.", dropped)


def settle_ties(records: Iterable[Comparison], *, ties: Ties = "keep") -> tuple[list[Comparison], Conversion]:
    """What a method without ties does with them: ``drop`` them, or ``split`` each into two wins, one in each order.

    The two wins pull with equal force in opposite directions, so a pairwise loss is smallest where both completions
    are equally likely relative to the reference: the tie is respected, at the price of counting twice.
    """
    _known("ties", ties, Ties)
    records = list(records)
    tied = sum(r.tie for r in records)
    out: list[Comparison] = []
    for r in records:
        if not r.tie or ties == "keep":
            out.append(r)
        elif ties == "split" and r.chosen.strip() != r.rejected.strip():
            out += [
                Comparison(r.prompt, *pair, origin=r.origin)
                for pair in ((r.chosen, r.rejected), (r.rejected, r.chosen))
            ]
    dropped: Counter[str] = Counter()
    match ties:
        case "keep":
            lost = ""
        case "drop":
            dropped["tie"] = tied
            lost = f"{counted(tied, 'tie')}: that such completions are equally good."
        case "split":
            dropped[SAME_TEXT] = sum(r.tie and r.chosen.strip() == r.rejected.strip() for r in records)
            lost = f"that {tied:,} pairs are ties: each is now two opposite wins, which weigh twice as much as one win."
    return out, _account(Comparison, Comparison, records, out, lost, dropped, ties=ties)


def to_prompts(records: Iterable[Record]) -> tuple[list[Prompt], Conversion]:
    """The different prompts, in order: food for samplers."""
    records = list(records)
    out = [Prompt(group[0].prompt, origin=group[0].origin) for group in _by_prompt(records).values()]
    dropped = Counter({"prompt seen before": len(records) - len(out)})
    return out, _account(kind_of(records), Prompt, records, out, "all completions and what was said of them.", dropped)


Step = Callable[..., tuple[list[Any], Conversion]]

# Where two ways lead to a kind, the table holds the one that invents least; the other is there as two calls.
PATHS: dict[tuple[type[Record], type[Record]], tuple[Step, ...]] = {
    (Comparison, Comparison): (settle_ties,),
    (Ranking, Comparison): (rankings_to_comparisons, settle_ties),
    (Score, Comparison): (scores_to_comparisons, settle_ties),
    (Thumb, Comparison): (thumbs_to_comparisons,),
    (Comparison, Thumb): (comparisons_to_thumbs,),
    (Ranking, Thumb): (rankings_to_comparisons, comparisons_to_thumbs),
    (Score, Thumb): (scores_to_thumbs,),
    (Score, Ranking): (scores_to_rankings,),
    (Comparison, Demonstration): (comparisons_to_demonstrations,),
    (Thumb, Demonstration): (thumbs_to_demonstrations,),
    (Score, Demonstration): (scores_to_thumbs, thumbs_to_demonstrations),
    **{(kind, Prompt): (to_prompts,) for kind in (Comparison, Thumb, Ranking, Score, Demonstration)},
}


def convert(records: Iterable[Record], to: str, **options: Any) -> tuple[list[Any], Conversion]:
    """The records as kind ``to``: "comparison", "thumb", "ranking", "score", "demonstration" or "prompt".

    Options go to the steps that take them: ``pairs`` and ``ties`` towards comparisons, ``tie_threshold`` from scores to
    comparisons, ``threshold`` from scores to thumbs. Raises :class:`FeedbackKindError` where there is no way, naming
    those there are, and :class:`ConfigError` for an option that no step takes or that is missing.
    """
    records = list(records)
    source, target = kind_of(records), KINDS.get(to.lower())
    if target is None:
        raise FeedbackKindError(
            f'"{to}" is not a kind of feedback.{nearest(to, list(KINDS))} Known: {", ".join(KINDS)}.'
        )
    steps = PATHS.get((source, target), () if source is target else None)
    if steps is None:
        ways = sorted(name_of(end) for start, end in PATHS if start is source)
        origins = sorted(name_of(start) for start, end in PATHS if end is target)
        raise FeedbackKindError(
            f"{name_of(source)} records cannot become {name_of(target)} records: it would invent what nobody said. "
            f"From {name_of(source)} there is {', '.join(ways) or 'nothing'}; "
            f"to {name_of(target)} there is a way from {', '.join(origins) or 'nothing'}."
        )
    _check_options(name_of(source), name_of(target), steps, options)
    account = Conversion(name_of(source), name_of(target), len(records), len(records), lost="")
    current: list[Any] = records
    for number, step in enumerate(steps):
        current, done = step(current, **{k: v for k, v in options.items() if k in _options_of(step)})
        account = account.then(done) if number else done
    return current, account


SAME_TEXT = "pair of equal completions"


@dataclass(frozen=True)
class _Candidate:
    """A completion with a value of which more is better, and the record it came from."""

    text: str
    value: float
    record: Record


def _paired(
    candidates: Sequence[_Candidate], pairs: Pairs, threshold: float, dropped: Counter[str], *, with_strength: bool
) -> Iterator[Comparison]:
    ordered = sorted(candidates, key=lambda c: -c.value)  # stable: equals keep the order of the file
    picked: Iterable[tuple[_Candidate, _Candidate]]
    match pairs:
        case "all":
            picked = combinations(ordered, 2)
        case "adjacent":
            picked = pairwise(ordered)
        case "best-worst":
            picked = [(ordered[0], ordered[-1])] if len(ordered) > 1 else []
        case "best-random":
            picked = [(ordered[0], _chance(ordered).choice(ordered[1:]))] if len(ordered) > 1 else []
        case "tournament":
            picked = _tournament(ordered)
    for better, worse in picked:
        if better.text.strip() == worse.text.strip():
            dropped[SAME_TEXT] += 1
            continue
        apart = better.value - worse.value
        tie = apart <= threshold
        strength = apart if with_strength and not tie else None
        yield Comparison(
            better.record.prompt, better.text, worse.text, tie=tie, strength=strength, origin=better.record.origin
        )


def _chance(ordered: Sequence[_Candidate]) -> random.Random:
    """Random numbers of these candidates, whatever the file around them."""
    said = [[m.role, m.content] for m in ordered[0].record.prompt]
    return random.Random(json.dumps([said, [c.text for c in ordered]]))


def _tournament(ordered: Sequence[_Candidate]) -> Iterator[tuple[_Candidate, _Candidate]]:
    """(winner, loser) of each match: in every round pairs are drawn by lot, winners go on, an odd one out goes on unbeaten."""
    chance, left = _chance(ordered), list(ordered)
    while len(left) > 1:
        chance.shuffle(left)
        winners = left[len(left) // 2 * 2 :]
        for one, other in zip(left[::2], left[1::2], strict=False):
            winner, loser = (one, other) if one.value >= other.value else (other, one)
            yield winner, loser
            winners.append(winner)
        left = winners


def _by_prompt(records: Sequence[R]) -> dict[Conversation, list[R]]:
    groups: dict[Conversation, list[R]] = {}
    for record in records:
        groups.setdefault(record.prompt, []).append(record)
    return groups


def _account(
    source: type[Record],
    target: type[Record],
    records: Sequence[Record],
    out: Sequence[Record],
    lost: str,
    dropped: Mapping[str, int] | None = None,
    **parameters: Any,
) -> Conversion:
    counted = {reason: count for reason, count in (dropped or {}).items() if count}
    return Conversion(name_of(source), name_of(target), len(records), len(out), lost, counted, parameters)


def _known(option: str, value: str, literal: Any) -> None:
    known = list(get_args(literal))
    if value not in known:
        raise ConfigError(f'{option}="{value}" is not known. Known: {", ".join(known)}.{nearest(str(value), known)}')


def _options_of(step: Step) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(step).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _check_options(source: str, target: str, steps: Sequence[Step], options: Mapping[str, Any]) -> None:
    known = {name: parameter for step in steps for name, parameter in _options_of(step).items()}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{name}={options[name]!r} has no effect on {source} -> {target}. "
                f"Options there: {', '.join(known) or 'none'}.{nearest(name, list(known))}"
            )
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(
                f"{source} -> {target} needs {name}=: there is no default that is right for every data set."
            )
