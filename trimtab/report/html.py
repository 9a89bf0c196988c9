"""One run folder in, one ``report.html`` out: a single file that opens anywhere, offline, in ten years.

The page carries a content security policy: nothing may be fetched, and only the one script whose hash is named may run.
Should escaping ever fail, a model's answer still cannot execute or phone home.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trimtab.errors import DataError
from trimtab.report.alarms import find_alarms
from trimtab.report.charts import EXTRA, GUIDES, PLAIN, Chart, draw
from trimtab.report.folder import RunFolder, descend, intervals, read_folder, real, strings, total
from trimtab.report.stats import Interval
from trimtab.report.text import as_text, clip, duration, inert, number, plural, setting, without_secrets
from trimtab.report.verdict import figure_text, headlines, judge, measure, state_of

OPEN, SHOWN, MORE = 6, 40, 24  # samples unfolded, samples in the page, further charts
_ARXIV = re.compile(r"(?:arxiv:|https?://arxiv\.org/(?:abs|pdf)/)?\s*(\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+/\d{7})", re.I)
_LABELS = {
    "layout": "token layout",
    "precision": "precision",
    "fallback": "fallback",
    "peak_memory_gb": "peak memory, GB",
    "tokens_per_second": "tokens per second",
    "eos_lost": "answers without their end-of-text token",
    "truncated_rows": "rows cut",
    "tokens_lost": "tokens cut",
    "held_out": "held out",
}


@dataclass(frozen=True)
class Sample:
    """One prompt, its answers before and after, and what changed; texts are clipped, never cut silently."""

    prompt: tuple[str, int]
    before: tuple[str, int] | None
    after: tuple[str, int] | None
    same: bool
    old: str
    new: str
    gain: str
    tone: str


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder, finished or not, and return its path."""
    folder = Path(run_folder)
    page = render(read_folder(folder))
    target, draft = folder / "report.html", folder / f".report.{os.getpid()}.tmp"
    try:
        draft.write_text(page, encoding="utf-8", newline="\n")
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DataError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target


