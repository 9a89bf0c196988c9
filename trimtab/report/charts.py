"""Curves as inline SVG, with hover from a few lines of script.

Why not plotly: its bundle is 4.6 MB in every report, blank without JavaScript and in print, and a page with a strict
content security policy cannot run it. What a report needs is a line, a dashed line and a value under the finger. Here
one chart is about 5 kB, is complete without script, and follows the light and dark theme through CSS variables.

The drawing area is stretched (``preserveAspectRatio="none"``) while strokes keep their width, and every word is HTML
placed in percent: type stays the same size on a phone and on a wall.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.report.text import MINUS, number, plural

Points = list[tuple[float, float]]

LN2 = math.log(2)
DRAWN = 400  # points drawn per line; more are invisible
SMOOTH_FROM = 40  # fewer points are shown as they are
SPIKE = 6.0  # an extreme this many times the ordinary range away leaves the chart through its edge


@dataclass(frozen=True)
class Guide:
    """What a chart shows and how to read it. ``keys`` maps a metric to its label and colour; the rest is prose."""

    id: str
    title: str
    keys: tuple[tuple[str, str, str], ...]
    what: str
    healthy: str
    broken: str
    remedy: str
    unit: str = ""
    lines: tuple[tuple[float, str], ...] = ()
    fixed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """One drawn line: ``label`` in words, ``role`` train or held-out, ``path`` in a 1000 x 1000 box."""

    label: str
    colour: str
    role: str
    last: str
    path: str
    faint: str
    dots: str


@dataclass(frozen=True)
class Chart:
    """One figure, ready for the template."""

    guide: Guide
    lines: list[Line]
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]
    notes: list[str]
    hover: str
    summary: str
    alarms: list[int] = field(default_factory=list)


def draw(guide: Guide, curves: dict[str, Points]) -> Chart | None:
    """The chart of a guide, training and held-out together, or ``None`` if the run logged none of it."""
    wanted = [
        (prefix + key, label, colour, role)
        for key, label, colour in guide.keys
        for prefix, role in (("", "train"), ("eval/", "held-out"))
    ]
    series = [(label, colour, role, curves[key]) for key, label, colour, role in wanted if curves.get(key)]
    finite = [[(x, y) for x, y in points if math.isfinite(y)] for *_, points in series]
    if not any(finite):
        return None
    both = len({role for _, _, role, _ in series}) > 1
    ys = [y for points in finite for _, y in points]
    xs = [x for points in finite for x, _ in points]
    marks = [(y, label) for y, label in guide.lines if _worth(y, label, finite, ys)]
    low, high, outside = (*guide.fixed, 0) if guide.fixed else _range(ys, [y for y, _ in marks])
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 1, right + 1

    def place(x: float, y: float) -> tuple[int, int]:
        share = (y - low) / (high - low)
        return round(1000 * (x - left) / (right - left)), round(1000 * (1 - min(1.0, max(0.0, share))))

    lines: list[Line] = []
    hover: list[dict[str, object]] = []
    notes: list[str] = []
    spoken: list[str] = []
    for (label, colour, role, points), kept in zip(series, finite, strict=True):
        if not kept:
            continue
        name = f"{label}, {role}" if both and label else label or role
        thin = _thin(kept)
        window = max(5, len(kept) // 15) | 1
        bold = _smooth([(x, min(high, max(low, y))) for x, y in kept], window)
        rough = sum(abs(y - z) for (_, y), (_, z) in zip(kept, bold, strict=True)) / len(kept)
        dense = role == "train" and len(kept) > SMOOTH_FROM and rough > 0.004 * (high - low)
        bold = bold if dense else kept
        shown = _thin(bold)
        isolated = thin if role == "held-out" or len(kept) <= 12 else []
        if len(kept) > 400:
            isolated = []
        lines.append(
            Line(
                name,
                colour,
                role,
                number(bold[-1][1]),
                _path([place(x, y) for x, y in shown]),
                _path([place(x, y) for x, y in thin]) if dense else "",
                "".join("M{} {}h0".format(*place(x, y)) for x, y in isolated),
            )
        )
        hover.append(
            {
                "n": name,
                "c": colour,
                "x": [_short(x) for x, _ in thin],
                "y": [round(place(x, y)[1] / 10, 1) for x, y in thin],
                "t": [number(y) for _, y in thin],
            }
        )
        spoken.append(f"{name} from {number(bold[0][1])} to {number(bold[-1][1])}")
        if dense and not any("moving average" in note for note in notes):
            notes.append(f"Faint: every logged step. Bold: moving average over {window} points.")
        if len(kept) < len(points):
            first = next(x for x, y in points if not math.isfinite(y))
            lost = plural(len(points) - len(kept), "value")
            notes.append(f"{name or guide.title}: {lost} not finite, first at step {number(int(first))}.")
    if outside:
        beyond = plural(outside, "extreme value")
        notes.append(f"{beyond} beyond the edge, up to {number(max(ys, key=abs))}.")
    return Chart(
        guide,
        lines,
        _y_ticks(ys, low, high),
        [(place(x, low)[0] / 10, number(_short(x))) for x in _ticks(left, right, 5) if left <= x <= right],
        [(place(left, y)[1] / 10, label) for y, label in marks if low <= y <= high],
        notes,
        json.dumps({"l": _short(left), "r": _short(right), "s": hover}, separators=(",", ":")),
        f"{guide.title}, steps {number(int(min(xs)))} to {number(int(max(xs)))}: " + "; ".join(spoken) + ".",
    )


def _worth(y: float, label: str, finite: list[Points], ys: list[float]) -> bool:
    """ln 2 is a landmark only for a loss that starts there; zero only where the curves come near it."""
    if label.startswith("ln 2"):
        return any(points and abs(points[0][1] - LN2) < 0.05 for points in finite)
    spread = max(ys) - min(ys)
    return min(ys) - 0.5 * spread <= y <= max(ys) + 0.5 * spread


def _range(ys: Sequence[float], marks: Sequence[float]) -> tuple[float, float, int]:
    """Limits with some air; far outliers are left outside and counted, so that one spike does not flatten the rest."""
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    a, b = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    if len(ordered) >= 20 and b > a:
        low, high = max(low, a - SPIKE * (b - a)), min(high, b + SPIKE * (b - a))
        low, high = next(y for y in ordered if y >= low), next(y for y in reversed(ordered) if y <= high)
    outside = sum(not low <= y <= high for y in ys)
    low, high = min([low, *marks]), max([high, *marks])
    air = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - air, high + air, outside


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside the range."""
    rough = (high - low) / about
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    first = math.ceil(low / step)
    found = [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, first + 3 * about + 3)]
    return [y for y in found if y <= high + 1e-9 * abs(high)]


