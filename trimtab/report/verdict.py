"""What came of the run, in one sentence of plain words, and what that sentence does not show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trimtab.errors import DataError
from trimtab.report.alarms import Alarm
from trimtab.report.charts import Whisker, axis_place, whiskers
from trimtab.report.folder import RunFolder, intervals, real
from trimtab.report.stats import Interval, mean_interval, paired_gain
from trimtab.report.text import MINUS, as_text, number, plural

STATES = {
    "finished": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "running": "not finished",
}
FEW = 30
TIED = 1e-9
RANKING = (("rewards/accuracies", "accuracy"), ("rewards/auc", "AUC"))  # 0.5 is a coin for both


@dataclass(frozen=True)
class Verdict:
    """``tone`` is good, even, bad, doubt or stopped; ``caveats`` are short sentences."""

    tone: str
    sentence: str
    caveats: list[str]


@dataclass(frozen=True)
class Headline:
    """One big figure: after, and where known before and the gain, drawn on one axis."""

    label: str
    value: str
    unit: str
    before: str
    detail: str
    rows: list[Whisker]
    mark: float | None
    mark_label: str


@dataclass(frozen=True)
class SeedRow:
    """One seed and its figures."""

    name: str
    figures: dict[str, Interval]


@dataclass(frozen=True)
class Seeds:
    """Several seeds of one recipe: their rows, the pooled gain, and the forest of intervals."""

    rows: list[SeedRow]
    columns: list[tuple[str, str]]
    gain: Interval | None
    forest: list[Whisker]
    zero: float

    @property
    def prompts(self) -> int:
        """How many prompts the pooled gain counts; 0 if it counts seeds."""
        return self.gain.n if self.gain is not None and self.gain.n > len(self.rows) else 0


@dataclass(frozen=True)
class Outcome:
    """Every measured figure of a run in one place, computed from the samples where the card lacks it."""

    before: dict[str, Interval]
    after: dict[str, Interval]
    samples: dict[str, Interval]
    reward: str
    seeds: Seeds | None


def measure(run: RunFolder) -> Outcome:
    """Collect the figures; rewards that stand only in ``samples.jsonl`` are summarised here, paired by prompt."""
    figures = intervals(run.section("samples"))
    name = run.section("samples").get("reward_name")
    pairs = [(as_text(row.get("prompt")), *_rewards(row)) for row in run.samples]
    scored = [(prompt, old, new) for prompt, old, new in pairs if old is not None and new is not None]
    if scored and not {"reward_before", "reward_after", "reward_gain"} & set(figures):
        prompts, before, after = zip(*scored, strict=True)
        try:
            figures["reward_gain"] = paired_gain(before, after, clusters=prompts)
            figures["reward_before"], figures["reward_after"] = mean_interval(before), mean_interval(after)
        except DataError:
            pass
    old, new = figures.get("reward_before"), figures.get("reward_after")
    if old is not None and new is not None and "reward_gain" not in figures:
        figures["reward_gain"] = Interval(new.value - old.value, math.nan, math.nan, new.n, "")
    evaluation = run.section("evaluation")
    start = intervals(evaluation.get("before"))
    margins = start.get("rewards/margins")
    if margins is not None and abs(margins.value) < TIED and not max(-margins.low, margins.high) > TIED:
        # Policy and reference are still one model: every pair is a tie, and counting ties says nothing.
        start = {key: value for key, value in start.items() if key not in dict(RANKING)}
    return Outcome(
        start,
        intervals(evaluation.get("after")),
        figures,
        name if isinstance(name, str) else "",
        _seeds(run.card),
    )


def judge(run: RunFolder, outcome: Outcome, alarms: list[Alarm]) -> Verdict:
    """The verdict. A run that did not finish says so first; a failed check comes before any figure."""
    tone, clause, caveats = _result(run, outcome)
    grave = [alarm for alarm in alarms if alarm.grave]
    failed = [alarm.title.removeprefix("Check failed: ") for alarm in grave if alarm.title.startswith("Check failed: ")]
    state = run.card.get("status")
    steps = [points[-1][0] for points in run.curves.values() if points]
    at = f" at step {number(int(max(steps)))}" if steps else " before it logged a step"
    total = next((t for t in (real(run.section("config").get(k)) for k in ("max_steps", "steps")) if t and t > 0), None)
    if steps and total and math.isfinite(total):
        at += f" of {number(int(total))}"
    if state == "failed":
        tone, opening = "bad", f"The run failed{at}"
        if isinstance(run.card.get("error"), str):
            caveats.insert(0, "It stopped with: " + run.card["error"])
    elif state == "interrupted":
        tone, opening = "stopped", f"The run was interrupted{at}"
    elif state == "finished":
        opening = ""
    elif state == "running":
        tone, opening = "stopped", f"The run has not finished: it was killed or is still going, and its last log is{at}"
        opening = opening.replace("log is at", "log is at") if steps else "The run was killed, or is still starting"
    else:
        tone, opening = "stopped", f"Whether the run finished is not recorded; it was{at} when last seen"
        opening = opening if steps else "Whether the run finished is not recorded"
    if failed:
        quoted = f"“{failed[0]}”" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
        opening = (opening + ", and a" if opening else "A") + f" check failed ({quoted})"
        opening += ", so no figure here can be trusted"
        tone = "bad"
    if not opening:
        sentence = _capital(clause) + "."
    elif clause.startswith("nothing was measured"):
        sentence = opening + "; nothing was measured after training."
    else:
        sentence = f"{opening}; {'as recorded' if failed else 'up to there'}, {clause}."
    if grave and tone in ("good", "even"):
        tone = "doubt"
    if len(grave) > len(failed):
        caveats.insert(0, f"{plural(len(grave) - len(failed), 'grave finding')} below: read them before this figure.")
    return Verdict(tone, sentence, caveats)


def headlines(outcome: Outcome) -> list[Headline]:
    """The few figures that matter: reward, held-out accuracy, length, distance."""
    figures, found = outcome.samples, []
    seeds = outcome.seeds
    across = f"mean over {plural(len(seeds.rows), 'seed')}" if seeds and len(seeds.rows) > 1 else ""
    one = "one of the seeds" if across else ""
    pooled = {
        key: _pooled(seeds, key) for key in ("reward_before", "reward_after", "length_before", "length_after", "kl")
    }
    pick = {key: value if across and value is not None else figures.get(key) for key, value in pooled.items()}
    gain = seeds.gain if seeds and seeds.gain else figures.get("reward_gain")
    if pick["reward_after"] is not None or gain is not None:
        name = _capital(_reward_words(outcome.reward)[0])
        note = f"gain {_signed(gain)}" if gain is not None else ""
        found.append(_headline(name, pick["reward_before"], pick["reward_after"], gain, across, note))
    for key, name in RANKING:
        accuracy, before = outcome.after.get(key), outcome.before.get(key)
        if accuracy is None:
            continue
        found.append(_headline("Held-out " + name, before, accuracy, None, one, "", (0.5, "a coin")))
    if pick["length_after"] is not None:
        found.append(
            _headline(
                "Length of answers", pick["length_before"], pick["length_after"], None, across, "", None, "tokens"
            )
        )
    if pick["kl"] is not None:
        found.append(
            _headline("Distance from the reference (KL)", None, pick["kl"], None, across, "", (0.0, "0"), "nats")
        )
    return found


def _result(run: RunFolder, outcome: Outcome) -> tuple[str, str, list[str]]:
    figures, caveats = outcome.samples, []
    seeds = outcome.seeds
    reward, explained = _reward_words(outcome.reward)
    many = seeds is not None and len(seeds.rows) > 1
    if not many:
        caveats.append("One seed: another may come out differently.")
    old, new = figures.get("length_before"), figures.get("length_after")
    longer = old is not None and new is not None and old.value > 0 and new.value >= 1.2 * old.value
    gain = seeds.gain if seeds is not None and seeds.gain is not None else figures.get("reward_gain")
    if gain is not None:
        if seeds is not None and gain is seeds.gain and many:
            sampled = f" and {plural(seeds.prompts, 'held-out prompt')}" if seeds.prompts else ""
            where = f"over {plural(len(seeds.rows), 'seed')}{sampled}, the aligned model's {reward}"
        else:
            where = f"the aligned model's {reward}" + (f" on {plural(gain.n, 'held-out prompt')}" if gain.n else "")
            if 0 < gain.n < FEW:
                caveats.append(f"Only {plural(gain.n, 'prompt')} were sampled.")
        caveats += [explained] if explained else []
        bounds = _bounds(gain)
        if not gain.bounded:
            caveats.append("No interval was recorded, so chance cannot be ruled out.")
            verb = "rose" if gain.value > 0 else "fell" if gain.value < 0 else "did not change"
            return "even", f"{where} {verb}" + (f" by {number(abs(gain.value))}" if gain.value else ""), caveats
        if gain.low > 0:
            if longer and old is not None and new is not None:
                caveats.append(
                    f"The answers also grew from {number(old.value)} to {number(new.value)} tokens; "
                    "part of the gain may be length."
                )
            return "good", f"{where} rose by {_show(gain, gain.value)} ({bounds})", caveats
        if gain.high < 0:
            flipped = Interval(-gain.value, -gain.high, -gain.low, gain.n, gain.method, gain.level)
            return "bad", f"{where} fell by {_show(flipped, flipped.value)} ({_bounds(flipped)})", caveats
        return "even", f"{where} did not change measurably: {_signed(gain)}", caveats
    name, accuracy = next(((name, outcome.after[key]) for key, name in RANKING if key in outcome.after), ("", None))
    if accuracy is not None:
        counted = "prompt" if accuracy.method == "bootstrap" else "comparison"  # the bootstrap draws prompts
        size = f" on {plural(accuracy.n, counted)}" if accuracy.n else ""
        shown = f"the held-out {name}{size} is {_show(accuracy, accuracy.value)}"
        caveats.append("It says how the model ranks given answers, not how good its own answers are.")
        if not accuracy.bounded:
            caveats.append("No interval was recorded, so chance cannot be ruled out.")
            return "even", shown, caveats
        shown += f" ({_bounds(accuracy)})"
        if accuracy.low > 0.5:
            return "good", f"{shown}: better than chance", caveats
        if accuracy.high < 0.5:
            return "bad", f"{shown}: worse than chance", caveats
        return "even", f"{shown}: not distinguishable from chance", caveats
    old, new = outcome.before.get("loss"), outcome.after.get("loss")
    if new is not None:
        came = f"went from {_show(old, old.value)} to" if old is not None else "is"
        came += f" {_show(new, new.value)}" + (f" ({_bounds(new)})" if new.bounded else "")
        caveats.append("The loss says how well the objective is met, not how good the answers are.")
        return "even", f"the held-out loss {came}", caveats
    return "even", "nothing was measured after training, so whether the model got better is not known", []


def _reward_words(name: str) -> tuple[str, str]:
    """How the sentence calls the reward, and a line beneath it where the name is too long for the sentence."""
    name = " ".join(name.split()).rstrip(".")
    if not name:
        return "reward", ""
    if len(name) <= 24 and "(" not in name:
        return f"reward ({name})", ""
    return "true reward" if "true reward" in name.lower() else "reward", f"The reward: {name}."


def _headline(
    label: str,
    before: Interval | None,
    after: Interval | None,
    gain: Interval | None,
    across: str,
    note: str,
    mark: tuple[float, str] | None = None,
    unit: str = "",
) -> Headline:
    if after is None:  # only the gain is known
        after, mark, note = gain, (0.0, "no change"), ""
    assert after is not None
    rows = [
        (name, tone, f.value, f.low, f.high, _plain(f))
        for name, tone, f in (("before", "soft", before), ("after", "c", after))
        if f is not None
    ]
    bounded = any(math.isfinite(low) for *_, low, _, _ in rows)
    place = axis_place(rows, mark[0]) if mark else None
    return Headline(
        label,
        _show(after, after.value) if after is not gain else _signed_value(after),
        unit,
        f"before {_show(before, before.value)}" if before is not None else "",
        " · ".join(part for part in (note, across) if part),
        whiskers(rows, zero=mark[0] if mark else None) if bounded or before is not None else [],
        place,
        mark[1] if mark else "",
    )


SEED_COLUMNS = (
    ("reward_before", "reward before"),
    ("reward_after", "reward after"),
    ("reward_gain", "gain"),
    ("kl", "KL, nats"),
    ("length_before", "length before"),
    ("length_after", "length after"),
)


def _seeds(card: dict[str, Any]) -> Seeds | None:
    raw = card.get("seeds")
    listed = raw.get("seeds", raw.get("runs")) if isinstance(raw, dict) else raw
    if not isinstance(listed, list):
        return None
    rows = []
    for i, raw_row in enumerate(listed):
        figures = intervals(raw_row)
        named = figures.pop("seed", None)
        if "reward_gain" not in figures and "reward_before" in figures and "reward_after" in figures:
            difference = figures["reward_after"].value - figures["reward_before"].value
            figures["reward_gain"] = Interval(difference, math.nan, math.nan, 0, "")
        if figures:
            rows.append(SeedRow(f"{named.value:g}" if named is not None else f"#{i + 1}", figures))
    if not rows:
        return None
    gain = Interval.from_json(raw.get("gain") if isinstance(raw, dict) else card.get("gain"))
    if gain is None:
        gain = _mean([row.figures["reward_gain"] for row in rows if "reward_gain" in row.figures])
    drawn = [(f"seed {row.name}", "c", row.figures["reward_gain"]) for row in rows if "reward_gain" in row.figures]
    pooled = "all seeds" if gain is None or gain.n <= len(rows) else "by prompt"
    drawn += [(pooled, "good", gain)] if gain is not None else []
    between = Interval.from_json(card.get("gain_over_seeds"))
    drawn += [("by seed", "good", between)] if between is not None else []
    forest = [(label, tone, f.value, f.low, f.high, _signed(f)) for label, tone, f in drawn]
    columns = [(key, name) for key, name in SEED_COLUMNS if any(key in row.figures for row in rows)]
    if not forest:
        return Seeds(rows, columns, gain, [], 0.0)
    return Seeds(rows, columns, gain, whiskers(forest, zero=0.0), axis_place(forest, 0.0))


def _pooled(seeds: Seeds | None, key: str) -> Interval | None:
    return None if seeds is None else _mean([row.figures[key] for row in seeds.rows if key in row.figures])


def _mean(found: list[Interval]) -> Interval | None:
    return mean_interval([f.value for f in found]) if len(found) > 1 else found[0] if found else None


def _rewards(row: dict[str, Any]) -> tuple[float | None, float | None]:
    values = [real(row.get(key)) for key in ("reward_before", "reward_after")]
    old, new = (v if v is not None and math.isfinite(v) else None for v in values)
    return old, new


def _show(figure: Interval, value: float) -> str:
    """A number with the digits that the interval of ``figure`` deserves."""
    digits = figure.decimals
    return number(value) if digits is None or abs(value) >= 1e6 else f"{value:,.{digits}f}".replace("-", MINUS)


def _signed_value(figure: Interval) -> str:
    return ("+" if figure.value > 0 else "") + _show(figure, figure.value)


def _signed(figure: Interval) -> str:
    inside = f" ({_show(figure, figure.low)} to {_show(figure, figure.high)})" if figure.bounded else ""
    return _signed_value(figure) + inside


def _plain(figure: Interval) -> str:
    inside = f" ({_show(figure, figure.low)} to {_show(figure, figure.high)})" if figure.bounded else ""
    return _show(figure, figure.value) + inside


def _bounds(figure: Interval) -> str:
    return f"{100 * figure.level:g} % interval {_show(figure, figure.low)} to {_show(figure, figure.high)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def state_of(card: dict[str, Any]) -> str:
    """The status in words; an unknown one as it stands."""
    state = card.get("status")
    return STATES.get(state, state) if isinstance(state, str) else "status not recorded"


def figure_text(figure: Interval | None) -> str:
    """``0.21 (0.12 to 0.30, n=60)`` with a real minus sign, or nothing; bounds that print like the value are left out."""
    if figure is None:
        return ""
    value, low, high = (_show(figure, v) for v in (figure.value, figure.low, figure.high))
    inside = [f"{low} to {high}"] if figure.bounded and not low == value == high else []
    inside += [f"n={figure.n:,}"] if figure.n else []
    return value + (f" ({', '.join(inside)})" if inside else "")
