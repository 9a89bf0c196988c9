"""What the benchmarks share: a results file that outlives interruptions, a process for each measurement, medians.

Nothing heavy is imported here: the peak memory of a child process starts at its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "numpy")
OUT_OF_MEMORY = "out of memory"


def arguments(doc: str | None, repetitions: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    ask = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--repetitions", type=int, default=repetitions)
    ask.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--output", type=Path, help="results file; a second start goes on with it")
    ask.add_argument("--table", type=Path, metavar="FILE", help="print the tables of this results file and stop")
    ask.add_argument("--child", help=argparse.SUPPRESS)
    return ask


def machine() -> dict[str, Any]:
    """Where it ran, without naming the host."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "system": platform.system(),
        "processor": next((x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")), ""),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in info],
        "cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def _unplaced(word: str) -> str:
    """A path of this machine is nothing to the reader of a result."""
    return Path(word).name if word.startswith("/") else word


class Results:
    """What was asked, where it ran, and under ``runs`` one row for each measurement, written as soon as it is made.

    A second start with the same question goes on where the first one stopped; with another question it is refused.
    """

    def __init__(self, file: Path | None, asked: Mapping[str, Any], packages: Iterable[str] = (), **about: Any) -> None:
        self.file, asked = file, json.loads(json.dumps(asked))
        self.found: dict[str, Any] = {
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_unplaced, sys.argv[1:])]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "asked": asked,
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                **{n: metadata.version(n) for n in (*PACKAGES, *packages)},
            },
            **about,
            "runs": [],
        }
        if file is not None and file.exists():
            old = json.loads(file.read_text())
            for what in ("asked", "machine", "versions"):
                if old.get(what) != self.found[what]:
                    sys.exit(
                        f"{file} holds measurements with other {what}: {old.get(what)}, now {self.found[what]}. Pass another "
                        "--output, or delete that file."
                    )
            self.found = old

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.found["runs"]  # type: ignore[no-any-return]

    def has(self, key: Mapping[str, Any]) -> bool:
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.runs)

    def add(self, row: Mapping[str, Any]) -> None:
        self.runs.append(dict(row))
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1) + "\n")
            part.replace(self.file)

    def measure(
        self, jobs: Sequence[tuple[dict[str, Any], dict[str, Any]]], told: Callable[[dict[str, Any]], str]
    ) -> None:
        """Each job (what identifies it, what the child is told) that is not there yet, in a process of its own."""
        for k, (key, job) in enumerate(jobs):
            if self.has(key):
                continue
            load = os.getloadavg()[0]
            row = {**key, "load_before": load, **run_child({**key, **job})}
            self.add(row)
            name = ", ".join(f"{v}" if isinstance(v, str) else f"{n} {v}" for n, v in key.items())
            print(f"{k + 1}/{len(jobs)} {name}: {row.get('failed') or told(row)}", flush=True)


def interleaved(
    keys: Sequence[dict[str, Any]], asked: argparse.Namespace
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Jobs: every key once in a repetition, each time in another order."""
    jobs = []
    for repetition in range(asked.repetitions):
        order = list(keys)
        random.Random(f"{asked.seed} {repetition}").shuffle(order)
        more = {"seed": asked.seed, "threads": asked.threads}
        jobs += [({**key, "repetition": repetition}, {k: v for k, v in more.items() if k not in key}) for key in order]
    return jobs


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    """This script again, for one measurement; its last line of output is the result."""
    command = [sys.executable, sys.argv[0], "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    # killed, or refused by the limit below
    if done.returncode == -9 or any(told in done.stderr for told in ("allocate memory", "MemoryError", "OutOfMemory")):
        return {"failed": OUT_OF_MEMORY}
    sys.exit(f"{job} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def answer(text: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side of :func:`run_child`. It may take the memory that is free, and is the first to be killed."""
    job = json.loads(text)
    free = Path("/proc/meminfo")
    if free.exists():
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        left = next(int(x.split()[1]) for x in free.read_text().splitlines() if x.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (left * 1024, left * 1024))
    import torch
    from transformers.utils import logging

    from trimtab.run import code_hash

    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    logging.disable_progress_bar()
    found = {**work(job), "threads": torch.get_num_threads(), "code": code_hash()}
    print("\n" + json.dumps(found))


# --- telling ----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Median (smallest to largest)."""
    if not values:
        return "-"
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def where(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]] | None = None) -> str:
    """How busy the machine was, and whether all rows come from one state of the code."""
    runs = found["runs"] if runs is None else runs
    codes = {r.get("code") for r in runs}
    busy = max((r["load_before"] for r in runs), default=0.0)
    told = f"Load average before a run, at most: {busy:.1f} on {found['machine']['cpus']} processors."
    return told + (f" Measured with {len(codes)} states of the code." if len(codes) > 1 else "")


def finish(results: Results, tables: Callable[[dict[str, Any]], str]) -> None:
    if results.file is not None:
        print(f"written: {results.file}")
    print(tables(results.found))