def render(run: RunFolder) -> str:
    """The page as text."""
    card, outcome, alarms = run.card, measure(run), find_alarms(run)
    charts = []
    for guide in GUIDES:
        chart = draw(guide, run.curves)
        if chart is not None:
            about = [i for i, alarm in enumerate(alarms, 1) if alarm.chart == guide.id]
            charts.append(replace(chart, alarms=about))
    more, left_out = _more(run)
    samples, counts, bars = _samples(run)
    explain = run.section("explain")
    paper = explain.get("paper")
    environment = _environment()
    script = environment.get_template("script.js.j2").render()
    page = environment.get_template("report.html.j2").render(
        title=explain.get("title") if isinstance(explain.get("title"), str) else _text(card.get("method")),
        method=_text(card.get("method")),
        state=state_of(card),
        started=_when(card.get("started")),
        seconds=_duration(card.get("seconds")),
        verdict=judge(run, outcome, alarms),
        headlines=headlines(outcome),
        evaluation=_evaluation(outcome.before, outcome.after),
        seeds=outcome.seeds,
        alarms=alarms,
        grave=sum(alarm.grave for alarm in alarms),
        charts=charts,
        more=more,
        more_left_out=left_out,
        samples=samples,
        sample_counts=counts,
        sample_bars=bars,
        reward_name=outcome.reward.rstrip(". "),
        sample_total=len(run.samples),
        open_samples=OPEN,
        data=_data(run),
        checks=_checks(card.get("checks")),
        engine=_pairs(run.section("engine")),
        reference=_text(card.get("reference")),
        equation=_text(explain.get("equation")),
        paper=_text(paper),
        arxiv=_arxiv(paper),
        command=without_secrets(_text(card.get("command"))),
        version=_text(card.get("trimtab")),
        seed=number(card["seed"]).replace(",", "") if real(card.get("seed")) is not None else "",
        versions=_pairs(run.section("versions")),
        machine=_pairs(run.section("machine")),
        fingerprints=_pairs(run.section("fingerprints")),
        config=_pairs(run.section("config")),
        notes=run.notes,
        style=Markup(environment.get_template("style.css.j2").render()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page if page.endswith("\n") else page + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trimtab.report", "."),
        autoescape=True,
        finalize=inert,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(num=number, figure=figure_text, plural=plural)
    return environment


def _text(data: object) -> str:
    return as_text(data) if isinstance(data, str) else ""


def _when(data: object) -> str:
    try:
        return datetime.fromisoformat(data).strftime("%-d %B %Y, %H:%M") if isinstance(data, str) else ""
    except ValueError:
        return _text(data)


def _duration(data: object) -> str:
    seconds = real(data)
    return duration(seconds) if seconds is not None and 0 <= seconds < 1e10 else ""


def _arxiv(paper: object) -> str:
    """The address of an arXiv paper, built from its number; any other text gets no link."""
    found = _ARXIV.fullmatch(paper.strip()) if isinstance(paper, str) else None
    return f"https://arxiv.org/abs/{found[1]}" if found else ""


def _pairs(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a two-column table; what is missing is absent."""
    return [
        (_LABELS.get(key, key), setting(key, value)) for key, value in data.items() if value not in (None, "", [], {})
    ]


def _evaluation(
    before: dict[str, Interval], after: dict[str, Interval]
) -> list[tuple[str, Interval | None, Interval | None]]:
    keys = dict.fromkeys([*after, *before])
    return [(key, before.get(key), after.get(key)) for key in keys]


def _checks(data: object) -> list[dict[str, Any]]:
    found = [c for c in data if isinstance(c, dict) and "name" in c] if isinstance(data, list) else []
    return [
        {
            "ok": c.get("ok") if isinstance(c.get("ok"), bool) else None,
            "name": as_text(c["name"]),
            "detail": as_text(c.get("detail")),
        }
        for c in found
    ]


def _more(run: RunFolder) -> tuple[list[Chart], int]:
    """Whatever else was logged, without advice, so that no figure is hidden."""
    known = {key for guide in GUIDES for key, _, _ in guide.keys}
    names = dict.fromkeys(key.removeprefix("eval/") for key in run.curves)
    drawn = [
        draw(replace(EXTRA, id=f"more-{i}", title=name, keys=((name, "", PLAIN),)), run.curves)
        for i, name in enumerate(name for name in names if name not in known)
    ]
    charts = [chart for chart in drawn if chart is not None]
    return charts[:MORE], max(0, len(charts) - MORE)


def _samples(run: RunFolder) -> tuple[list[Sample], dict[str, int], list[tuple[float, float, str]]]:
    """The first samples in file order, how many rewards rose and fell, and sorted gains as bars (y, height, tone)."""
    shown, gains = [], []
    for i, row in enumerate(run.samples):
        old, new = (real(row.get(key)) for key in ("reward_before", "reward_after"))
        gain = round(new - old, 12) if old is not None and new is not None else None
        if gain is not None and math.isfinite(gain):
            gains.append(gain)
        if i < SHOWN:
            before, after = (as_text(row[key]) if row.get(key) is not None else None for key in ("before", "after"))
            shown.append(
                Sample(
                    clip(as_text(row.get("prompt"))),
                    None if before is None else clip(before),
                    None if after is None else clip(after),
                    before is not None and before == after,
                    "" if old is None else number(old),
                    "" if new is None else number(new),
                    "" if gain is None else ("+" if gain > 0 else "") + number(gain),
                    _tone(gain),
                )
            )
    if not gains:
        return shown, {}, []
    counts = {tone: sum(_tone(g) == tone for g in gains) for tone in ("up", "down", "level")}
    low, high = min(0.0, *gains), max(0.0, *gains)
    span = (high - low) or 1.0
    bars = [
        (round(100 * (high - max(g, 0.0)) / span, 2), round(100 * abs(g) / span, 2), _tone(g))
        for g in sorted(gains)[:2000]
    ]
    return shown, counts, bars


def _tone(gain: float | None) -> str:
    if gain is None or not math.isfinite(gain) or abs(gain) < 1e-9:
        return "level"
    return "up" if gain > 0 else "down"


def _data(run: RunFolder) -> dict[str, Any]:
    """The data card: counts that add up, reasons, token lengths, notes."""
    data = run.section("data")
    tokens = descend(data, "tokens")
    losses = {key: tokens[key] for key in ("truncated_rows", "tokens_lost", "eos_lost") if key in tokens}
    sides = {k: intervals(numbers) for k, numbers in tokens.items() if isinstance(numbers, dict) and k not in losses}
    columns = list(dict.fromkeys(column for numbers in sides.values() for column in numbers))
    usual = [c for c in ("mean", "median", "p99", "max") if c in columns]
    counted = [
        (_LABELS.get(k, k.replace("_", " ")), data[k]) for k in ("rows", "records", "train", "held_out") if k in data
    ]
    dropped = [(as_text(k), v) for k, v in descend(data, "dropped").items() if real(v)]
    sizes = {k: real(data.get(k)) for k in ("train", "held_out")}
    parts = [("train", sizes["train"], "c"), ("held out", sizes["held_out"], "a")]
    parts += [("dropped", sum(real(v) or 0 for _, v in dropped), "b")]
    whole = sum(v or 0 for _, v, _ in parts)
    known = {
        "file",
        "shape",
        "rows",
        "records",
        "train",
        "held_out",
        "dropped",
        "notes",
        "conversions",
        "tokens",
        "repaired",
    }
    return {
        "file": _text(data.get("file")),
        "shape": _text(data.get("shape")),
        "counted": [(label, value) for label, value in counted if real(value) is not None],
        "bar": [(n, round(100 * v / whole, 2), tone, v) for n, v, tone in parts if v]
        if whole and math.isfinite(whole) and sizes["train"]
        else [],
        "dropped": sorted(dropped, key=lambda item: -(real(item[1]) or 0)),
        "columns": usual + [c for c in columns if c not in usual],
        "sides": sides,
        "scalars": [(_LABELS.get(k, k.replace("_", " ")), total(v)) for k, v in losses.items()],
        "repaired": [(as_text(k), v) for k, v in descend(data, "repaired").items() if real(v)],
        "notes": strings(data.get("notes")),
        "conversions": strings(data.get("conversions")),
        "extra": _pairs({k: v for k, v in data.items() if k not in known}),
    }
