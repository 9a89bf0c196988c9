"""Judgements on disk, keyed by content: a run that starts again asks nobody twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.judges.base import Judge, Judgement, Kind, Preference, Question, Ranks, Scores, failures


@dataclass
class Cached(Judge):
    """A judge whose judgements are written to a file of lines as they come, and read from there the next time.

    The key is a hash of the judge's identity and of the whole question, so a changed prompt, model or answer misses. Failures
    are not kept: they are asked again. Each line is appended in one write; a line that a crash has cut is counted and asked
    again. Several processes may append to one file.

    Args:
        inner: the judge; its ``stop_after`` holds here too.
        file: .jsonl, made where it is not there.
    """

    inner: Judge
    file: Path
    table: dict[str, Judgement] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.stop_after, self.notes = self.inner.stop_after, self.inner.notes
        if self.file.suffix != ".jsonl" or not self.file.parent.is_dir():
            raise ConfigError(f"{self.file}: judgements are kept as .jsonl in a folder that exists. Name another file.")
        content = self.file.read_bytes() if self.file.exists() else b""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                self.table[row["key"]] = from_json(row["judgement"])
            except (ValueError, KeyError, TypeError):
                self.notes["damaged line of the cache, asked again"] += 1
        if content and not content.endswith(b"\n"):
            self._append(b"\n")

    @property
    def kind(self) -> Kind:
        return self.inner.kind

    @property
    def identity(self) -> str:
        return self.inner.identity

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        identity = self.identity
        keys = [q.digest(identity).hex() for q in questions]
        missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.table}
        self.notes["from the cache"] += sum(key not in missing for key in keys)
        fresh = zip(missing, self.inner.judgements(list(missing.values())), strict=True)
        now: dict[str, Judgement] = {}
        for key in keys:
            while key in missing and key not in now:
                asked, judgement = next(fresh)
                now[asked] = judgement
                if not failures(judgement):
                    self._keep(asked, identity, judgement)
            yield now[key] if key in missing else self.table[key]

    def _keep(self, key: str, identity: str, judgement: Judgement) -> None:
        line = {"key": key, "judge": identity, "judgement": to_json(judgement)}
        self._append(json.dumps(line).encode() + b"\n")
        self.table[key] = judgement

    def _append(self, line: bytes) -> None:
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


KINDS: dict[str, type[Any]] = {"scores": Scores, "preference": Preference, "ranks": Ranks}


def to_json(judgement: Judgement) -> dict[str, Any]:
    """A judgement without failures as one JSON object; numbers come back bit for bit."""
    return {"kind": type(judgement).__name__.lower(), **asdict(judgement)}


def from_json(row: dict[str, Any]) -> Judgement:
    """What :func:`to_json` wrote. Raises ``KeyError`` or ``TypeError`` for anything else."""
    body = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "kind"}
    return KINDS[row["kind"]](**body)  # type: ignore[no-any-return]
