"""DPO and KTO with trimtab against TRL 1.16: the same rows, the same batches, the same model, on this machine's CPU.

    python benchmarks/vs_trl.py                        # DPO, batches of 4, 8 and 16 pairs; leave the machine alone
    python benchmarks/vs_trl.py --method kto           # KTO, batches of 4, 8 and 16 thumbs
    python benchmarks/vs_trl.py --batches 4 --repetitions 1 --steps 1 --output FILE     # does it run?
    python benchmarks/vs_trl.py --table FILE           # the tables of an earlier run

One epoch in a seeded order is cut into repetitions of N batches; no row is used twice. In each repetition every setting
runs in a process of its own, in shuffled order: it loads the model, makes one warm-up step on a batch of its own (not
timed), then trains on the N batches. A setting that groups by length sorts the rows of all repetitions together and
deals its batches out to the repetitions: over all of them the rows are the same. Counted are the N optimiser steps (data
loading, reference, loss, gradient, clipping, AdamW, logging) and, where the reference is computed beforehand, that pass
over the same N batches. Not counted, but reported, is the start: imports, loading, TRL's set-up, trimtab's layout check.
Each measurement is written when it is made, and a second start goes on with what is missing.

KTO: one answer of each pair is drawn as a thumb, and TRL is given trimtab's mismatched texts (the next row's answer; its own
way is the row before), uncut: both sides score the same rows and the same mismatched rows, which count as work. TRL refuses
to group rows by length here, because its mismatched answers are tied to the order, so its best is the precomputed reference.
It takes z0 from one forward pass; with 16 rows in one pass that is the whole batch, as with trimtab.

TRL gets at most 16 sequences in a forward pass (8 pairs, 16 thumbs) and accumulates gradients beyond: 16 pairs at once do
not fit into 23 GB without checkpointing, and it pads less this way. A setting that runs out of memory is told, not left out.

SmolLM2-135M-Instruct, full fine-tuning, float32 master weights, AdamW, at most 512 tokens, learning rate 1e-6. Needs
``pip install -c constraints.txt -e '.[bench]'``; pairs below $TRIMTAB_DATA (default ../shared/data).
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import Results, markdown, spread

# name -> options; nothing heavy is imported here: a child's peak memory starts at its parent's
TRL = {"side": "trl", "bf16": True, "gradient_checkpointing": False, "cp": True}
BEST = {**TRL, "precompute": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "trl default": {**TRL, "gradient_checkpointing": True, "cp": False},
    "trl bf16 +cp": TRL,
    "trl fp32 +cp": {**TRL, "bf16": False},
    "trl bf16 +cp, grouped, precomputed": {**BEST, "grouped": True, "method": "dpo"},
    "trl fp32 +cp, grouped, precomputed": {**BEST, "grouped": True, "method": "dpo", "bf16": False},
    "trl bf16 +cp, precomputed": {**BEST, "method": "kto"},
    "trl fp32 +cp, precomputed": {**BEST, "method": "kto", "bf16": False},
    "trimtab bf16": {"side": "trimtab", "precision": "bfloat16", "reference": "cache"},
    "trimtab bf16, frozen copy": {"side": "trimtab", "precision": "bfloat16", "reference": "copy"},
    "trimtab fp32": {"side": "trimtab", "precision": "float32", "reference": "cache"},
    "trimtab fp32, frozen copy": {"side": "trimtab", "precision": "float32", "reference": "copy"},
}
PAIRED = [(t, o) for o in ("trimtab bf16", "trimtab fp32") for t in SETTINGS if t.startswith("trl")]
STEPS = {4: 3, 8: 2, 16: 1}  # batches per repetition
AT_ONCE = {"dpo": 8, "kto": 16}  # rows in one forward pass of TRL


def main() -> None:
    ask = harness.arguments(__doc__)
    ask.add_argument("--method", choices=AT_ONCE, default="dpo")
    ask.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16], help="batch sizes, in pairs or thumbs")
    ask.add_argument("--steps", type=int, help=f"batches per repetition (default, by batch size: {STEPS})")
    ask.add_argument("--only", nargs="+", choices=SETTINGS, help="settings to run (default: all)")
    asked = ask.parse_args()
    if asked.child:
        return harness.answer(asked.child, child)
    if asked.table:
        return print(tables(json.loads(asked.table.read_text())))
    harness.finish(measure(asked), tables)
    return None


# --- the parent: order, processes, arithmetic -------------------------------------------------------------------------


def measure(asked: Any) -> Results:
    scratch = Path(tempfile.mkdtemp(prefix="vs-trl-"))
    try:
        told = {"method": asked.method, "scratch": str(scratch), "seed": asked.seed, "threads": asked.threads}
        info = harness.run_child({"do": "prepare", **told})
        lengths = info.pop("lengths")
        names = [n for n in asked.only or SETTINGS if SETTINGS[n].get("method", asked.method) == asked.method]
        jobs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        samples: dict[str, Any] = {}
        for size in asked.batches:
            n = asked.steps or STEPS.get(size, 1)
            if (n + 1) * size * asked.repetitions > info["pairs"]:
                sys.exit(
                    f"{asked.repetitions} repetitions of {n + 1} batches of {size} need more than {info['pairs']} rows"
                )
            timed = n * size * asked.repetitions
            samples[str(size)] = {"batches": n, "timed_pairs": timed, "share_of_epoch": timed / info["pairs"]}
            rows = drawn(info["pairs"], size, n, asked.repetitions, asked.seed)
            sorted_rows = grouped(rows, size, lengths, asked.seed)
            keys = [{"batch_size": size, "setting": name} for name in names]
            for key, job in harness.interleaved(keys, asked):
                own = sorted_rows if SETTINGS[key["setting"]].get("grouped") else rows
                jobs.append((key, {**job, **told, "do": "run", "rows": own[key["repetition"]]}))
        # the rows of a repetition depend on how many repetitions there are
        question = {k: getattr(asked, k) for k in ("method", "repetitions", "steps", "seed", "threads")}
        file = asked.output or harness.RESULTS / f"vs_trl-{asked.method}.json"
        results = Results(file, question, ("trl", "datasets"), **info, settings=SETTINGS, samples={})
        results.found["samples"] |= samples
        results.measure(jobs, lambda r: f"{r['counted_s']:.1f} s, {r['tokens'] / r['counted_s']:.0f} tokens/s")
        return results
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def drawn(rows: int, size: int, batches: int, repetitions: int, seed: int) -> list[list[int]]:
    """Numbers of the rows of each repetition; its first batch warms up."""
    order, per = list(range(rows)), (batches + 1) * size
    random.Random(seed).shuffle(order)
    return [order[k * per : (k + 1) * per] for k in range(repetitions)]


def grouped(rows: list[list[int]], size: int, lengths: list[int], seed: int) -> list[list[int]]:
    """The timed rows of all repetitions in batches of similar length, dealt out so that each repetition gets short and
    long ones; warm-up batches as they were. What ``group_by_length`` does with 50 batches at a time."""
    pool = sorted((i for r in rows for i in r[size:]), key=lambda i: lengths[i])
    batches = [pool[a : a + size] for a in range(0, len(pool), size)]
    dealt: list[list[list[int]]] = [[] for _ in rows]
    for j, batch in enumerate(batches):
        # there and back: one way, the last would get the longest
        there, k = j // len(rows) % 2 == 0, j % len(rows)
        dealt[k if there else len(rows) - 1 - k].append(batch)
    for mine in dealt:
        random.Random(seed).shuffle(mine)
    return [[*r[:size], *(i for b in mine for i in b)] for r, mine in zip(rows, dealt, strict=True)]


def tables(result: dict[str, Any]) -> str:
    """Markdown: per batch size the settings, then ratios paired by repetition."""
    method = result.get("asked", {}).get("method", "dpo")
    what, lines = {"dpo": "pairs", "kto": "thumbs"}[method], []
    for size, sample in result["samples"].items():
        every = [r for r in result["runs"] if r["batch_size"] == int(size)]
        runs = [r for r in every if "failed" not in r]
        repetitions = len({r["repetition"] for r in runs})
        lines += [
            f"Batches of {size} {what}: {sample['timed_pairs']} {what}, {sample['share_of_epoch']:.1%} of one epoch, each once, "
            f"in {repetitions} repetition(s) of {sample['batches']} batches. Median over repetitions (range).",
            "",
        ]
        rows = []
        for name in SETTINGS:
            mine = [r for r in runs if r["setting"] == name]
            if lost := [r["failed"] for r in every if r["setting"] == name and "failed" in r]:
                lines += [
                    f"{name}: {len(lost)} of {len(lost) + len(mine)} ended with {', '.join(sorted(set(lost)))}.",
                    "",
                ]
            if mine:
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
                rows.append([name, *cells])
        head = ["setting", "steps/s", "s/step", "CPU s/step", "tokens/s", "reference pass", "padding", "peak GB"]
        lines += [markdown(head, rows), "", ratios(runs), "", *losses_agree(runs)]
    return "\n".join([*lines, harness.where(result)])


def ratios(runs: list[dict[str, Any]]) -> str:
    rows = []
    for theirs, ours in PAIRED:
        a = {r["repetition"]: r for r in runs if r["setting"] == theirs}
        b = {r["repetition"]: r for r in runs if r["setting"] == ours}
        if both := sorted(a.keys() & b.keys()):
            faster = spread([per_token(a[k], "counted_s") / per_token(b[k], "counted_s") for k in both], 2)
            leaner = spread([per_token(a[k], "counted_cpu_s") / per_token(b[k], "counted_cpu_s") for k in both], 2)
            whole = sum(a[k]["counted_s"] for k in both) / sum(b[k]["counted_s"] for k in both)
            smaller = spread([b[k]["peak_gb"] / a[k]["peak_gb"] for k in both], 2)
            rows.append([theirs, ours, faster, f"{whole:.2f}", leaner, smaller])
    head = ["TRL", "trimtab", "speed-up, paired by repetition", "over all", "in CPU time", "memory of trimtab / TRL"]
    return markdown(head, rows)


def per_token(run: dict[str, Any], what: str) -> float:
    """Grouped settings have other rows in a repetition, so that ratios are of time per real token."""
    return run[what] / run["tokens"]  # type: ignore[no-any-return]


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


# --- a child: one setting, one repetition -----------------------------------------------------------------------------


def child(job: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    scratch = Path(job["scratch"])
    if job["do"] == "prepare":
        return prepared(scratch, job["method"], job["seed"])
    import engine

    rows = pickle.loads((scratch / "rows.pickle").read_bytes())
    examples = [rows[i] for i in job["rows"]]
    setting, size = SETTINGS[job["setting"]], job["batch_size"]
    folder = Path(tempfile.mkdtemp(dir=scratch))
    work = run_trl if setting["side"] == "trl" else run_trimtab
    clock, beforehand, train_begun = work(setting, examples, job, folder)
    assert len(clock.ends) == len(examples) // size
    config = engine.run_config(size, method=job["method"])
    timed = [examples[a : a + size] for a in range(size, len(examples), size)]
    return {
        **engine.figures(clock, beforehand, train_begun),
        "start_s": train_begun.wall - begun - beforehand.wall,
        "tokens": sum(e.tokens for b in timed for e in engine.asked_of_reference(b, config)),
        "padding": padding(examples[size:], min(size, AT_ONCE[job["method"]])),
    }


def padding(examples: list[Any], size: int) -> float:
    """Positions of the padded batches per token of their sequences: what a padding trainer makes of this order."""
    sequences = [
        [len(e.prompt) + len(c) for e in examples[a : a + size] for c in e.completions]
        for a in range(0, len(examples), size)
    ]
    return sum(len(b) * max(b) for b in sequences) / sum(map(sum, sequences))


def run_trl(setting: dict[str, Any], examples: list[Any], job: dict[str, Any], folder: Path) -> Any:
    from contextlib import nullcontext

    from against_trl import completions_only, trained
    from engine import load

    method = job["method"]
    options = {k: setting[k] for k in ("bf16", "gradient_checkpointing")}
    with completions_only() if setting["cp"] else nullcontext():
        return trained(
            load(), examples, folder, batch_size=job["batch_size"], at_once=AT_ONCE[method], method=method,
            seed=job["seed"], precompute_ref_log_probs=bool(setting.get("precompute")), **options,
        )  # fmt: skip


def run_trimtab(setting: dict[str, Any], examples: list[Any], job: dict[str, Any], folder: Path) -> Any:
    from engine import load, run_config, trained

    how = {"precision": setting["precision"], "reference": setting["reference"]}
    config = run_config(job["batch_size"], job["seed"], method=job["method"], **how)
    clock, beforehand, begun, _ = trained(config, load(), examples, folder)
    return clock, beforehand, begun


def prepared(scratch: Path, method: str, seed: int) -> dict[str, Any]:
    """Tokenise the rows once for all; say what they are."""
    from engine import MAX_LENGTH, MODEL, hh_examples, run_config, thumbs

    rows = hh_examples(run_config())
    if method == "kto":
        rows = thumbs(rows, seed)
    (scratch / "rows.pickle").write_bytes(pickle.dumps(rows))
    mean = lambda values: sum(values) / len(rows)  # noqa: E731
    sides = {"dpo": ("chosen", "rejected"), "kto": ("answer",)}[method]
    return {
        "pairs": len(rows),
        "model": MODEL,
        "max_length": MAX_LENGTH,
        "mean_tokens": {
            "prompt": mean(len(e.prompt) for e in rows),
            **{side: mean(len(e.completions[i]) for e in rows) for i, side in enumerate(sides)},
        },
        "lengths": [len(e.prompt) + max(map(len, e.completions)) for e in rows],
    }


if __name__ == "__main__":
    main()
