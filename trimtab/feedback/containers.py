"""Bytes to rows: jsonl, json, csv and tsv, parquet, each also gzipped where that is usual, and hub data sets.

Nothing here knows what a row means. A file that cannot be decoded is refused as a whole, with its name and the line:
a broken line means a truncated download or a wrong file, and the rows around it deserve no trust.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.errors import DataError

HUB = "hub:"
# A cell of a csv file is text; these columns hold lists when they are written by other tools, so they are JSON there.
LIST_COLUMNS = frozenset(
    ["messages", "conversations", "completions", "ranks", "scores", "instances", "passages", "history", "preference"]
)


@dataclass(frozen=True)
class Table:
    """Rows as they were found. ``name`` is what messages call the source; ``sha256`` is of the file's own bytes."""

    name: str
    rows: list[Any]
    sha256: str = ""
    notes: list[str] = field(default_factory=list)


def load(source: str | Path, *, split: str | None = None, limit: int | None = None) -> Table:
    """The rows of a file or of ``hub:org/name``; at most ``limit`` of them. Raises :class:`DataError`."""
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} reads no rows: pass a positive number, or None for all rows.")
    if str(source).startswith(HUB):
        return _load_hub(str(source)[len(HUB) :], split, limit)
    if split is not None:
        raise DataError(
            f'split="{split}" has no effect on the file {source}: only hub data sets have splits. Remove it.'
        )
    path = Path(source).expanduser()
    raw = _read_bytes(path)
    digest = hashlib.sha256(raw).hexdigest()
    name, content = path.name, _unzip(path.name, raw)
    if not content.strip():
        raise DataError(f"{name} is empty (0 rows). Check the path, or the command that wrote it.")
    if content.startswith(b"PAR1"):
        return Table(name, _parquet_rows(name, content, limit), digest)
    text = _decode(name, content)
    if Path(name.removesuffix(".gz")).suffix.lower() in (".csv", ".tsv"):
        lines = list(islice(_csv_rows(name, text), limit))
        if not lines:
            raise DataError(f"{name} is empty (0 rows below its header). Check the command that wrote it.")
        return Table(name, lines, digest)
    rows, notes = _json_rows(name, text, limit)
    return Table(name, rows, digest, notes)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        nearby = sorted(p.name for p in path.parent.glob("*.*"))[:5] if path.parent.is_dir() else []
        hint = f" In that folder: {', '.join(nearby)}." if nearby else f" The folder {path.parent} holds no files."
        raise DataError(f"{path} does not exist.{hint} For a hub data set write hub:org/name.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: name one file in it.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _unzip(name: str, raw: bytes) -> bytes:
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name} is a damaged gzip file ({error}). Download or write it again.") from None


def _decode(name: str, content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16 text: save it as UTF-8.")
    if b"\0" in content[:8192]:
        raise DataError(f"{name} is a binary file. Known: jsonl, json, csv, tsv (each also .gz) and parquet.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad = content[error.start]
        raise DataError(f"{name} line {line:,}: byte 0x{bad:02x} is not UTF-8. Save the file as UTF-8.") from None


def _json_rows(name: str, text: str, limit: int | None) -> tuple[list[Any], list[str]]:
    """Rows of a JSON list, of ``{"data": [...]}``, or of JSON lines whatever the file's suffix says."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # "Extra data": a complete first value and then more, so JSON lines
            raise _bad_json(name, error.lineno, error) from None
        return _json_lines(name, text, limit)
    except RecursionError:
        raise DataError(f"{name} is nested too deeply to be a file of feedback.") from None
    if isinstance(whole, dict):
        data = whole.get("data")
        whole = data if isinstance(data, list) else [whole]
    if not isinstance(whole, list):
        raise DataError(f"{name} holds one {type(whole).__name__}, not a list of rows. Known: JSON lines or a list.")
    if not whole:
        raise DataError(f"{name} holds an empty list (0 rows). Check the command that wrote it.")
    return whole[:limit], []


def _json_lines(name: str, text: str, limit: int | None) -> tuple[list[Any], list[str]]:
    rows: list[Any] = []
    blank = 0
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            blank += 1
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _bad_json(name, number, error) from None
        except RecursionError:
            raise DataError(f"{name} line {number:,} is nested too deeply to be feedback.") from None
    note = "1 blank line is not counted as a row" if blank == 1 else f"{blank:,} blank lines are not counted as rows"
    return rows, [note] if blank else []


def _bad_json(name: str, line: int, error: json.JSONDecodeError) -> DataError:
    near = error.doc[max(0, error.pos - 20) : error.pos + 20].replace("\n", "\\n")
    return DataError(
        f"{name} line {line:,}: not valid JSON ({error.msg} at column {error.colno}, near {near!r}). "
        "Correct the line, or write the file again if it was cut off."
    )


def _csv_rows(name: str, text: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KB is shorter than some completions
    delimiter = "\t" if ".tsv" in name.lower() else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            twice = sorted({column for column in header if header.count(column) > 1})
            raise DataError(f"{name} line 1: the header names a column twice: {', '.join(twice)}. Rename one.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{name} line {reader.line_num:,}: {len(cells)} fields, but the header has {len(header)}. "
                    'Quote text that holds commas, quotes or line breaks, and write a quote inside as "".'
                )
            yield {column: _cell(column, cell) for column, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num:,}: not valid csv ({error}).") from None


def _cell(column: str, cell: str) -> Any:
    """Text, unless it can only be JSON: a list column, or a list of messages where a string was possible too."""
    if not cell.startswith(("[", "{")):
        return cell
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    first = value[0] if isinstance(value, list) and value else value
    is_message = isinstance(first, dict) and ({"role", "content"} <= set(first) or {"from", "value"} <= set(first))
    return value if is_message or column in LIST_COLUMNS else cell


def _parquet_rows(name: str, content: bytes, limit: int | None) -> list[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"Reading {name} needs the pyarrow library: pip install 'trimtab[data]'.") from None
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is a damaged parquet file ({str(error).splitlines()[0]}). Write it again.") from None
    if not table.num_rows:
        raise DataError(f"{name} is empty (0 rows). Check the command that wrote it.")
    return list(table.slice(0, limit).to_pylist())


def _load_hub(name: str, split: str | None, limit: int | None) -> Table:
    """``org/name`` or ``org/name:configuration`` through the datasets library, from the network or its local cache."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"Reading hub:{name} needs the datasets library: pip install 'trimtab[data]'.") from None
    path, _, configuration = name.partition(":")
    notes: list[str] = []
    try:
        found = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # a dozen types, and for the user all of them mean "could not be had"
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"hub:{name} could not be loaded ({type(error).__name__}: {cause}). Check the name, the split and the "
            "network; where there is none, download the files elsewhere and pass the path of a file instead."
        ) from None
    if isinstance(found, dict):
        chosen = "train" if "train" in found else next(iter(found))
        if len(found) > 1:
            notes.append(f'split "{chosen}" was read of {", ".join(found)}; pass split= for another')
        found = found[chosen]
    if limit is not None:
        found = found.select(range(min(limit, len(found))))
    rows = list(found)
    if not rows:
        raise DataError(f"hub:{name} is empty (0 rows): pass another split.")
    return Table(HUB + name, rows, notes=notes)
