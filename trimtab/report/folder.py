"""A run folder, read without trusting it: the run may have been killed between any two bytes.

Nothing here raises over content. What cannot be read is left out and said in ``notes``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.report.stats import Interval
from trimtab.report.text import plural

Points = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class RunFolder:
    """What was found: the run card, one curve per metric as (step, value) points, and the samples."""

    path: Path
    card: dict[str, Any]
    curves: Points
    samples: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def section(self, *keys: str) -> dict[str, Any]:
        """A nested object of the card, empty where it is missing or is not an object."""
        return descend(self.card, *keys)


def read_folder(folder: Path) -> RunFolder:
    """Read ``run.json``, ``metrics.jsonl``, ``samples.jsonl`` and, for a demo over several seeds, ``demo.json``."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder of a run: the one that holds run.json.")
    notes: list[str] = []
    demo = _read_object(folder / "demo.json", notes)
    base = folder
    if demo and not (folder / "run.json").exists():
        base = _inside(folder, demo.get("run")) or folder
    if not any((base / name).exists() for name in ("run.json", "metrics.jsonl")):
        raise DataError(f"{folder} holds neither run.json nor metrics.jsonl, so it is not the folder of a run.")
    card = _read_object(base / "run.json", notes)
    if not (base / "run.json").exists():
        notes.append("There is no run.json: the run ended before it wrote its card.")
    for key in ("seeds", "gain", "gain_over_seeds", "kl", "length"):
        if key in demo and key not in card:
            card[key] = demo[key]
    curves = _curves(_read_lines(base / "metrics.jsonl", notes), notes)
    samples = [row for row in _read_lines(base / "samples.jsonl", notes) if "before" in row or "after" in row]
    return RunFolder(folder, card, curves, samples, notes)


def descend(data: object, *keys: str) -> dict[str, Any]:
    """``data[key][key]...`` as an object, or an empty one."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def strings(data: object) -> list[str]:
    """A list of texts from a list, from one text, or from nothing."""
    if isinstance(data, str):
        return [data]
    return [item for item in data if isinstance(item, str)] if isinstance(data, list) else []


def real(data: object) -> float | None:
    """A float, NaN and infinity included (also as the strings some writers use); ``None`` for what is no number."""
    if isinstance(data, bool):
        return None
    if isinstance(data, str) and data.strip().lower().lstrip("+-") not in ("nan", "inf", "infinity"):
        return None
    if isinstance(data, int | float | str):
        try:
            return float(data)
        except OverflowError:
            return math.inf
    return None


def total(data: object) -> float:
    """A count, or the sum of an object of counts (one for each side); 0 for anything else."""
    if isinstance(data, dict):
        return sum(total(value) for value in data.values() if not isinstance(value, dict))
    value = real(data)
    return value if value is not None and math.isfinite(value) else 0.0


def intervals(data: object) -> dict[str, Interval]:
    """Every entry of an object that is a figure."""
    found = {str(key): Interval.from_json(value) for key, value in descend(data).items()}
    return {key: value for key, value in found.items() if value is not None}


def _inside(folder: Path, name: object) -> Path | None:
    """A sub-folder by name; a name that leads out of the folder is not followed."""
    if not isinstance(name, str) or not name or "\x00" in name:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_dir() else None


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_bytes().decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is damaged or half-written, so nothing was taken from it.")
        return {}
    if not isinstance(data, dict):
        notes.append(f"{path.name} holds no JSON object, so nothing was taken from it.")
        return {}
    return data


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    lines = path.read_bytes().split(b"\n")
    last = max((i for i, line in enumerate(lines, 1) if line.strip()), default=0)
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif i == last and lines[-1].strip():
            notes.append(
                f"The last line of {path.name} is half-written and was left out. The run stopped while writing."
            )
        else:
            bad.append(i)
    if bad:
        where = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        notes.append(f"{plural(len(bad), 'line')} of {path.name} could not be read and were left out (line {where}).")
    return rows


def _curves(rows: list[dict[str, Any]], notes: list[str]) -> Points:
    """One list of points per key, ordered by step. A resumed run logs some steps twice: the later line holds."""
    found: dict[str, dict[float, float]] = {}
    stepless = repeated = 0
    for row in rows:
        step = real(row.get("step"))
        if step is None or not math.isfinite(step):
            stepless += 1
            continue
        known = fresh = 0
        for key, raw in row.items():
            value = real(raw)
            if value is None or key in ("step", "epoch"):
                continue
            name = "eval/" + key[5:] if key.startswith("eval_") else key
            points = found.setdefault(name, {})
            known, fresh = known + (step in points), fresh + (step not in points)
            points[step] = value
        repeated += known > 0 and not fresh
    if stepless:
        notes.append(f"{plural(stepless, 'line')} of metrics.jsonl name no step and were left out.")
    if repeated:
        notes.append(f"{plural(repeated, 'step')} were logged twice, as after a resume; the later figures are shown.")
    return {key: sorted(points.items()) for key, points in found.items()}
