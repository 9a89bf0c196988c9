"""What a round has sampled and what was said of it, on disk: a line is written when it is known, and never twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.judges.base import Failure, Judgement, Preference, Ranks, Scores
from trimtab.judges.cached import from_json, to_json
from trimtab.online.sample import Answer


@dataclass(frozen=True)
class Drawn:
    """A prompt of a round with its answers: the sampled ones, then the greedy one where the method asks for it."""

    place: int  # in the run's list of prompts
    answers: tuple[Answer, ...]


class Kept:
    """The folder of a round."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.records, self.columns = folder, folder / "records.jsonl", folder / "columns.safetensors"
        self.about = folder / "round.json"
        self._samples, self._judgements = folder / "samples.jsonl", folder / "judgements.jsonl"

    def figures(self) -> dict[str, float]:
        """What :attr:`about` says of a round that was made before; empty where it was not."""
        told = json.loads(self.about.read_text()) if self.about.exists() else {}
        return {k: v for k, v in told.items() if k != "judge"}

    def drawn(self) -> dict[int, Drawn]:
        """Place -> the prompt's answers."""
        return {
            line["place"]: Drawn(
                line["place"], tuple(Answer(tuple(a["ids"]), a["ended"], tuple(a["logps"])) for a in line["answers"])
            )
            for line in _lines(self._samples)
        }

    def add_drawn(self, found: Sequence[Drawn]) -> None:
        lines = [
            {"place": d.place, "answers": [{"ids": a.ids, "ended": a.ended, "logps": a.logps} for a in d.answers]}
            for d in found
        ]
        _append(self._samples, lines)

    def judged(self) -> dict[int, Judgement]:
        """Place -> what the judge said of the prompt's answers."""
        return {line["place"]: _judgement(line) for line in _lines(self._judgements)}

    def add_judged(self, said: Mapping[int, Judgement]) -> None:
        _append(self._judgements, [{"place": p, **_line(j)} for p, j in said.items()])


def _line(judgement: Judgement) -> dict[str, Any]:
    match judgement:
        case Scores(scores):
            return {"scores": [asdict(s) if isinstance(s, Failure) else s for s in scores]}
        case Failure():
            return {"failure": asdict(judgement)}
        case Preference() | Ranks():
            return to_json(judgement)


def _judgement(line: dict[str, Any]) -> Judgement:
    if "failure" in line:
        return Failure(**line["failure"])
    if "kind" in line:
        return from_json({k: v for k, v in line.items() if k != "place"})
    return Scores(tuple(Failure(**s) if isinstance(s, dict) else s for s in line["scores"]))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The complete lines; one that was cut short by a kill is as if it had never been."""
    if not file.exists():
        return
    whole = file.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with file.open("r+b") as f:
            f.truncate(end)
    for line in whole[:end].splitlines():
        yield json.loads(line)


def _append(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        f.flush()
        os.fsync(f.fileno())


def write_whole(file: Path, text: str) -> None:
    """Whole or not at all."""
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(text)
    part.replace(file)
