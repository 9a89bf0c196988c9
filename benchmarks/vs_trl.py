"""DPO with trimtab against DPO with TRL 1.16: the same pairs, the same batches, the same model, on this machine's CPU.

    python benchmarks/vs_trl.py                  # batches of 4 and of 8 pairs, 5 repetitions; leave the machine alone
    python benchmarks/vs_trl.py --quick          # one repetition, few batches: does it run?
    python benchmarks/vs_trl.py --table FILE     # the tables of an earlier run

One epoch in a seeded order is cut into repetitions of N batches; no pair is used twice. In each repetition every setting
runs in a process of its own, in shuffled order: it loads the model, makes one warm-up step on a batch of its own (not
timed), then trains on the N batches. A setting that groups by length sorts the pairs of all repetitions together and
deals its batches out to the repetitions: over all of them the pairs are the same. Counted are the N optimiser steps (data
loading, reference, loss, gradient, clipping, AdamW, logging) and, where the reference is computed beforehand, that pass
over the same N batches. Not counted, but reported, is the start: imports, loading, TRL's set-up, trimtab's layout check.

SmolLM2-135M-Instruct, full fine-tuning, float32 master weights, AdamW, at most 512 tokens, learning rate 1e-6. Needs
``pip install -c constraints.txt -e '.[bench]'``; pairs below $TRIMTAB_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

# name -> (what it is, options); nothing heavy is imported here: a child's peak memory starts at its parent's
SETTINGS: dict[str, dict[str, Any]] = {
    "trl default": {"side": "trl", "bf16": True, "gradient_checkpointing": True, "cp": False},
    "trl bf16 +cp": {"side": "trl", "bf16": True, "gradient_checkpointing": False, "cp": True},
    "trl fp32 +cp": {"side": "trl", "bf16": False, "gradient_checkpointing": False, "cp": True},
    "trl bf16 +cp, grouped, precomputed": {
        "side": "trl", "bf16": True, "gradient_checkpointing": False, "cp": True, "grouped": True, "precompute": True,
    },
    "trl fp32 +cp, grouped, precomputed": {
        "side": "trl", "bf16": False, "gradient_checkpointing": False, "cp": True, "grouped": True, "precompute": True,
    },
    "trimtab bf16": {"side": "trimtab", "precision": "bfloat16", "reference": "cache"},
    "trimtab bf16, frozen copy": {"side": "trimtab", "precision": "bfloat16", "reference": "copy"},
    "trimtab fp32": {"side": "trimtab", "precision": "float32", "reference": "cache"},
    "trimtab fp32, frozen copy": {"side": "trimtab", "precision": "float32", "reference": "copy"},
}  # fmt: skip
PAIRED = [(t, o) for o in ("trimtab bf16", "trimtab fp32") for t in SETTINGS if t.startswith("trl")]
BATCHES = {4: 3, 8: 2}  # batches per repetition: about four minutes for all settings


def main() -> None:
    ask = argparse.ArgumentParser(description="trimtab against TRL")
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--repetitions", type=int, default=5)
    ask.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8])
    ask.add_argument("--batches", type=int, help="batches per repetition (default: 3 of 4 pairs, 2 of 8)")
    ask.add_argument("--only", nargs="+", choices=SETTINGS, help="settings to run (default: all)")
    ask.add_argument("--threads", type=int, default=None)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--output", type=Path, help="default: benchmarks/results/vs_trl_DATE.json; --quick: not written")
    ask.add_argument("--table", type=Path, metavar="FILE", help="print the tables of this result and stop")
    ask.add_argument("--child", help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.child:
        return child(json.loads(asked.child))
    if asked.table:
        return print(tables(json.loads(asked.table.read_text())))
    if asked.quick:
        asked.repetitions, asked.batches = 1, asked.batches or 2
    result = measure(asked)
    if asked.output or not asked.quick:
        file = asked.output or Path(__file__).parent / "results" / f"vs_trl_{datetime.now(UTC):%Y-%m-%d}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {file}")
    print(tables(result))
    return None


# --- the parent: order, processes, arithmetic -------------------------------------------------------------------------


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    scratch = Path(tempfile.mkdtemp(prefix="vs-trl-"))
    try:
        info = run_child({"do": "prepare", "scratch": str(scratch), "threads": asked.threads})
        result: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/vs_trl.py", *sys.argv[1:]]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "seed": asked.seed,
            **info,
            "settings": SETTINGS,
            "samples": {},
            "runs": [],
        }
        names = asked.only or list(SETTINGS)
        for size in asked.batch_sizes:
            n = asked.batches or BATCHES.get(size, 3)
            order = list(range(info["pairs"]))
            random.Random(asked.seed).shuffle(order)
            per = (n + 1) * size  # with the warm-up batch
            if per * asked.repetitions > len(order):
                sys.exit(
                    f"{asked.repetitions} repetitions of {n + 1} batches of {size} need more than {len(order)} pairs"
                )
            timed = n * size * asked.repetitions
            result["samples"][str(size)] = {"batches": n, "timed_pairs": timed, "share_of_epoch": timed / len(order)}
            rows = [order[k * per : (k + 1) * per] for k in range(asked.repetitions)]
            sorted_rows = grouped(rows, size, json.loads((scratch / "lengths.json").read_text()), asked.seed)
            for repetition in range(asked.repetitions):
                shuffled = names[:]
                random.Random(f"{asked.seed} {size} {repetition}").shuffle(shuffled)
                for name in shuffled:
                    load = os.getloadavg()[0]
                    own = (sorted_rows if SETTINGS[name].get("grouped") else rows)[repetition]
                    job = {
                        "do": "run", "setting": SETTINGS[name], "size": size, "rows": own, "seed": asked.seed,
                        "threads": asked.threads, "scratch": str(scratch),
                    }  # fmt: skip
                    got = run_child(job)
                    run = {"setting": name, "batch_size": size, "repetition": repetition, "load_before": load, **got}
                    result["runs"].append(run)
                    told = f"{run['tokens'] / run['counted_s']:.0f} tokens/s, {run['peak_gb']:.1f} GB"
                    print(
                        f"batch {size}, repetition {repetition}, {name}: {run['counted_s']:.1f} s, {told}", flush=True
                    )
        return result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def grouped(rows: list[list[int]], size: int, lengths: list[int], seed: int) -> list[list[int]]:
    """The timed pairs of all repetitions in batches of similar length, dealt out so that each repetition gets short and
    long ones; warm-up batches as they were. What ``group_by_length`` does with 50 batches at a time."""
    pool = sorted((i for r in rows for i in r[size:]), key=lambda i: lengths[i])
    batches = [pool[a : a + size] for a in range(0, len(pool), size)]
    dealt: list[list[list[int]]] = [[] for _ in rows]
    for j, batch in enumerate(batches):
        there, k = j // len(rows) % 2 == 0, j % len(rows)
        dealt[k if there else len(rows) - 1 - k].append(
            batch
        )  # there and back: one way, the last would get the longest
    for mine in dealt:
        random.Random(seed).shuffle(mine)
    return [[*r[:size], *(i for b in mine for i in b)] for r, mine in zip(rows, dealt, strict=True)]


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    """This script again, for one setting; its last line of output is the result."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        killed = " (killed: most likely the memory of the machine)" if done.returncode == -9 else ""
        sys.exit(f"{job.get('setting', job['do'])} ended with {done.returncode}{killed}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tables(result: dict[str, Any]) -> str:
    """Markdown: per batch size the settings, then ratios paired by repetition."""
    lines = []
    for size, sample in result["samples"].items():
        runs = [r for r in result["runs"] if r["batch_size"] == int(size)]
        names = [n for n in SETTINGS if any(r["setting"] == n for r in runs)]
        repetitions = len({r["repetition"] for r in runs})
        lines += [
            f"Batches of {size} pairs: {sample['timed_pairs']} pairs, {sample['share_of_epoch']:.1%} of one epoch, each once, "
            f"in {repetitions} repetition(s) of {sample['batches']} batches. Median over repetitions (range).",
            "",
            "| setting | steps/s | s/step | CPU s/step | tokens/s | reference pass | padding | peak GB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in names:
            mine = [r for r in runs if r["setting"] == name]
            beforehand = median(r["reference_s"] / r["counted_s"] for r in mine)
            cells = [
                spread([r["steps"] / r["counted_s"] for r in mine], 3),
                spread([r["counted_s"] / r["steps"] for r in mine], 2),
                spread([r["counted_cpu_s"] / r["steps"] for r in mine], 2),
                spread([r["tokens"] / r["counted_s"] for r in mine], 0),
                f"{beforehand:.0%}" if beforehand else "in each step",
                f"{median(r['padding'] for r in mine):.2f}" if name.startswith("trl") else "none",
                spread([r["peak_gb"] for r in mine], 1),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [
            "",
            "| TRL | trimtab | speed-up, paired by repetition | over all | in CPU time | memory of trimtab / TRL |",
            "|---|---|---|---|---|---|",
        ]
        for theirs, ours in PAIRED:
            a = {r["repetition"]: r for r in runs if r["setting"] == theirs}
            b = {r["repetition"]: r for r in runs if r["setting"] == ours}
            if both := sorted(a.keys() & b.keys()):
                faster = spread([per_token(a[k], "counted_s") / per_token(b[k], "counted_s") for k in both], 2)
                leaner = spread([per_token(a[k], "counted_cpu_s") / per_token(b[k], "counted_cpu_s") for k in both], 2)
                whole = sum(a[k]["counted_s"] for k in both) / sum(b[k]["counted_s"] for k in both)
                smaller = spread([b[k]["peak_gb"] / a[k]["peak_gb"] for k in both], 2)
                lines.append(f"| {theirs} | {ours} | {faster} | {whole:.2f} | {leaner} | {smaller} |")
        lines.append("")
        lines += losses_agree(runs)
    busy = max(r["load_before"] for r in result["runs"])
    lines.append(f"Load average before a run, at most: {busy:.1f} on {result['machine']['cpus']} processors.")
    return "\n".join(lines)


def per_token(run: dict[str, Any], what: str) -> float:
    """Grouped settings have other pairs in a repetition, so that ratios are of time per real token."""
    return run[what] / run["tokens"]


def losses_agree(runs: list[dict[str, Any]]) -> list[str]:
    """Both sides trained on the same thing: largest difference of a step's loss between the float32 settings."""
    by = {(r["setting"], r["repetition"]): r["losses"] for r in runs}
    gaps = [
        abs(x - y)
        for (name, k), theirs in by.items()
        if name == "trl fp32 +cp" and ("trimtab fp32", k) in by
        for x, y in zip(theirs, by["trimtab fp32", k], strict=True)
    ]
    return [f"Same steps: float32 losses of the two sides differ by at most {max(gaps):.1e}.", ""] if gaps else []


def spread(values: list[float], digits: int) -> str:
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- a child: one setting, one repetition -----------------------------------------------------------------------------


def child(job: dict[str, Any]) -> None:
    begun = time.perf_counter()
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    scratch = Path(job["scratch"])
    if job["do"] == "prepare":
        print(json.dumps(prepared(scratch)))
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    pairs = pickle.loads((scratch / "pairs.pickle").read_bytes())
    examples = [pairs[i] for i in job["rows"]]
    setting, size = job["setting"], job["size"]
    folder = Path(tempfile.mkdtemp(dir=scratch))
    work = run_trl if setting["side"] == "trl" else run_trimtab
    clock, beforehand, train_begun = work(setting, examples, size, job["seed"], folder)
    assert len(clock.ends) == len(examples) // size
    counted = clock.after_warm_up.plus(beforehand)
    out = {
        "counted_s": counted.wall,
        "counted_cpu_s": counted.cpu,
        "reference_s": beforehand.wall,
        "start_s": train_begun.wall - begun - beforehand.wall,
        "warm_up_s": clock.ends[0].wall - train_begun.wall,
        "steps": len(clock.ends) - 1,
        "tokens": sum(e.tokens for e in examples[size:]),
        "padding": padding(examples[size:], size),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9),
        "losses": clock.losses,
    }
    print("\n" + json.dumps(out))


def padding(examples: list[Any], size: int) -> float:
    """Positions of the padded batches per token of their sequences: what a padding trainer makes of this order."""
    sequences = [
        [len(e.prompt) + len(c) for e in examples[a : a + size] for c in e.completions]
        for a in range(0, len(examples), size)
    ]
    return sum(len(b) * max(b) for b in sequences) / sum(map(sum, sequences))


def run_trl(setting: dict[str, Any], examples: list[Any], size: int, seed: int, folder: Path) -> Any:
    from contextlib import nullcontext

    from against_trl import StepClock, Time, completions_only, load, stopwatch, trl_trainer
    from trl import DPOTrainer

    # the pass beforehand takes its whole call, writing included, less the warm-up batch's forward
    whole, batch = list[Time](), list[Time]()
    trainer_class: Any = DPOTrainer
    trainer_class._precompute_ref_logps = stopwatch(DPOTrainer._precompute_ref_logps, whole)
    trainer_class.compute_ref_log_probs = stopwatch(DPOTrainer.compute_ref_log_probs, batch)
    options = {k: setting[k] for k in ("bf16", "gradient_checkpointing")}
    clock = StepClock()
    with completions_only() if setting["cp"] else nullcontext():
        trainer = trl_trainer(
            load(), examples, folder, batch_size=size, seed=seed, callbacks=[clock],
            precompute_ref_log_probs=bool(setting.get("precompute")), **options,
        )  # fmt: skip
        begun = Time.now()
        trainer.train()
    beforehand = Time(0, 0) if not whole else Time(0, 0).plus(*whole).since(batch[0])
    return clock, beforehand, begun


def run_trimtab(setting: dict[str, Any], examples: list[Any], size: int, seed: int, folder: Path) -> Any:
    import torch
    from against_trl import StepClock, Time, cached_reference, frozen_reference, load, run_config, trimtab_trainer

    config = run_config(size, seed, precision=setting["precision"], reference=setting["reference"])
    precision = getattr(torch, setting["precision"])
    clock = StepClock()
    trainer = trimtab_trainer(config, load(), examples, folder, precision, callbacks=[clock])
    beforehand = Time(0, 0)
    if setting["reference"] == "cache":
        trainer.reference, beforehand = cached_reference(trainer, folder / "reference", size)
    else:
        trainer.reference = frozen_reference(trainer, precision)
    begun = Time.now()
    trainer.train()
    return clock, beforehand, begun


def prepared(scratch: Path) -> dict[str, Any]:
    """Tokenise the pairs once for all; say what they are and what runs here."""
    import torch
    from against_trl import MAX_LENGTH, MODEL, hh_examples, run_config

    examples = hh_examples(run_config())
    (scratch / "pairs.pickle").write_bytes(pickle.dumps(examples))
    lengths = [len(e.prompt) + max(map(len, e.completions)) for e in examples]
    (scratch / "lengths.json").write_text(json.dumps(lengths))
    names = ("trl", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    mean = lambda values: sum(values) / len(examples)  # noqa: E731
    return {
        "pairs": len(examples),
        "model": MODEL,
        "max_length": MAX_LENGTH,
        "mean_tokens": {
            "prompt": mean(len(e.prompt) for e in examples),
            "chosen": mean(len(e.completions[0]) for e in examples),
            "rejected": mean(len(e.completions[1]) for e in examples),
        },
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in names}},
        "machine": {
            "system": platform.system(),
            "processor": next((x.split(":")[1].strip() for x in flags.splitlines() if x.startswith("model name")), ""),
            "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags],
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
    }


if __name__ == "__main__":
    main()
