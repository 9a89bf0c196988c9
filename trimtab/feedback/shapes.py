"""The layouts that are read without being asked, as one table, and the choice among them.

A layout is known by its columns. Where two fit, the one that explains more columns is read; where two fit that would
give different kinds of feedback, nothing is guessed and the user names one with ``shape=``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trimtab.errors import DataError, nearest
from trimtab.feedback import layouts, published, split
from trimtab.feedback.kinds import KINDS, name_of
from trimtab.feedback.labels import PAIR, PAIR_LABEL, THUMB, THUMB_LABEL, Label
from trimtab.feedback.records import Comparison, Demonstration, Prompt, Ranking, Record, Score, Thumb
from trimtab.feedback.rows import Row

IMPLICIT = "trl preference, implicit prompt"
SAMPLE = 100  # rows looked at where the columns alone do not tell two layouts apart
PAIR_EXTRAS = ("tie", "is_tie", "strength", "margin", "score_chosen", "score_rejected")
ALPACA_EXTRAS = ("input", "system", "history")
# A column of this name says how good an answer is: reading such rows as mere demonstrations would imitate the bad ones.
FEEDBACK_WORDS = (
    "label labels rating ratings reward score scores preference rank ranks winner vote thumb thumbs feedback desirable "
    "kto_tag is_correct correct chosen rejected rejected_response"
)
METADATA = frozenset(
    ["id", "idx", "index", "uid", "uuid", "source", "origin", "domain", "dataset", "category", "categories", "class", "topic", "tag", "tags", "type", "task", "subset", "split", "lang", "language", "locale", "name", "model", "url", "meta", "metadata", "date", "time", "timestamp", "version", "author", "license", "difficulty", "level"]
)


@dataclass(frozen=True)
class Shape:
    """One layout: ``needs`` maps the name a column has here to the names it goes by, ``also`` lists optional ones.

    ``fits`` decides on the values of a row where the columns do not suffice; ``auto=False`` is read only when named;
    ``listed=False`` keeps near repetitions out of the list in error messages.
    """

    name: str
    kind: type[Record]
    reads: Callable[[Row], Record | layouts.Found]
    needs: Mapping[str, tuple[str, ...]]
    also: tuple[str, ...] = ()
    label: Label | None = None
    fits: Callable[[Row], bool] | None = None
    auto: bool = True
    listed: bool = True

    def columns(self, found: Iterable[str]) -> dict[str, str]:
        """``{name here: name in the file}`` of the needed columns that were found."""
        have = set(found)
        pairs = ((role, next((name for name in names if name in have), None)) for role, names in self.needs.items())
        return {role: name for role, name in pairs if name}

    def describe(self) -> str:
        """``"trl preference" (prompt, chosen, rejected)``: a line of the error that lists what is known."""
        return f'"{self.name}" ({", ".join(names[0] for names in self.needs.values())})'


def _named(*columns: str, **aliases: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {column: (column,) for column in columns} | aliases


LABEL = ("label", "kto_tag")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "query")
WINNER_NAMES = ("preference", "label", "winner", "better_response_id", "choice")
TWO_ANSWERS = (
    ("first", "second"),
    ("output_1", "output_2"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
)


def _coded(first: str, second: str) -> Shape:
    needs = _named(prompt=PROMPT_NAMES, first=(first,), second=(second,), preference=WINNER_NAMES)
    return Shape(
        f"coded pair {first}/{second}",
        Comparison,
        layouts.coded_pair,
        needs,
        (*PAIR_EXTRAS, "input", "system"),
        PAIR_LABEL,
        listed=first == "first",
    )


SHAPES: tuple[Shape, ...] = (
    Shape(
        "trimtab",
        Record,
        layouts.canonical,
        _named("kind", "prompt"),
        ("completion", "chosen", "rejected", "tie", "strength", "desirable", "ranked", "ranks", "score"),
        fits=lambda row: row.get("kind") in KINDS,
    ),
    # pairs
    Shape(
        "hh-rlhf transcript, prompt given",
        Comparison,
        layouts.transcript_prompt_pair,
        _named("prompt", "chosen", "rejected"),
        PAIR_EXTRAS,
        fits=lambda row: split.is_transcript(row.get("prompt")),
    ),
    Shape(
        "trl preference",
        Comparison,
        layouts.preference,
        _named("prompt", "chosen", "rejected"),
        (*PAIR_EXTRAS, "messages"),
    ),
    Shape(
        "hh-rlhf transcript",
        Comparison,
        layouts.transcript_pair,
        _named("chosen", "rejected"),
        PAIR_EXTRAS,
        fits=lambda row: split.is_transcript(row.get("chosen")),
    ),
    Shape(
        IMPLICIT,
        Comparison,
        layouts.preference_implicit,
        _named("chosen", "rejected"),
        PAIR_EXTRAS,
    ),
    Shape(
        "sharegpt preference",
        Comparison,
        layouts.sharegpt_pair,
        _named("conversations", "chosen", "rejected"),
        (*PAIR_EXTRAS, "system"),
    ),
    Shape(
        "alpaca preference",
        Comparison,
        layouts.alpaca_pair,
        _named("instruction", "chosen", "rejected"),
        (*PAIR_EXTRAS, *ALPACA_EXTRAS),
    ),
    Shape("ms-swift preference", Comparison, layouts.swift_pair, _named("messages", "rejected_response"), PAIR_EXTRAS),
    Shape(
        "llmbar",
        Comparison,
        layouts.coded_pair,
        _named(prompt=("input",), first=("output_1",), second=("output_2",), preference=("label",)),
        label=Label("preference", PAIR, {"1": "first", "2": "second"}),
        fits=lambda row: set(row) == {"input", "output_1", "output_2", "label"} and row["label"] in (1, 2),
    ),
    *(_coded(first, second) for first, second in TWO_ANSWERS),
    Shape(
        "coded pair of conversations",
        Comparison,
        layouts.coded_pair,
        _named(first=("conversation_a",), second=("conversation_b",), preference=WINNER_NAMES),
        PAIR_EXTRAS,
        PAIR_LABEL,
    ),
    # thumbs, scores, rankings
    Shape(
        "truthfulqa judge",
        Thumb,
        published.truthfulqa,
        _named("prompt", label=("completion",)),
        label=Label("label", THUMB, {"yes": "desirable", "no": "undesirable"}),
        fits=lambda row: str(row.get("prompt")).startswith("Q: ") and str(row.get("prompt")).endswith("\nTrue:"),
    ),
    Shape("trl thumb", Thumb, layouts.thumb, _named("prompt", "completion", label=LABEL), label=THUMB_LABEL),
    Shape("messages thumb", Thumb, layouts.messages_thumb, _named("messages", label=LABEL), label=THUMB_LABEL),
    Shape(
        "sharegpt thumb",
        Thumb,
        layouts.conversations_thumb,
        _named("conversations", label=LABEL),
        ("system",),
        THUMB_LABEL,
    ),
    Shape(
        "alpaca thumb",
        Thumb,
        layouts.alpaca_thumb,
        _named("instruction", "output", label=LABEL),
        ALPACA_EXTRAS,
        THUMB_LABEL,
    ),
    Shape("scores", Score, layouts.score, _named("prompt", "completion", score=("score", "reward"))),
    Shape("messages score", Score, layouts.messages_score, _named("messages", score=("score", "reward"))),
    Shape("score list", Score, layouts.score_list, _named("prompt", "completions", "scores")),
    Shape("ranking", Ranking, layouts.ranking, _named("prompt", "completions", "ranks")),
    # demonstrations and prompts
    Shape("trl prompt and completion", Demonstration, layouts.demonstration, _named("prompt", "completion")),
    Shape("messages", Demonstration, layouts.messages_demonstration, _named("messages")),
    Shape("sharegpt", Demonstration, layouts.conversations_demonstration, _named("conversations"), ("system",)),
    Shape("alpaca", Demonstration, layouts.alpaca_demonstration, _named("instruction", "output"), ALPACA_EXTRAS),
    Shape("self-instruct seed tasks", Demonstration, layouts.seed_task, _named("instruction", "instances")),
    Shape("question and answer", Demonstration, layouts.question_answer, _named("question", "answer")),
    Shape("prompt only", Prompt, layouts.prompt_only, _named("prompt")),
    # data sets with a layout of their own
    Shape(
        "finegrained comparisons",
        Comparison,
        published.finegrained_pairs,
        _named("question", "passages", "prediction 1", "prediction 2", "prediction 3", "prediction 4", "preference"),
    ),
    Shape(
        "finegrained ranking",
        Ranking,
        published.finegrained_ranking,
        _named("question", "passages", "prediction 1", "prediction 2", "prediction 3", "prediction 4", "preference"),
        auto=False,
    ),
    Shape(
        "halueval",
        Thumb,
        published.halueval,
        _named("user_query", "chatgpt_response", label=("hallucination",)),
        label=Label("label", THUMB, {"no": "desirable", "yes": "undesirable"}),
    ),
    Shape(
        "halluqa",
        Comparison,
        published.halluqa,
        _named("Question", "Best Answer1", "Wrong_Answer1"),
        tuple(f"{kind}{n}" for kind in ("Best Answer", "Wrong_Answer") for n in (2, 3, 4)),
    ),
    Shape(
        "gsm8k graded solutions",
        Thumb,
        published.graded_solutions,
        _named("question", "ground_truth"),
        ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"),
        fits=lambda row: any(published.is_graded(value) for value in row.values()),
    ),
    Shape("hhh grading prompts", Comparison, published.hhh_judge, _named("chosen_instruction", "rejected_instruction")),
)


def choose(rows: Sequence[Row], name: str, source: str) -> Shape:
    """The layout called ``name``, or for ``"auto"`` the one these rows fit. Raises :class:`DataError`."""
    # A column that is null in most rows is another layout's remainder (parquet unions schemas), so it does not decide.
    counts: dict[str, int] = {}
    for row in rows:
        for column, value in row.items():
            counts[column] = counts.get(column, 0) + (value is not None)
    found = [column for column, count in counts.items() if 2 * count >= len(rows)]
    if name != "auto":
        return _by_name(name, found, source)
    fitting = [shape for shape in SHAPES if shape.auto and _fits(shape, found, rows)]
    if any(shape.name == "trimtab" for shape in fitting):
        return fitting[0]
    best = _most_specific(fitting, found)
    if not best:
        raise DataError(_no_layout(found, source))
    if len(best) > 1:
        both = ", ".join(f"{shape.describe()} -> {name_of(shape.kind)}" for shape in best)
        raise DataError(f"{source} fits several layouts: {both}. Say which one with shape=.")
    _refuse_hidden_columns(best[0], found, rows, source)
    return best[0]


def _by_name(name: str, found: Sequence[str], source: str) -> Shape:
    shape = next((shape for shape in SHAPES if shape.name == name.lower()), None)
    if shape is None:
        known = [shape.name for shape in SHAPES]
        raise DataError(f'shape="{name}" is not known.{nearest(name, known)} Known: auto; {"; ".join(known)}.')
    missing = [role for role in shape.needs if role not in shape.columns(found)]
    if missing:
        raise DataError(
            f'{source} lacks {", ".join(missing)}, which shape="{shape.name}" needs. '
            f"Columns found: {', '.join(found)}. "
            f'Rename with columns={{"{missing[0]}": "its name in the file"}}.'
        )
    return shape


def _fits(shape: Shape, found: Sequence[str], rows: Sequence[Row]) -> bool:
    if len(shape.columns(found)) < len(shape.needs):
        return False
    sample = rows[:SAMPLE]
    return shape.fits is None or 2 * sum(map(shape.fits, sample)) > len(sample)


def _most_specific(fitting: list[Shape], found: Sequence[str]) -> list[Shape]:
    """The layouts left after those that another explains better; one is the answer, several are an open question."""
    explains = {shape.name: frozenset(shape.columns(found).values()) for shape in fitting}
    left: list[Shape] = []
    for shape in fitting:
        mine = explains[shape.name]
        # Of two with the same columns the first in the table looked at the values, or is the usual reading.
        if not any(mine < explains[o.name] for o in fitting) and not any(mine == explains[o.name] for o in left):
            left.append(shape)
    said = [shape for shape in left if shape.kind not in (Demonstration, Prompt)] or left
    if len({shape.kind for shape in said}) > 1:
        return said
    most = max((len(explains[shape.name]) for shape in said), default=0)
    return [shape for shape in said if len(explains[shape.name]) == most]


def _refuse_hidden_columns(shape: Shape, found: Sequence[str], rows: Sequence[Row], source: str) -> None:
    """Refuse a layout that would leave out what matters: a verdict beside a demonstration, answers beside a prompt, or
    the prompt itself beside two strings."""
    known = {*shape.columns(found).values(), *shape.also}
    others = [column for column in found if column not in known]
    verdicts = [column for column in others if column.lower() in FEEDBACK_WORDS.split()]
    texts = [column for column in others if _is_text(rows[:SAMPLE], column)]
    if shape.kind is Prompt and (verdicts or texts):
        raise DataError(_no_layout(found, source))
    if shape.kind is Demonstration and verdicts:
        raise DataError(
            f'{source} has the columns of "{shape.name}", but "{verdicts[0]}" beside them would be ignored, and bad '
            f'answers imitated. Say what it is: columns={{"score": "{verdicts[0]}"}} if it is a number, '
            f'columns={{"label": "{verdicts[0]}"}} if it is a verdict; or leave it out with shape="{shape.name}".'
        )
    if shape.name == IMPLICIT and texts and isinstance(rows[0].get("chosen"), str):
        raise DataError(
            f'{source} has "chosen" and "rejected" but no "prompt", and {", ".join(texts)} beside them would be ignored. '
            f'If that is the prompt, pass columns={{"prompt": "{texts[0]}"}}; if both sides begin with the prompt, pass '
            f'shape="{IMPLICIT}".'
        )


def _is_text(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds texts or lists, as prompts and answers do, under a name that is not of metadata."""
    if METADATA & set(re.split(r"[\W_]+", column.lower())):
        return False
    return any(isinstance(row.get(column), str | list) for row in rows)


