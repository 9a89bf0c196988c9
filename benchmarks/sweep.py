"""Ten methods over one data set: how often the reference was computed, and what the shared cache saves.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --methods dpo ipo --limit 24 --output FILE       # does it run?
    python benchmarks/sweep.py --table FILE

Every run is `trimtab train` on HH pairs, one epoch, full fine-tuning of SmolLM2, with ``reference: cache``: once with a cache
folder that all methods share, once with an empty one of its own, which side first in turn. Counted: completions that the
reference scored (the run card's ``reference_cache``), against all that the run asked for; seconds of the whole process. With
the shared folder the first method of a repetition scores all of them and the others none: anything else ends with exit code 1.

The runs lie below --folder (default runs/benchmark-sweep) until the table is printed; a second start goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
from harness import Results, markdown, spread

METHODS = ("dpo", "ipo", "cdpo", "robust_dpo", "dpop", "r_dpo", "apo_zero", "exo", "nca", "aot")
SIDES = ("shared", "own")


def main() -> int:
    ask = harness.arguments(__doc__, repetitions=1)
    ask.add_argument("--methods", nargs="+", default=list(METHODS))
    ask.add_argument("--limit", type=int, default=128, help="rows of the file")
    ask.add_argument("--batch-size", type=int, default=4)
    ask.add_argument("--folder", type=Path, default=Path("runs/benchmark-sweep"))
    asked = ask.parse_args()
    if asked.child:
        harness.answer(asked.child, child)
        return 0
    if asked.table:
        print(tables(json.loads(asked.table.read_text())))
        return 0
    about = {k: getattr(asked, k) for k in ("methods", "limit", "batch_size", "seed", "threads")}
    results = Results(asked.output or harness.RESULTS / "sweep.json", about)
    if not results.runs:
        shutil.rmtree(asked.folder, ignore_errors=True)  # a cache of an earlier question
    jobs = []
    for repetition in range(asked.repetitions):
        for i, method in enumerate(asked.methods):
            for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                key = {"method": method, "cache": side, "repetition": repetition}
                empty = side == "own" or i == 0  # what an interrupted run left in the cache would count as read
                jobs.append((key, {**about, "folder": str(asked.folder / str(repetition)), "empty": empty}))
    results.measure(jobs, lambda r: f"{r['seconds']:.0f} s, {r['scored']} of {r['wanted']} completions scored")
    shutil.rmtree(asked.folder, ignore_errors=True)
    harness.finish(results, tables)
    return 0 if once(results.runs) else 1


def once(runs: list[dict[str, Any]]) -> bool:
    """Whether the shared cache was filled by one run of each repetition and only read by the others."""
    good = True
    for k in {r["repetition"] for r in runs}:
        shared = [r for r in runs if r["repetition"] == k and r["cache"] == "shared"]
        good &= sum(r["scored"] for r in shared) == shared[0]["wanted"] == max(r["wanted"] for r in shared)
        good &= all(r["scored"] == r["wanted"] for r in runs if r["repetition"] == k and r["cache"] == "own")
    return good


def tables(found: dict[str, Any]) -> str:
    runs, rows = found["runs"], []
    for method in dict.fromkeys(r["method"] for r in runs):
        cells = []
        for side in SIDES:
            mine = [r for r in runs if r["method"] == method and r["cache"] == side]
            scored = ", ".join(f"{r['scored']:,} and {r['wanted'] - r['scored']:,}" for r in mine)
            cells += [scored, spread([r["seconds"] for r in mine], 0)]
        rows.append([method, *cells])
    head = ["method", "shared cache: completions scored and read", "s", "own cache: scored and read", "s"]
    lines = [markdown(head, rows), ""]
    for k in sorted({r["repetition"] for r in runs}):
        total = {s: sum(r["seconds"] for r in runs if r["repetition"] == k and r["cache"] == s) for s in SIDES}
        rowed = {s: sum(r["scored"] for r in runs if r["repetition"] == k and r["cache"] == s) for s in SIDES}
        lines.append(
            f"Repetition {k}: {rowed['shared']:,} completions scored by the reference instead of {rowed['own']:,}; "
            f"{total['shared'] / 60:.1f} minutes instead of {total['own'] / 60:.1f} "
            f"({1 - total['shared'] / total['own']:.0%} saved, loading and evaluation included)."
        )
    told = "The reference was computed once." if once(runs) else "The reference was NOT computed exactly once."
    return "\n".join([*lines, told, harness.where(found)])


def child(job: dict[str, Any]) -> dict[str, Any]:
    from engine import LEARNING_RATE, MAX_LENGTH, hh_file

    folder = Path(job["folder"])
    name = f"{job['method']}-{job['cache']}"
    run, cache = folder / name, folder / ("cache" if job["cache"] == "shared" else f"{name}-cache")
    shutil.rmtree(run, ignore_errors=True)  # of a start that was interrupted
    if job["empty"]:
        shutil.rmtree(cache, ignore_errors=True)
    options = {
        "method": job["method"], "finetune": "full", "reference": "cache", "cache": cache, "limit": job["limit"],
        "max_length": MAX_LENGTH, "batch_size": job["batch_size"], "learning_rate": LEARNING_RATE, "samples": 0,
        "seed": job["seed"], "output": run, **({"threads": job["threads"]} if job["threads"] else {}),
    }  # fmt: skip
    command = [sys.executable, "-m", "trimtab", "train", str(hh_file())]
    command += [x for k, v in options.items() for x in (f"--{k}", str(v))]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TQDM_DISABLE": "1"})
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    card = json.loads((run / "run.json").read_text())
    shutil.rmtree(run)  # half a gigabyte of weights
    return {
        "seconds": seconds,
        "run_seconds": card["seconds"],
        "scored": card["engine"]["reference_cache"]["scored"],
        "wanted": 2 * (card["data"]["train"] + card["data"]["held_out"]),
        "steps": card["steps"],
        "peak_gb": card["engine"]["peak_memory_gb"],
    }


if __name__ == "__main__":
    sys.exit(main())
