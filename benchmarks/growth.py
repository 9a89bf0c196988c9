"""How time and memory of a step grow with answers, prompt, vocabulary and batch: one varied at a time, exponents fitted.

    python benchmarks/growth.py
    python benchmarks/growth.py --sweeps answers --precisions bfloat16
    python benchmarks/growth.py --largest 4 --repetitions 1 --output FILE       # the smallest points only: does it run?
    python benchmarks/growth.py --table FILE

plackett_luce, full fine-tuning, random rankings and a random Llama of 4 layers (hidden 256, 8 heads, 4 of keys; 7 M
parameters at the middle vocabulary): no weights are needed. Where nothing else is said: 4 answers of 64 tokens to a prompt of
128, 16,384 tokens in the vocabulary, 4 prompts a batch, trimtab's default layout and token budget.

Each measurement is a process of its own: a warm-up step of the same size, then the timed ones. Time: an optimiser step and the
reference's pass over its rows. Memory: peak of the process less what it held when the model was loaded. Interleaved; written
when made; a second start goes on.

Exponent e of y ~ x^e: least squares of log y on log x over all repetitions, with a 95 % interval (Student's t). ``increments``
is the same of y(2x) - y(x), in which a fixed part (weights, AdamW, the interpreter) cancels: what growth tends to. They are
taken from beyond the largest x whose increment (median over repetitions) is not positive: up to there something else decides,
and leaving out only such increments would make the rest look steep. Beside them the exponents of the minimal FLOPs of the
same rows (``roofline.minimal_flops``): attention's own part is in them. A surprise is an exponent whose interval lies above 1
and above the minimal work's.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import harness
from harness import Results, markdown, spread
from roofline import minimal_flops

MIDDLE = {"answers": 4, "prompt": 128, "vocabulary": 16_384, "batch": 4}
ANSWER = 64  # tokens
SWEEPS = {
    "answers": [2, 4, 8, 16, 32, 64],
    "prompt": [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384],
    "vocabulary": [4096, 8192, 16_384, 32_768, 65_536, 131_072],
    "batch": [2, 4, 8, 16, 32, 64],
}
LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip  # noqa: E501
PRECISIONS = ("float32", "bfloat16")
SLACK = 0.05  # exponents this close are the same


def main() -> None:
    ask = harness.arguments(__doc__, repetitions=5)
    ask.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    ask.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    ask.add_argument("--largest", type=int, help="only the first so many values of each sweep")
    ask.add_argument("--steps", type=int, default=3, help="timed steps of a measurement")
    asked = ask.parse_args()
    if asked.child:
        return harness.answer(asked.child, child)
    if asked.table:
        return print(tables(json.loads(asked.table.read_text())))
    results = Results(
        asked.output or harness.RESULTS / "growth.json",
        {
            "seed": asked.seed, "threads": asked.threads, "steps": asked.steps, "middle": MIDDLE, "answer": ANSWER,
            "model": LLAMA,
        },
    )  # fmt: skip
    for sweep in asked.sweeps:
        keys = [
            {"sweep": sweep, "value": value, "precision": precision}
            for value in SWEEPS[sweep][: asked.largest]
            for precision in asked.precisions
        ]
        jobs = [(key, {**job, "steps": asked.steps}) for key, job in harness.interleaved(keys, asked)]
        results.measure(jobs, lambda r: f"{seconds(r):.2f} s a step, {r['step_gb']:.2f} GB")
    harness.finish(results, tables)
    return None


# --- exponents --------------------------------------------------------------------------------------------------------


def seconds(run: dict[str, Any]) -> float:
    return run["counted_s"] / run["steps"]  # type: ignore[no-any-return]


def exponent(points: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """(e, lower, upper) of y ~ x^e; None where fewer than three points are positive or x has one value only."""
    from scipy import stats

    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 3 or len({x for x, _ in logs}) < 2:
        return None
    fit = stats.linregress([x for x, _ in logs], [y for _, y in logs])
    wide = stats.t.ppf(0.975, len(logs) - 2) * fit.stderr
    return fit.slope, fit.slope - wide, fit.slope + wide


def increments(runs: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> list[tuple[float, float]]:
    """(x, y(2x) - y(x)) within each repetition."""
    value = {(r["repetition"], r["value"]): of(r) for r in runs}
    return [(x, value[k, 2 * x] - y) for (k, x), y in value.items() if (k, 2 * x) in value]


def tail(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points beyond the largest x at which the median y is not positive."""
    flat = [x for x in {x for x, _ in points} if median(y for at, y in points if at == x) <= 0]
    return [(x, y) for x, y in points if x > max(flat, default=0)]