def _no_layout(found: Sequence[str], source: str) -> str:
    closest, missing, renames = max((_distance(shape, found) for shape in SHAPES if shape.auto), key=lambda d: d[0])[1:]
    if missing:
        near = f"Nearest: {closest.describe()}, which lacks {', '.join(missing)}."
    else:
        near = f"Nearest: {closest.describe()}, but the values in these columns are not of that layout."
    example = renames or dict.fromkeys(missing[:1], "its name in the file")
    hint = f" Rename with columns={json.dumps(example, ensure_ascii=False)}." if example else ""
    known = "; ".join(shape.describe() for shape in SHAPES if shape.listed)
    return (
        f"{source}: the columns found fit no known layout. Found: {', '.join(found) or 'none'}. {near}{hint} "
        f"Known: {known}."
    )


def _distance(shape: Shape, found: Sequence[str]) -> tuple[float, Shape, list[str], dict[str, str]]:
    """How near a layout is, what it lacks, and which columns look like misspellings of that."""
    have = shape.columns(found)
    missing = [role for role in shape.needs if role not in have]
    spare = [column for column in found if column not in {*have.values(), *shape.also}]
    close = {role: difflib.get_close_matches(role, spare, n=1, cutoff=0.7) for role in missing}
    renames = {role: match[0] for role, match in close.items() if match}
    explained = (len(have) + len(renames)) / len(shape.needs)
    # A layout that lacks as many columns as there are to spare is likelier than one that would leave some unread.
    return explained - 0.25 * abs(len(missing) - len(spare)) - (shape.fits is not None), shape, missing, renames
