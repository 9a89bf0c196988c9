"""The choice among the layouts of ``shapes.py``.

A layout is known by its columns. Where two fit, the one that explains more columns is read; where two fit that would
give different kinds of feedback, nothing is guessed and the user names one with ``shape=``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence

from trimtab.errors import DataError, nearest
from trimtab.feedback.kinds import name_of
from trimtab.feedback.records import Demonstration, Prompt
from trimtab.feedback.rows import Row
from trimtab.feedback.shapes import IMPLICIT, SHAPES, Shape

SAMPLE = 100  # rows looked at where the columns alone do not tell two layouts apart
# A column of this name says how good an answer is: reading such rows as mere demonstrations would imitate the bad ones.
FEEDBACK_WORDS = (
    "label labels rating ratings reward score scores preference rank ranks winner vote thumb thumbs feedback desirable "
    "kto_tag is_correct correct chosen rejected rejected_response"
)
METADATA = frozenset(
    [
        "id",
        "idx",
        "index",
        "uid",
        "uuid",
        "source",
        "origin",
        "domain",
        "dataset",
        "category",
        "categories",
        "class",
        "topic",
        "tag",
        "tags",
        "type",
        "task",
        "subset",
        "split",
        "lang",
        "language",
        "locale",
        "name",
        "model",
        "url",
        "meta",
        "metadata",
        "date",
        "time",
        "timestamp",
        "version",
        "author",
        "license",
        "difficulty",
        "level",
    ]
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
            f'{source} has "chosen" and "rejected" but no "prompt", and {", ".join(texts)} beside them would be '
            f'ignored. If that is the prompt, pass columns={{"prompt": "{texts[0]}"}}; if both sides begin with the '
            f'prompt, pass shape="{IMPLICIT}".'
        )


def _is_text(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds texts or lists, as prompts and answers do, under a name that is not of metadata."""
    if METADATA & set(re.split(r"[\W_]+", column.lower())):
        return False
    return any(isinstance(row.get(column), str | list) for row in rows)


def _no_layout(found: Sequence[str], source: str) -> str:
    distances = [_distance(shape, found) for shape in SHAPES if shape.auto]
    # A layout that lacks nothing was refused for what it would leave out: it is not what the user meant.
    _, closest, missing, renames = max((d for d in distances if d[2] or d[1].fits), key=lambda d: d[0])
    if not renames and len(missing) == len(closest.needs):
        near = "None of them resembles a column of a known layout."
    elif missing:
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
