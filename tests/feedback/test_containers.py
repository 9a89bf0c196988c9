"""Bytes to rows: every container reads alike, and a broken file is refused with its name and line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys

import pytest

from trimtab.errors import DataError
from trimtab.feedback import containers
from trimtab.feedback.read import read

ROWS = [
    {"prompt": "p", "chosen": 'a, "b"\nc', "rejected": "ü"},
    {"prompt": "q", "chosen": "c\u2028d", "rejected": "e"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES.encode()),
        ("x.json", LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("list.json", json.dumps(ROWS, indent=1).encode()),
        ("data.json", json.dumps({"data": ROWS, "version": 1}).encode()),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("x.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ],
)
def test_json_in_all_its_wrappings(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    table = containers.load(path)
    assert table.rows == ROWS
    assert (table.name, table.sha256) == (name, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_csv(tmp_path, name):
    as_csv(tmp_path / name, "\t" if name == "x.tsv" else ",")
    assert containers.load(tmp_path / name).rows == ROWS


def test_csv_cells_hold_messages_and_lists_but_text_stays_text(tmp_path):
    chat = json.dumps([{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}])
    path = tmp_path / "x.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages", "ranks", "completion"], [chat, "[1, 2]", "[1, 2]"]])
    assert containers.load(path).rows == [{"messages": json.loads(chat), "ranks": [1, 2], "completion": "[1, 2]"}]


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert containers.load(tmp_path / "x.parquet").rows == ROWS
    assert containers.load(tmp_path / "x.parquet", limit=1).rows == ROWS[:1]
    # parquet gives every row every column: the null ones do not count as found
    mixed = [{"prompt": "p", "chosen": "a", "rejected": "b", "label": None}] * 2
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet").shape == "trl preference"


def test_blank_lines_are_skipped_and_noted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(LINES.replace("\n", "\n\n"), encoding="utf-8")
    table = containers.load(path)
    assert (table.rows, table.notes) == (ROWS, ["1 blank line is not counted as a row"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", r"x.jsonl is empty \(0 rows\)"),
        ("x.jsonl", b" \n\n", r"x.jsonl is empty \(0 rows\)"),
        ("x.json", b"[]", r"x.json holds an empty list \(0 rows\)"),
        ("x.json", b"3", "x.json holds one int, not a list of rows"),
        ("x.jsonl", LINES.encode() + b'{"prompt": "p", "cho', r"x.jsonl line 3: not valid JSON \(Unterminated string"),
        ("x.json", b'[{"a": 1},\n {"a": 2,}]', "x.json line 2: not valid JSON"),
        ("x.json", b"[" * 100_000, "x.json is nested too deeply"),
        ("x.jsonl", b'{"prompt": "p"}\n{"prompt": "\xff"}', "x.jsonl line 2: byte 0xff is not UTF-8"),
        ("x.jsonl", "{}".encode("utf-16"), "x.jsonl is UTF-16 text: save it as UTF-8"),
        ("x.bin", b"\x7fELF\0\0\0", "x.bin is a binary file. Known: jsonl, json, csv, tsv"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "x.jsonl.gz is a damaged gzip file"),
        ("x.parquet", b"PAR1 and no more", "x.parquet is a damaged parquet file"),
        ("x.csv", b"a,b\n1,2\n1\n", "x.csv line 3: 1 fields, but the header has 2"),
        ("x.csv", b'a,b\n1,"2\n', "x.csv line 2: not valid csv"),
        ("x.csv", b"a,b,a\n1,2,3\n", "x.csv line 1: the header names a column twice: a"),
        ("x.csv", b"a,b\n", r"x.csv is empty \(0 rows below its header\)"),
        ("x.jsonl", b"{}\n" + b"[" * 100_000, "x.jsonl line 2 is nested too deeply"),
        ("x.json", b'["a", "b"]', "x.json: it holds str values, not rows of columns with names"),
    ],
)
def test_a_broken_file_is_refused_with_name_and_line(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path):
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"x.jsonl does not exist. In that folder: other.jsonl. For a hub data set"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="is a folder: name one file in it"):
        read(tmp_path)


class Rows(list):
    """As much of a datasets.Dataset as is used."""

    def select(self, numbers):
        return Rows(self[n] for n in numbers)


@pytest.fixture
def hub(monkeypatch):
    """The datasets library, answering as told and keeping what it was asked."""
    library = type(sys)("datasets")
    asked = []

    def answer(found):
        def load_dataset(path, name, split):
            asked.append((path, name, split))
            if isinstance(found, Exception):
                raise found
            return found

        library.load_dataset = load_dataset
        return asked

    monkeypatch.setitem(sys.modules, "datasets", library)
    return answer


def test_hub(hub):
    asked = hub({"test": Rows(), "train": Rows(ROWS)})
    reading = read("hub:org/name:small", limit=1)
    assert (reading.rows, reading.sha256, asked) == (1, "", [("org/name", "small", None)])
    assert 'split "train" was read of test, train; pass split= for another' in reading.notes
    assert str(reading.records[0].origin) == "hub:org/name:small row 1"
    hub(Rows(ROWS))
    assert read("hub:org/name", split="test").rows == 2


def test_the_hub_out_of_reach(hub):
    hub(ConnectionError("Couldn't reach 'org/name' on the Hub\nand a long story"))
    with pytest.raises(DataError) as refused:
        read("hub:org/name")
    assert str(refused.value) == (
        "hub:org/name could not be loaded (ConnectionError: Couldn't reach 'org/name' on the Hub). Check the name, the "
        "split and the network; where there is none, download the files elsewhere and pass the path of a file instead."
    )
    assert refused.value.__suppress_context__  # no chain of library tracebacks


def test_a_missing_library_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the datasets library: pip install 'trimtab\[data\]'"):
        read("hub:org/name")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs the pyarrow library: pip install 'trimtab\[data\]'"):
        read(tmp_path / "x.parquet")
