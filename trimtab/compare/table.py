"""The tables: methods in one world, and promises with their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.compare.promises import Arm, Verdict
from trimtab.compare.runner import RATES, best
from trimtab.compare.stats import Result, by_prompt, difference, gain, holm, mean_of, over_seeds, p_value
from trimtab.report.stats import Interval


@dataclass(frozen=True)
class Row:
    """One arm: the gain at every rate on the tuning seeds, and its trials in the seeds' order at the best of them."""

    arm: Arm
    kind: str
    tuned: Mapping[float, float]
    results: Sequence[Result]

    @property
    def failed(self) -> int:
        return sum("failed" in r for r in self.results)


def methods_table(rows: Sequence[Row], against: str, verdicts: Sequence[Verdict] = ()) -> str:
    """Markdown: every arm's gain, its difference from the arm named ``against``, seed by seed, and what it promised."""
    whole = [r for r in rows if not r.failed]
    base = next((r for r in whole if str(r.arm) == against), None)
    gains = _adjusted([[gain(x) for x in r.results] for r in whole])
    others = [r for r in whole if base and r is not base]
    behind = _adjusted(
        [[gain(a) - gain(b) for a, b in zip(r.results, base.results, strict=True)] for r in others if base]
    )
    lines = [
        f"| method | learns from | rate | true utility gain | by prompt | p | minus {against} | p | KL, nats | words | seconds |"
        + (" promised: verdict |" if verdicts else ""),
        "|---" * (11 + bool(verdicts)) + "|",
    ]
    order = sorted(whole, key=lambda r: -over_seeds(r.results, gain).value)
    for row in order:
        ahead = p = ""
        if base and row is not base:
            ahead, p = str(_short(difference(row.results, base.results, gain))), _p(behind[others.index(row)])
        cells = (
            str(row.arm),
            row.kind,
            _rate(row.tuned),
            _short(over_seeds(row.results, gain)),
            _short(by_prompt(row.results, None)),
            _p(gains[whole.index(row)]),
            ahead,
            p,
            _short(over_seeds(row.results, mean_of("kl"))),
            _short(over_seeds(row.results, mean_of("words"))),
            f"{sum(r['seconds'] for r in row.results) / len(row.results):.0f}",
            *([_promised(row, verdicts)] if verdicts else []),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row.failed:
            why = next(r["failed"] for r in row.results if "failed" in r)
            lines.append(
                f"| {row.arm} | {row.kind} | {_rate(row.tuned)} | {row.failed} runs failed: {why} |"
                + " |" * (7 + bool(verdicts))
            )
    return "\n".join(lines)


def _promised(row: Row, verdicts: Sequence[Verdict]) -> str:
    """What this method promises, with whatever options, and the verdicts."""
    own = [v for v in verdicts if v.promise.ours.method == row.arm.method]
    return "; ".join(f"{_with(v)}{v.promise.text}: {v.says}" for v in own)


def _with(verdict: Verdict) -> str:
    options = verdict.promise.ours.options
    return "".join(f"{k} {v} " for k, v in options.items())


def promises_table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: every promise, its difference with the interval, and whether it holds."""
    lines = [
        "| promise | world | measure | ours | theirs | difference | p | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    adjusted = holm([v.p for v in verdicts])
    for v, p in zip(verdicts, adjusted, strict=True):
        said = v.promise
        against = f" (against {said.theirs})" if said.theirs else ""
        wanted = f"{said.measure}, {said.better}" + (f" by {said.beyond:+g}" if said.beyond else "")
        theirs = f"{v.theirs:.3g}" if said.theirs else "start"
        cells = (f"{said.ours} {said.text}{against}", said.world, wanted, f"{v.ours:.3g}", theirs)
        lines.append(f"| {' | '.join(cells)} | {_short(v.difference)} | {_p(p)} | {v.says} |")
    return "\n".join(lines)


def legend(seeds: int, tuning: int) -> str:
    """What the columns mean."""
    return (
        f"Intervals are 95 %. Gain, differences, KL and words: Student's t over {seeds} seeds; a seed is a replicate with "
        "its own prompts, answers, judgements and held-out prompts, and differences are paired by seed. By prompt: "
        "bootstrap over held-out prompts with the trained models as they are. p: paired t tests over seeds, adjusted by "
        f"Holm over the rows of the column. Rate: the best of {', '.join(f'{r:g}' for r in RATES)} by the mean gain over "
        f"{tuning} tuning seeds of their own, the same for every method; * where it is an end of the grid."
    )


def _adjusted(samples: Sequence[Sequence[float]]) -> list[float]:
    return holm([p_value(s) for s in samples])


def _rate(tuned: Mapping[float, float]) -> str:
    chosen = best(dict(tuned))
    return f"{chosen:g}{'*' if chosen in (min(tuned), max(tuned)) else ''}"


def _short(found: Interval) -> str:
    digits = found.decimals
    form = ".3g" if digits is None else f".{min(digits, 3)}f"
    if not found.bounded:
        return ""
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
