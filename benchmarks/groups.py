"""K answers to each prompt: the engine that encodes the prompt once against the same engine without.

    python benchmarks/groups.py                                # three kinds of feedback, three layouts, two precisions
    python benchmarks/groups.py --kinds hh --k 8               # the goal: shared at least 2 times as fast as packed
    python benchmarks/groups.py --model tiny --repetitions 1 --output FILE              # does it run?
    python benchmarks/groups.py --table FILE

One optimiser step of plackett_luce on rankings of K answers, full fine-tuning, float32 master weights, and the pass that
fills the reference cache for its rows: both in the same layout.

hh       HH prompts, each with its own two answers and others drawn from HH: real lengths. 64 answers a step (K = 8: 8 prompts)
long     prompts of 1k to 8k tokens with 4 answers of 64 tokens, one prompt a step; random tokens and the 28 M random Llama
answers  prompts of 32 tokens with answers of 512, 8 answers a step; random tokens

Each measurement is a process of its own: a warm-up step on the shortest rows, then the timed ones, which are the same for
all layouts of a repetition; layouts interleaved. Written when it is made; a second start goes on. Layouts: ``shared`` the
prompt once, ``packed`` once per answer, no padding; ``padded`` one row per answer.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import Results, markdown, spread

LAYOUTS, PRECISIONS = ("shared", "packed", "padded"), ("float32", "bfloat16")
KINDS: dict[str, dict[str, Any]] = {  # name -> model, answers a step, timed steps, cases
    "hh": {"model": "smollm2", "answers": 64, "steps": 1, "cases": [{"k": k} for k in (2, 4, 8, 16)]},
    "long": {
        "model": "small", "answers": 4, "steps": 1,
        "cases": [{"k": 4, "prompt": p, "answer": 64} for p in (1024, 2048, 4096, 8192 - 64)],
    },
    "answers": {
        "model": "smollm2", "answers": 8, "steps": 1,
        "cases": [{"k": k, "prompt": 32, "answer": 512} for k in (2, 4, 8)],
    },
}  # fmt: skip


def main() -> None:
    ask = harness.arguments(__doc__, repetitions=3)
    ask.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ask.add_argument("--k", type=int, nargs="+", help="only these numbers of answers")
    ask.add_argument("--prompts", type=int, nargs="+", help="only these lengths of long prompts")
    ask.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    ask.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    ask.add_argument("--model", choices=("smollm2", "small", "tiny"), help="for all kinds (default: see above)")
    asked = ask.parse_args()
    if asked.child:
        return harness.answer(asked.child, child)
    if asked.table:
        return print(tables(json.loads(asked.table.read_text())))
    results = Results(
        asked.output or harness.RESULTS / "groups.json",
        {"seed": asked.seed, "threads": asked.threads, "model": asked.model, "kinds": KINDS},
    )
    scratch = Path(tempfile.mkdtemp(prefix="groups-"))
    try:
        if "hh" in asked.kinds:
            harness.run_child({"do": "prepare", "scratch": str(scratch)})
        for kind in asked.kinds:  # one kind is finished before the next one begins
            keys = [
                {"kind": kind, **case, "precision": precision, "layout": layout}
                for case in KINDS[kind]["cases"]
                if (not asked.k or case["k"] in asked.k)
                and (not asked.prompts or kind != "long" or case["prompt"] in asked.prompts)
                for precision in asked.precisions
                for layout in asked.layouts
            ]
            more = {"do": "run", "scratch": str(scratch), "model": asked.model or KINDS[kind]["model"]}
            jobs = [(key, {**job, **more}) for key, job in harness.interleaved(keys, asked)]
            results.measure(jobs, lambda r: f"{r['counted_s'] / r['steps']:.2f} s a step, {r['peak_gb']:.1f} GB")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    harness.finish(results, tables)
    return None


def tables(found: dict[str, Any]) -> str:
    """Markdown: a line per case, precision and layout, with its time against that of the shared layout."""
    good = [r for r in found["runs"] if "failed" not in r]
    case = lambda r: (r["kind"], r["k"], r.get("prompt"), r.get("answer"), r["precision"])  # noqa: E731
    rows = []
    for one in dict.fromkeys(map(case, found["runs"])):
        best = {r["repetition"]: r for r in good if case(r) == one and r["layout"] == "shared"}
        for layout in LAYOUTS:
            mine = [r for r in good if case(r) == one and r["layout"] == layout]
            lost = [r["failed"] for r in found["runs"] if case(r) == one and r["layout"] == layout and "failed" in r]
            if not mine:
                rows += [[*label(one, []), layout, lost[0], *[""] * 6]] if lost else []
                continue
            pairs = [(r, best[r["repetition"]]) for r in mine if r["repetition"] in best]
            compared = ["1", "1", "1"]
            if layout != "shared":
                compared = [
                    spread([of(a) / of(b) for a, b in pairs], 2) for of in (whole, step, lambda r: r["peak_gb"])
                ]
            times = [spread([whole(r) for r in mine], 2), spread([step(r) for r in mine], 2)]
            fed = f"{median(r['fed'] / r['tokens'] for r in mine):.2f}"
            rows.append([*label(one, mine), layout, *times, spread([r["peak_gb"] for r in mine], 1), fed, *compared])
    head = ["feedback", "precision", "layout", "s/step with the reference's pass", "without", "peak GB"]
    head += ["positions per token", "times shared's: with", "without", "memory"]
    return "\n".join([markdown(head, rows), "", harness.where(found)])


def label(one: tuple[Any, ...], runs: list[dict[str, Any]]) -> list[str]:
    kind, k, prompt, answer, precision = one
    sizes = f", {prompt} + {k} x {answer} tokens" if prompt else ""
    if runs and not prompt:
        p, c = median(r["mean_prompt"] for r in runs), median(r["mean_answer"] for r in runs)
        sizes = f", {p:.0f} + {k} x {c:.0f} tokens on average"
    return [f"{kind}, K = {k}{sizes}", precision]


def whole(run: dict[str, Any]) -> float:
    return run["counted_s"] / run["steps"]  # type: ignore[no-any-return]


def step(run: dict[str, Any]) -> float:
    return (run["counted_s"] - run["reference_s"]) / run["steps"]  # type: ignore[no-any-return]


# --- a child: one layout, one repetition ------------------------------------------------------------------------------


def child(job: dict[str, Any]) -> dict[str, Any]:
    import engine

    from trimtab.logprobs.layout import lay_out

    pickled = Path(job["scratch"]) / "pairs.pickle"
    if job["do"] == "prepare":
        pickled.write_bytes(pickle.dumps(engine.hh_examples(engine.run_config())))
        return {}
    kind, k = KINDS[job["kind"]], job["k"]
    size, model = max(kind["answers"] // k, 1), engine.model_named(job["model"])
    wanted = kind["steps"] * size
    draw = random.Random(f"{job['seed']} {job['repetition']}")
    if "prompt" in job:
        vocab = model.config.vocab_size
        warm_up = [engine.random_ranked(vocab, 16, 16, k, draw) for _ in range(size)]
        timed = [engine.random_ranked(vocab, job["prompt"], job["answer"], k, draw) for _ in range(wanted)]
    else:
        rows = sorted(engine.groups(pickle.loads(pickled.read_bytes()), k, job["seed"]), key=lambda e: e.tokens)
        warm_up, rest = rows[:size], rows[size:]
        random.Random(job["seed"]).shuffle(rest)
        start = job["repetition"] * wanted
        timed = rest[start : start + wanted]
    config = engine.run_config(
        size, job["seed"], method="plackett_luce", layout=job["layout"], precision=job["precision"], reference="cache"
    )
    found = engine.measured(config, model, [*warm_up, *timed])
    layouts = [lay_out(timed[a : a + 1], job["layout"]) for a in range(len(timed))]
    return {
        **found,
        "tokens": sum(e.tokens for e in timed),
        "fed": sum(x.input_ids.numel() for x in layouts),  # of each row alone: padded microbatches may hold more
        "mean_prompt": sum(len(e.prompt) for e in timed) / len(timed),
        "mean_answer": sum(len(c) for e in timed for c in e.completions) / (k * len(timed)),
    }


if __name__ == "__main__":
    main()
