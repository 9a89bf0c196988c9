"""Every method in the controlled world: the tables of docs/methods_compared.md.

    python benchmarks/world_table.py                      # all methods, five seeds, two workers
    python benchmarks/world_table.py --methods dpo,kto --seeds 3
    python benchmarks/world_table.py --promises           # the promises of the methods, too

Results lie under runs/compare, one file per trial; what is there is not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trimtab.compare.command import OUTPUT, check_promises, compare, parse_arms
from trimtab.compare.trial import Budget


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="plain")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=Budget().steps)
    parser.add_argument("--against", default="dpo")
    parser.add_argument("--promises", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    more = {"output": asked.output, "workers": asked.workers, "command": command, "tell": _tell}
    started = time.perf_counter()
    budget = replace(Budget(), steps=asked.steps)
    table = compare(asked.world, parse_arms(asked.methods), asked.seeds, against=asked.against, budget=budget, **more)
    print(f"## World: {asked.world}\n\n{table}\n")
    if asked.promises:
        print(f"## Promises\n\n{check_promises(asked.seeds, **more)}\n")
    print(f"`{command}`: {(time.perf_counter() - started) / 60:.0f} minutes, {asked.workers} workers.")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
