"""What each side of vs_trl.py multiplies, and the rates that its times then mean.

    python benchmarks/work.py                                              # of results/vs_trl-kto.json; half a minute
    python benchmarks/work.py benchmarks/results/vs_trl-dpo-8.json

FLOPs of the matrix products of a step, on the very rows that were timed. trimtab: ``roofline.work_of``. TRL, not
grouped, with completion positions only and the reference in each step: rows padded to the longest of a forward pass,
attention over whole squares, a prompt for every answer; 3 forward passes' worth for what learns (backward is two), 1 for its
reference, and for KTO 1 each by policy and reference for the mismatched answers. Their ratio is the speed-up that equal
rates of the machine would give. Rates count all seconds, so also AdamW and everything else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, markdown
from roofline import products, shape_of, work_of
from vs_trl import AT_ONCE, STEPS, drawn

TRL_SETTINGS, OURS = ("trl bf16 +cp", "trl fp32 +cp"), ("trimtab bf16", "trimtab fp32")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("file", nargs="?", type=Path, default=RESULTS / "vs_trl-kto.json", help="a result of vs_trl.py")
    found = json.loads(ask.parse_args().file.read_text())
    print(table(found))


def table(found: dict[str, Any]) -> str:
    import engine

    from trimtab.planner import sizes_of

    asked = found["asked"]
    config = engine.run_config(method=asked["method"])
    rows = engine.hh_examples(engine.run_config())
    if asked["method"] == "kto":
        rows = engine.thumbs(rows, asked["seed"])
    shape = shape_of(sizes_of(found["model"]))
    lines = []
    for size in sorted({r["batch_size"] for r in found["runs"]}):
        n = asked["steps"] or STEPS.get(size, 1)
        work = dict.fromkeys(("trl", "trimtab"), 0.0)
        for numbers in drawn(found["pairs"], size, n, asked["repetitions"], asked["seed"]):
            for start in range(size, len(numbers), size):
                batch = [rows[i] for i in numbers[start : start + size]]
                others = engine.asked_of_reference(batch, config)[size:]
                work["trimtab"] += sum(work_of(batch, config, shape).values())
                work["trl"] += padded(shape, batch, AT_ONCE[asked["method"]], 4)
                work["trl"] += padded(shape, others, AT_ONCE[asked["method"]], 2)
        steps = n * asked["repetitions"]
        for setting in (*TRL_SETTINGS, *OURS):
            runs = [
                r for r in found["runs"] if r["batch_size"] == size and r["setting"] == setting and "failed" not in r
            ]
            if len(runs) < asked["repetitions"]:
                continue
            flops, seconds = work[setting.split()[0]], sum(r["counted_s"] for r in runs)
            figures = [flops / steps / 1e12, seconds / steps, flops / seconds / 1e9, work["trl"] / work["trimtab"]]
            lines.append([str(size), setting, *(f"{x:.{d}f}" for x, d in zip(figures, (2, 2, 0, 2), strict=True))])
    head = ["batch", "setting", "TFLOP/step", "s/step", "GFLOP/s", "TRL's work / trimtab's"]
    return markdown(head, lines)


def padded(shape: dict[str, int], batch: Sequence[Any], at_once: int, passes: int) -> float:
    """FLOPs of so many forward passes over padded rows, a row for each completion, the vocabulary at completion positions."""
    sequences = [(len(e.prompt), len(c)) for e in batch for c in e.completions]
    total, rows = 0.0, at_once * (len(sequences) // max(len(batch), 1))
    for start in range(0, len(sequences), max(rows, 1)):
        part = sequences[start : start + rows]
        width = max(p + c for p, c in part)
        linear = 2 * width * shape["layers"] * sum(a * b for a, b in products(shape))
        attention = 4 * width**2 * shape["layers"] * shape["heads"] * shape["width"]
        head = 2 * shape["hidden"] * shape["vocab"] * sum(c for _, c in part)
        total += passes * (len(part) * (linear + attention) + head)
    return total


if __name__ == "__main__":
    main()
