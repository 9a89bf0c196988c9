"""Any known file or hub data set -> records of one kind, with an account of every row that did not make it.

>>> reading = read("prefs.jsonl")           # doctest: +SKIP
>>> reading.shape, len(reading.records), reading.dropped    # doctest: +SKIP
('trl preference', 4998, {'chosen equals rejected': 2})
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import DataError, FeedbackKindError, nearest
from trimtab.feedback.containers import load
from trimtab.feedback.detect import choose
from trimtab.feedback.kinds import counted, kind_of, name_of
from trimtab.feedback.labels import translator
from trimtab.feedback.records import Comparison, Origin, Record, Thumb
from trimtab.feedback.rows import Problem, Row, check
from trimtab.feedback.shapes import Shape

EXAMPLES = 5


@dataclass(frozen=True)
class Reading:
    """What was read. ``dropped`` counts by reason; ``examples`` holds the first few row numbers, from 1, of each.

    In a layout with several records per row a reason counts records; elsewhere rows = records + dropped.
    """

    records: list[Record]
    shape: str
    rows: int
    dropped: dict[str, int]
    examples: dict[str, list[int]]
    notes: list[str]
    sha256: str

    @property
    def kind(self) -> type[Record]:
        """The one kind of all records."""
        return type(self.records[0])

    def __str__(self) -> str:
        """A few lines for the terminal and the run card."""
        lines = [f"{counted(len(self.records), name_of(self.kind))} from {counted(self.rows, 'row')} ({self.shape})"]
        for reason, count in self.dropped.items():
            lines.append(f"  dropped {count:,}: {reason} (rows {', '.join(f'{n:,}' for n in self.examples[reason])})")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def read(
    source: str | Path,
    *,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    bad_rows: Literal["drop", "refuse"] = "drop",
    split: str | None = None,
    limit: int | None = None,
) -> Reading:
    """Records from a file (jsonl, json, csv, tsv, parquet, also gzipped) or from ``hub:org/name``.

    ``columns`` maps a name of the layout to the name in the file: ``{"chosen": "better"}``. ``labels`` maps a label
    code to its meaning: ``{"1": "first", "2": "second", "0": "tie"}`` or ``{"1": "desirable", "0": "undesirable"}``;
    the meaning ``"drop"`` leaves such rows out. ``bad_rows="refuse"`` raises at the first bad row, naming it, where
    ``"drop"`` counts it. ``limit`` reads only the first rows.

    Raises :class:`DataError` for a file that cannot be decoded, columns of no known layout, label codes without a
    meaning, and a file none of whose rows can be used.
    """
    if bad_rows not in ("drop", "refuse"):
        raise DataError(
            f'bad_rows="{bad_rows}" is not known. Known: drop, refuse.{nearest(bad_rows, ["drop", "refuse"])}'
        )
    table = load(source, split=split, limit=limit)
    rows = _rename(table.rows, columns or {}, table.name)
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        raise DataError(f"{table.name}: it holds {type(rows[0]).__name__} values, not rows of columns with names.")
    chosen = choose(objects, shape, table.name)
    prepare, notes = _preparation(chosen, objects, columns or {}, labels, table.name)

    records: list[Record] = []
    dropped: Counter[str] = Counter()
    examples: dict[str, list[int]] = {}
    for number, row in enumerate(rows, start=1):
        origin = Origin(table.name, number)
        for found in _records_of(row, chosen, prepare):
            if isinstance(found, Record):
                records.append(replace(found, origin=origin))
            elif bad_rows == "refuse":
                raise DataError(f"{origin}: {found}")
            else:
                dropped[found.reason] += 1
                where = examples.setdefault(found.reason, [])
                if len(where) < EXAMPLES and number not in where:
                    where.append(number)
    counts = dict(dropped.most_common())
    if not records:
        raise DataError(_all_dropped(table.name, chosen, len(rows), counts, examples))
    _one_kind(records, table.name)
    contradicting = contradictions(records)
    if contradicting and bad_rows == "refuse":
        raise DataError(f"{table.name}: {contradicting} Keep one of them, or read with bad_rows=drop to keep all.")
    notes = [*table.notes, *notes, *_implicit_note(chosen, len(records), len(rows)), *filter(None, [contradicting])]
    return Reading(records, chosen.name, len(rows), counts, examples, notes, table.sha256)


def write(records: Iterable[Record], path: str | Path) -> None:
    """One canonical line per record, to ``.jsonl`` or ``.jsonl.gz``; :func:`read` gives the same records back.

    The file appears whole or not at all: it is written beside its place and then moved there. The same records give
    the same bytes. Raises :class:`DataError` for another suffix, for no records, for one that reading would refuse and
    where the folder is missing, and :class:`FeedbackKindError` for several kinds.
    """
    path = Path(path).expanduser()
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path.name}: feedback is written as .jsonl or .jsonl.gz. Change the suffix.")
    records = list(records)
    if not records:
        raise DataError(f"{path.name}: there are no records to write.")
    kind_of(records)
    for number, record in enumerate(records, start=1):
        try:
            check(record)
        except Problem as problem:
            raise DataError(f"{path.name}: record {number:,} could not be read back: {problem}") from None
    text = "".join(_line(record) for record in records)
    content = text.encode("utf-8")
    if path.name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no time stamp inside, so equal records give equal files
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def contradictions(records: Sequence[Record]) -> str:
    """A sentence about pairs preferred both ways and completions both up and down, or an empty string.

    They are feedback too (people disagree), so reading keeps them; a method without a tie can only average over them.
    """
    said: dict[object, dict[object, Origin]] = {}
    for record in records:
        match record:
            case Comparison():
                pair = frozenset((record.chosen, record.rejected))
                verdict: object = "tie" if record.tie else record.chosen
                said.setdefault((record.prompt, pair), {}).setdefault(verdict, record.origin)
            case Thumb():
                said.setdefault((record.prompt, record.completion), {}).setdefault(record.desirable, record.origin)
            case _:
                return ""
    against = [list(verdicts.values()) for verdicts in said.values() if len(verdicts) > 1]
    if not against:
        return ""
    if isinstance(records[0], Comparison):
        what = f"{counted(len(against), 'pair')} judged in two ways"
    else:
        what = f"{counted(len(against), 'completion')} both up and down"
    shown = "; ".join(" and ".join(f"{origin.row:,}" for origin in origins) for origins in against[:3])
    return f"{what} (rows {shown}{'; ...' if len(against) > 3 else ''})."


def _line(record: Record) -> str:
    line = json.dumps(record.to_json(), ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can carry it
        line = json.dumps(record.to_json())
    return line + "\n"


def _rename(rows: list[Any], columns: Mapping[str, str], source: str) -> list[Any]:
    if not columns:
        return rows
    found = list(dict.fromkeys(column for row in rows if isinstance(row, dict) for column in row))
    for here, there in columns.items():
        if there not in found:
            turned = (
                " It is written the other way round: name here first, name in the file second." if here in found else ""
            )
            raise DataError(
                f'{source} has no column "{there}" (asked for by columns={{"{here}": "{there}"}}).{turned}'
                f"{nearest(there, found)} Found: {', '.join(found)}."
            )
    taken = {there: here for here, there in columns.items()}
    # A column whose name is wanted for another one steps aside: the user has just said what it is not.
    return [
        {taken.get(k, k): v for k, v in row.items() if k in taken or k not in columns} if isinstance(row, dict) else row
        for row in rows
    ]


def _preparation(
    shape: Shape, rows: Sequence[Row], renamed: Mapping[str, str], labels: Mapping[str, str] | None, source: str
) -> tuple[Callable[[Row], Row], list[str]]:
    """What is done to every row before its layout reads it: columns get their names here, codes get their meaning."""
    found = list(dict.fromkeys(column for row in rows for column, value in row.items() if value is not None))
    names = shape.columns(found)
    readable = {*names.values(), *shape.also}
    for here in renamed:
        if here not in readable:
            known = sorted({*shape.needs, *shape.also})
            raise DataError(
                f'{source}: columns={{"{here}": ...}} has no effect, because "{shape.name}" reads no "{here}". '
                f"It reads {', '.join(known)}.{nearest(here, known)}"
            )
    unused = [column for column in found if column not in readable]
    notes = [f"columns not used: {', '.join(unused)}"] if unused else []
    moved = {there: here for here, there in names.items() if here != there}

    def rename(row: Row) -> Row:
        return {moved.get(column, column): value for column, value in row.items()} if moved else row

    if shape.label is None:
        if labels:
            raise DataError(
                f'{source}: labels= has no effect, because "{shape.name}" has no label column to translate.'
            )
        return rename, notes
    column = names[shape.label.role]
    column = renamed.get(column, column)
    translate, more = translator(shape.label, column, map(rename, rows), labels, source)
    return lambda row: translate(rename(row)), [*notes, *more]


def _records_of(row: Any, shape: Shape, prepare: Callable[[Row], Row]) -> Iterator[Record | Problem]:
    try:
        if not isinstance(row, dict):
            raise Problem("row is not an object", f"the row is a {type(row).__name__}, not columns with names.")
        found = shape.reads(prepare(row))
    except Problem as problem:
        yield problem
        return
    for item in [found] if isinstance(found, Record) else found:
        try:
            yield item if isinstance(item, Problem) else check(item)
        except Problem as problem:
            yield problem


def _one_kind(records: Sequence[Record], source: str) -> None:
    try:
        kind_of(records)
    except FeedbackKindError as error:
        raise DataError(f"{source}: {error} Write one file per kind.") from None


def _implicit_note(shape: Shape, kept: int, rows: int) -> list[str]:
    if "prompt" in shape.needs or {"chosen", "rejected"} != set(shape.needs):
        return []
    return [
        f"in {kept:,} of {counted(rows, 'row')} both sides begin with the same prompt; "
        "it ends where a message, a turn or a word does"
    ]


def _all_dropped(
    source: str, shape: Shape, rows: int, dropped: Mapping[str, int], where: Mapping[str, list[int]]
) -> str:
    if not dropped:
        return f'{source}: {counted(rows, "row")} and no record in the layout "{shape.name}". Pass shape= for another.'
    reasons = "; ".join(f"{reason}: {count:,} (first in row {where[reason][0]:,})" for reason, count in dropped.items())
    used = f'none of {counted(rows, "row")} can be used as "{shape.name}"'
    return f"{source}: {used}. {reasons}. Correct them, or pass shape=."