def _y_ticks(ys: Sequence[float], low: float, high: float) -> list[tuple[float, str]]:
    """Grid lines in percent from the top; a curve that never changes gets one, at its value."""
    ticks = _ticks(low, high, 4) if min(ys) < max(ys) else [ys[0]]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    return [(round(100 * (high - y) / (high - low), 1), _tick(y, step, high)) for y in ticks if low <= y <= high]


def _tick(y: float, step: float, top: float) -> str:
    """As many decimals as the distance between ticks needs, the same for the whole axis."""
    if y == 0:
        return "0"
    if step <= 0:
        return number(y)
    if abs(top) >= 1e6 or abs(top) < 1e-2:
        power = math.floor(math.log10(max(abs(top), abs(y))))
        return f"{y / 10.0**power:.{_places(step / 10.0**power)}f}e{power}".replace("-", MINUS)
    return f"{y:,.{_places(step)}f}".replace("-", MINUS)


def _places(step: float) -> int:
    return next((p for p in range(8) if math.isclose(step, round(step, p), rel_tol=1e-6)), 8)


def _thin(points: Points) -> Points:
    """At most about ``DRAWN`` points; the lowest and highest of each stretch survive, so no spike is lost."""
    if len(points) <= DRAWN:
        return points
    size = math.ceil(2 * len(points) / DRAWN)
    kept: Points = []
    for i in range(0, len(points), size):
        bucket = points[i : i + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _smooth(points: Points, window: int) -> Points:
    """Centred moving average; at both ends over the part of the window that exists, so that no single point rules."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth: Points = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - window // 2), min(len(points), i + window // 2 + 1)
        smooth.append((x, (sums[high] - sums[low]) / (high - low)))
    return smooth


def _path(corners: list[tuple[int, int]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in corners) if len(corners) > 1 else ""


def _short(x: float) -> float | int:
    return int(x) if x == int(x) else round(x, 4)


@dataclass(frozen=True)
class Whisker:
    """A dot with its interval on an axis shared by several rows; all positions in percent."""

    label: str
    tone: str
    value: float
    low: float | None
    high: float | None
    text: str


def whiskers(rows: Sequence[tuple[str, str, float, float, float, str]], zero: float | None = None) -> list[Whisker]:
    """Rows of (label, tone, value, low, high, text) on one axis, with ``zero`` kept in view."""
    every = [v for _, _, *three, _ in rows for v in three if math.isfinite(v)] + ([zero] if zero is not None else [])
    low, high = min(every), max(every)
    air = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - air, high + air

    def place(v: float) -> float | None:
        return round(100 * (v - low) / (high - low), 2) if math.isfinite(v) else None

    return [Whisker(label, tone, place(v) or 0.0, place(a), place(b), text) for label, tone, v, a, b, text in rows]


def axis_place(rows: Sequence[tuple[str, str, float, float, float, str]], point: float) -> float:
    """Where ``point`` lies on the axis that :func:`whiskers` gives these rows when ``zero=point``."""
    placed = whiskers([*rows, ("", "", point, math.nan, math.nan, "")], zero=point)
    return placed[-1].value


CHOSEN, REJECTED, PLAIN = "a", "b", "c"

GUIDES: tuple[Guide, ...] = (
    Guide(
        "loss",
        "Loss",
        (("loss", "", PLAIN),),
        "The number that training lowers. Losses of different methods are not on one scale; compare a method with "
        "itself only.",
        "A quick fall, then a slow one, with the held-out line close behind. Methods that put a difference to a "
        "reference through a sigmoid start at ln 2 = 0.693, because policy and reference are still the same model.",
        "Stuck at the first value: nothing moves. Exactly 0 throughout: nothing is trained. Held-out turning up while "
        "training falls: the pairs are being memorised.",
        "Stuck: raise the learning rate and check that the adapters are trainable and are not also in the reference. "
        "Turning up: stop at the lowest held-out point, train fewer epochs, or raise beta.",
        lines=((LN2, "ln 2 = 0.693"),),
    ),
    Guide(
        "rewards",
        "Implicit rewards",
        (
            ("rewards/chosen", "chosen", CHOSEN),
            ("rewards/rejected", "rejected", REJECTED),
            ("rewards/desirable", "desirable", CHOSEN),
            ("rewards/undesirable", "undesirable", REJECTED),
        ),
        "The method's own score of an answer: with a reference, beta times how much likelier the answer has become. It "
        "is not the opinion of a judge.",
        "Chosen above rejected with a widening gap, and chosen near zero or above.",
        "Both sink together and the gap opens only because rejected sinks faster: probability leaves the chosen "
        "answers too. Rejected above chosen: the labels may be swapped.",
        "Sinking together: DPOP, a likelihood (NLL) term, a larger beta or a smaller learning rate. Swapped: look at "
        "ten rows of the data.",
        lines=((0.0, "as the reference"),),
    ),
    Guide(
        "margins",
        "Reward margin",
        (("rewards/margins", "", PLAIN),),
        "Reward of the chosen answer less that of the rejected one, averaged: how firmly the model prefers.",
        "Grows and then flattens; held-out grows too, to a smaller value.",
        "Training grows without end while held-out stays: memorising. Flat at zero: nothing moves. Below zero: "
        "learning the opposite.",
        "Endless growth: fewer epochs, IPO or label smoothing, which stop at a finite margin. Flat: see the loss.",
        lines=((0.0, "no preference"),),
    ),
    Guide(
        "accuracies",
        "Reward accuracy",
        (("rewards/accuracies", "", PLAIN),),
        "Share of pairs in which the chosen answer has the higher reward. 0.5 is a coin.",
        "Held-out climbs above 0.5 and levels off, often between 0.6 and 0.8: people disagree about the rest.",
        "Training at 1 with held-out far below: memorised. Held-out at 0.5: nothing that generalises was learnt. "
        "Below 0.5: labels swapped.",
        "Memorised: more data, fewer epochs, larger beta. At 0.5: are the pairs readable at the length the model sees?",
        lines=((0.5, "a coin"),),
        fixed=(-0.02, 1.02),
    ),
    Guide(
        "logps",
        "Log-probability of the answers",
        (("logps/chosen", "chosen", CHOSEN), ("logps/rejected", "rejected", REJECTED)),
        "How likely the model finds each answer, in nats, summed over its tokens. Training batches differ in length, "
        "so this line is noisy; the held-out rows are the same each time.",
        "Rejected falls; chosen stays, or falls a little.",
        "Chosen falls by many nats. That is likelihood displacement: the model prefers chosen to rejected, yet both "
        "become unlikely and something else takes their place.",
        "DPOP, an NLL term on the chosen answer (RPO, ORPO, CPO), a larger beta, or dropping pairs whose two answers "
        "are nearly the same.",
        unit="nats",
    ),
    Guide(
        "kl",
        "Distance from the reference (KL)",
        (("kl", "", PLAIN),),
        "How far the policy has moved from the reference, in nats per answer.",
        "Rises and settles. Reward gained at a small distance is worth more than the same reward far away.",
        "Climbs without end: the model pleases the objective and forgets the rest. Clearly below zero: an estimator "
        "fed with answers that the policy did not sample.",
        "Larger beta or KL weight, smaller learning rate, an earlier checkpoint.",
        unit="nats",
        lines=((0.0, "the reference"),),
    ),
    Guide(
        "length",
        "Length of the answers",
        (
            ("length/chosen", "chosen", CHOSEN),
            ("length/rejected", "rejected", REJECTED),
            ("length", "answers", PLAIN),
            ("length/completion", "answers", PLAIN),
            ("length/samples", "sampled", PLAIN),
        ),
        "Tokens per answer. From a fixed data set this describes the batches; from sampled answers it describes the "
        "model.",
        "Level. In the data, chosen and rejected about equally long.",
        "Sampled answers grow steadily, or chosen answers are much the longer: the cheapest way to please such data is "
        "to write more.",
        "SimPO, R-DPO or length-normalised DPO, balancing lengths in the data, length-controlled judging.",
        unit="tokens",
    ),
    Guide(
        "grad_norm",
        "Gradient norm",
        (("grad_norm", "", PLAIN),),
        "Size of the gradient before clipping.",
        "Same order of magnitude throughout, single peaks early on.",
        "Zero: no trainable weight is touched. Peaks many times the usual value: one bad batch pulls the model. "
        "Growing without end: about to diverge.",
        "Peaks: clip at 1, lower the learning rate, look at the rows of that step. Zero: check which weights train.",
    ),
    Guide(
        "learning_rate",
        "Learning rate",
        (("learning_rate", "", PLAIN),),
        "The size of the steps, as scheduled.",
        "A short rise, then a fall towards zero at the last step.",
        "Zero from the start, or still at its peak when the run ends: the schedule was made for another number of "
        "steps.",
        "Set the number of steps or the warm-up; after a resume the curve must continue, not start over.",
    ),
)

EXTRA = Guide("", "", (), "", "", "", "")