def shown(fit: tuple[float, float, float] | None) -> str:
    return "-" if fit is None else f"{fit[0]:.2f} ({fit[1]:.2f} to {fit[2]:.2f})"


def tables(found: dict[str, Any]) -> str:
    """Markdown: the points, then the exponents."""
    points, fits = [], []
    good = [r for r in found["runs"] if "failed" not in r]
    for sweep, precision in dict.fromkeys((r["sweep"], r["precision"]) for r in found["runs"]):
        mine = [r for r in good if (r["sweep"], r["precision"]) == (sweep, precision)]
        for value in sorted({r["value"] for r in mine}):
            here = [r for r in mine if r["value"] == value]
            cells = [spread([seconds(r) for r in here], 3), spread([r["step_gb"] for r in here], 2)]
            points.append([sweep, precision, f"{value:,}", f"{median(r['gflops'] for r in here):.0f}", *cells])
        flops = [exponent([(r["value"], r["gflops"]) for r in mine]), exponent(increments(mine, lambda r: r["gflops"]))]
        # memory has no such part: nothing in it needs to grow faster than the tokens
        for what, of, work in (("time", seconds, flops), ("memory", lambda r: r["step_gb"], [None, None])):
            more = increments(mine, of)
            kept = tail(more)
            got = [exponent([(r["value"], of(r)) for r in mine]), exponent(kept)]
            limits = [max(1.0, w[0] if w else 1.0) + SLACK for w in work]
            names = ("whole", "increments")
            high = [n for n, g, limit in zip(names, got, limits, strict=True) if g and g[1] > limit]
            told = f"above: {', '.join(high)}" if high else "no"
            left = len(more) - sum(y > 0 for _, y in kept)
            told += f"; {left} of {len(more)} increments left out" if left else ""
            expected = [f"{w[0]:.2f}" if w else "-" for w in work]
            fits.append([sweep, precision, what, *map(shown, got), *expected, told])
    head = ["varied", "precision", "value", "minimal GFLOP/step", "s/step", "GB of a step"]
    lines = [markdown(head, points), ""]
    head = [
        "varied",
        "precision",
        "of",
        "exponent (95 %)",
        "of increments",
        "minimal work",
        "its increments",
        "surprise",
    ]
    return "\n".join([*lines, markdown(head, fits), "", harness.where(found)])


# --- a child: one point, one repetition -------------------------------------------------------------------------------


def child(job: dict[str, Any]) -> dict[str, Any]:
    import engine
    from roofline import shape_of

    size = {**MIDDLE, job["sweep"]: job["value"]}
    model = engine.random_llama(vocab_size=size["vocabulary"], **LLAMA)
    draw = random.Random(f"{job['seed']} {job['repetition']}")
    examples = [
        engine.random_ranked(size["vocabulary"], size["prompt"], ANSWER, size["answers"], draw)
        for _ in range((job["steps"] + 1) * size["batch"])
    ]
    config = engine.run_config(
        size["batch"], job["seed"], method="plackett_luce", precision=job["precision"], reference="cache"
    )
    loaded = engine.current_memory_gb()
    found = engine.measured(config, model, examples)
    rows = [(len(e.prompt), [len(c) for c in e.completions]) for e in examples[: size["batch"]]]
    return {
        **found,
        "step_gb": found["peak_gb"] - loaded,
        "gflops": sum(minimal_flops(shape_of(model.config), rows).values()) / 1e9,
    }


if __name__ == "__main__":
    main()
