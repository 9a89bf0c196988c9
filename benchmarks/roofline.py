"""How near DPO and KTO come to the best matrix-product rate of this machine, and what the rest of the time is spent on.

    python benchmarks/roofline.py                              # SmolLM2, batch 4 and 8, full and LoRA, 1 and 2 threads
    python benchmarks/roofline.py --threads-of 2 --batches 4 --finetune full
    python benchmarks/roofline.py --method kto --threads-of 2 --batches 4 --finetune full --output FILE
    python benchmarks/roofline.py --model tiny --batches 4 --repetitions 1 --steps 1 --output FILE      # does it run?
    python benchmarks/roofline.py --table FILE

share = minimal FLOPs / (seconds x rate)

Minimal FLOPs: the matrix products of forward and backward at the positions that are needed (``minimal_flops``): each prompt
once, what all prompts of a batch begin with once, no padding, the vocabulary projection at completion positions only,
attention over allowed pairs only, no product whose gradient nobody reads (frozen weights), nothing recomputed, and the
reference's forward pass. KTO's mismatched completions go on from their prompts, forward only, by policy and reference.
Softmax, norms, AdamW count 0.
Seconds: an optimiser step as a run makes it, and the reference's share (full: the pass that fills its cache; LoRA: the
switched-off adapter in each step). HH pairs in random order, not in groups of equal length.
Rate, measured in the same process before and after, best of both: ``square`` the best of products of n x n matrices, by torch
or by what the engine takes in its place (``trimtab.logprobs.products``); ``shapes`` what the model's own products reach,
forward and backward, weighed by their FLOPs (a time for each kind of product, added up). A share of 1 of ``shapes`` would be a
step that does nothing but these products.

Profile: torch.profiler over one more step, self CPU time. An operation in the backward pass belongs to the group of the
forward operation that it differentiates.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import Results, markdown, spread

PRECISIONS = ("float32", "bfloat16")
SQUARES = (512, 1024, 2048, 4096)
GROUPS = (
    "linear forward", "linear backward", "attention forward", "attention backward", "head forward", "head backward",
    "copies and casts", "elementwise", "gradient accumulation", "optimiser and clipping", "other operations",
    "between operations",
)  # fmt: skip


def main() -> None:
    ask = harness.arguments(__doc__, repetitions=3)
    ask.add_argument("--method", choices=("dpo", "kto"), default="dpo")
    ask.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="pairs (thumbs for KTO) of a step")
    ask.add_argument("--finetune", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    ask.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    ask.add_argument("--threads-of", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    ask.add_argument("--steps", type=int, default=3, help="timed steps of a measurement")
    ask.add_argument("--model", choices=("smollm2", "small", "tiny"), default="smollm2")
    asked = ask.parse_args()
    if asked.child:
        return harness.answer(asked.child, child)
    if asked.table:
        return print(tables(json.loads(asked.table.read_text())))
    results = Results(
        asked.output or harness.RESULTS / "roofline.json",
        {"seed": asked.seed, "model": asked.model, "steps": asked.steps, "method": asked.method},
    )
    scratch = Path(tempfile.mkdtemp(prefix="roofline-"))
    try:
        harness.run_child({"do": "prepare", "scratch": str(scratch)})
        keys = [
            {"finetune": finetune, "precision": precision, "batch_size": size, "threads": threads}
            for finetune in asked.finetune
            for precision in asked.precisions
            for size in asked.batches
            for threads in asked.threads_of
        ]
        more = {
            "do": "run",
            "scratch": str(scratch),
            "model": asked.model,
            "steps": asked.steps,
            "method": asked.method,
        }
        jobs = [(key, {**job, **more}) for key, job in harness.interleaved(keys, asked)]
        results.measure(jobs, lambda r: f"{seconds(r):.2f} s a step, {share(r, 'square'):.0%} of the square rate")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    harness.finish(results, tables)
    return None


# --- the minimal work -------------------------------------------------------------------------------------------------


def shape_of(config: Any) -> dict[str, int]:
    """What of a Llama's configuration decides the work."""
    heads = config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "groups": config.num_key_value_heads,
        "width": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab": config.vocab_size,
    }


def products(shape: dict[str, int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear maps of one layer."""
    h, q, kv = shape["hidden"], shape["heads"] * shape["width"], shape["groups"] * shape["width"]
    return [(h, q), (h, kv), (h, kv), (q, h), (h, shape["inner"]), (h, shape["inner"]), (shape["inner"], h)]


def minimal_flops(
    shape: dict[str, int],
    rows: Sequence[tuple[int, Sequence[int]]],
    *,
    rank: int | None = None,
    reference: bool = True,
    beside: Sequence[int] = (),
    opening: int = 0,
) -> dict[str, float]:
    """FLOPs (2 a multiply-add) of one optimiser step: ``linear``, ``attention``, ``head``.

    Args:
        rows: (prompt tokens, tokens of each completion). The last token of a completion is not fed.
        rank: of a LoRA adapter on every linear map of the layers; None trains all weights.
        reference: whether its forward pass counts.
        beside: tokens of another completion of each row, which is scored and not learned from (KTO's mismatched ones).
        opening: tokens that all prompts begin with, which are read once (``trimtab.logprobs.layout.opening``).
    """
    if beside:  # after a prompt that has been read: the work with them less the work without
        wider = [(p, [*cs, c]) for (p, cs), c in zip(rows, beside, strict=True)]
        learned, without, both = (
            minimal_flops(shape, rows, rank=rank, reference=reference, opening=opening),
            minimal_flops(shape, rows, reference=False, opening=opening),
            minimal_flops(shape, wider, reference=False, opening=opening),
        )
        passes = 2 if reference else 1  # forward only, a third of what learning takes
        return {part: learned[part] + passes * (both[part] - without[part]) / 3 for part in learned}
    again = len(rows) - 1  # how often what is read once would be read again
    fed = sum(p + sum(c - 1 for c in cs) for p, cs in rows) - again * opening
    scored = sum(c for _, cs in rows for c in cs)
    # a prompt token sees those before it and itself; a completion's, the prompt too
    pairs = sum(p * (p + 1) / 2 + sum((c - 1) * p + (c - 1) * c / 2 for c in cs) for p, cs in rows)
    pairs -= again * opening * (opening + 1) / 2
    maps = products(shape)
    layers, passes = shape["layers"], 2 if reference else 1
    unread = max(fed - scored, 0)  # of the last layer, the products behind its attention
    forward = 2 * fed * layers * sum(a * b for a, b in maps) - 2 * unread * sum(a * b for a, b in maps[4:])
    attention = 4 * pairs * layers * shape["heads"] * shape["width"]
    head = 2 * scored * shape["hidden"] * shape["vocab"]
    if rank is None:  # backward: a product for the input and one for the weight
        linear, above = forward * (passes + 2), head * (passes + 2)
    else:
        small = 2 * rank * (fed * layers * sum(a + b for a, b in maps) - unread * sum(a + b for a, b in maps[4:]))
        # nobody reads the gradient of the embeddings, which the first layer's query, key and value would give
        below = 2 * fed * sum(a * b + rank * a for a, b in maps[:3])
        linear, above = forward * (passes + 1) - below + 3 * small, head * (passes + 1)
    return {"linear": linear, "attention": attention * (passes + 2), "head": above}


def work_of(batch: Sequence[Any], config: Any, shape: dict[str, int], rank: int | None = None) -> dict[str, float]:
    """The minimal FLOPs of a step on this batch of examples."""
    import engine

    from trimtab.logprobs.layout import opening

    rows = [(len(e.prompt), [len(c) for c in e.completions]) for e in batch]
    # KTO's mismatched completions: another row's of the same batch
    beside = [len(e.completions[0]) for e in engine.asked_of_reference(batch, config)[len(batch) :]]
    return minimal_flops(shape, rows, rank=rank, beside=beside, opening=opening(batch))


# --- telling ----------------------------------------------------------------------------------------------------------


def seconds(run: dict[str, Any]) -> float:
    return run["counted_s"] / run["steps"]  # type: ignore[no-any-return]


def share(run: dict[str, Any], rate: str) -> float:
    """Minimal seconds at that rate over the seconds taken."""
    flops = sum(run["flops"].values()) / run["steps"]
    best = flops / run["rates"]["square"] if rate == "square" else sum(run["floor_s"].values()) / run["steps"]
    return best / seconds(run)


def tables(found: dict[str, Any]) -> str:
    """Markdown: shares, then the profile in shares of a step."""
    good = [r for r in found["runs"] if "failed" not in r]
    case = lambda r: (r["finetune"], r["precision"], r["batch_size"], r["threads"])  # noqa: E731
    one, two = [], []
    for which in sorted(set(map(case, good)), key=lambda c: (c[0], c[1] != "float32", c[3], c[2])):
        mine = [r for r in good if case(r) == which]
        name = "{}, {}, batch {}, {} thread(s)".format(*which)
        gflops = [r["rates"]["square"] / 1e9 for r in mine]
        cells = [
            spread([sum(r["flops"].values()) / r["steps"] / 1e12 for r in mine], 2),
            spread([seconds(r) for r in mine], 2),
            spread(gflops, 0),
            spread([sum(r["flops"].values()) / sum(r["floor_s"].values()) / 1e9 for r in mine], 0),
            spread([100 * share(r, "square") for r in mine], 0),
            spread([100 * share(r, "shapes") for r in mine], 0),
        ]
        one.append([name, *cells])
        part = {g: median(100 * r["profile"][g] / r["profiled_s"] for r in mine) for g in GROUPS}
        two.append([name, *(f"{part[g]:.0f}" for g in GROUPS)])
    head = ["run", "minimal TFLOP/step", "s/step", "GFLOP/s square", "of its shapes", "% of square", "% of shapes"]
    return "\n".join(
        [markdown(head, one), "", "Self CPU time of a training step, %:", ""]
        + [markdown(["run", *GROUPS], two), "", harness.where(found)]
    )


# --- a child: one setting, one repetition -----------------------------------------------------------------------------


def child(job: dict[str, Any]) -> dict[str, Any]:
    import engine
    import torch

    pickled = Path(job["scratch"]) / "pairs.pickle"
    if job["do"] == "prepare":
        pickled.write_bytes(pickle.dumps(engine.hh_examples(engine.run_config())))
        return {}
    pairs, size, steps = pickle.loads(pickled.read_bytes()), job["batch_size"], job["steps"]
    random.Random(job["seed"]).shuffle(pairs)
    per = (steps + 1) * size
    examples = pairs[job["repetition"] * per : (job["repetition"] + 1) * per]
    if job["method"] == "kto":
        examples = engine.thumbs(examples, job["seed"])
    lora = job["finetune"] == "lora"
    config = engine.run_config(
        size,
        job["seed"],
        method=job["method"],
        precision=job["precision"],
        finetune=job["finetune"],
        reference="adapter" if lora else "cache",
    )
    model = engine.model_named(job["model"])
    shape, dtype = shape_of(model.config), getattr(torch, job["precision"])
    timed = examples[size:]
    rows = [(len(e.prompt), [len(c) for c in e.completions]) for e in timed]
    flops = Counter[str]()
    for start in range(0, len(timed), size):
        flops.update(work_of(timed[start : start + size], config, shape, config.lora_rank if lora else None))
    before = rates(shape, rows, size, dtype)
    with tempfile.TemporaryDirectory() as folder, attention_marked():
        clock, beforehand, begun, trainer = engine.trained(config, model, examples, Path(folder))
        profile, profiled = profiled_step(trainer, examples[-size:])
    after = rates(shape, rows, size, dtype)
    best = {name: max(before[name], after[name]) for name in before}
    return {
        **engine.figures(clock, beforehand, begun),
        "tokens": sum(e.tokens for e in timed),
        "flops": flops,
        "rates": best,
        "floor_s": {part: flops[part] / best[part] for part in flops},
        "profile": profile,
        "profiled_s": profiled,
    }


def rates(shape: dict[str, int], rows: Sequence[tuple[int, Sequence[int]]], size: int, dtype: Any) -> dict[str, float]:
    """FLOP/s: ``square``, and ``linear``, ``attention``, ``head`` at the sizes of a step (forward and both backward
    products, harmonic means by their FLOPs)."""
    import torch

    from trimtab.logprobs.products import times

    def speed(flops: float, product: Callable[[], Any]) -> float:
        """The best of the calls of a quarter of a second, and of three at least."""
        product()
        taken: list[float] = []
        while sum(taken) < 0.25 or len(taken) < 3:
            start = time.perf_counter()
            product()
            taken.append(time.perf_counter() - start)
        return flops / min(taken)

    def drawn(*sizes: int) -> Any:
        return torch.randn(*sizes).to(dtype)

    def three(tokens: int, a: int, b: int) -> tuple[float, float]:
        """FLOPs and seconds of y = x w', of the gradient of x and of that of w."""
        x, w, y = drawn(tokens, a), drawn(b, a), drawn(tokens, b)
        flops = 2.0 * tokens * a * b
        return 3 * flops, sum(flops / quicker(flops, *both) for both in ((x, w), (y, w.T), (y.T, x.T)))

    def quicker(flops: float, a: Any, b: Any) -> float:
        """a b^T by torch, or by the engine's function."""
        return max(speed(flops, lambda: a @ b.T), speed(flops, lambda: times(a, b)))

    square = 0.0
    for n in SQUARES:
        a, b = drawn(n, n), drawn(n, n)
        square = max(square, quicker(2.0 * n**3, a, b))
    # the typical microbatch: a step's tokens, or what the token budget leaves of them
    fed = [p + sum(c - 1 for c in cs) for p, cs in rows]
    tokens = min(size * sum(fed) // len(fed), 2048)
    scored = max(1, tokens * sum(sum(cs) for _, cs in rows) // sum(fed))
    layer = [three(tokens, a, b) for a, b in products(shape)]
    # the engine's own blocks of the vocabulary
    from trimtab.logprobs.chunk import ROWS_FLOAT32, VOCAB_BFLOAT16

    low = dtype == torch.bfloat16
    head = three(
        scored if low else min(scored, ROWS_FLOAT32), shape["hidden"], VOCAB_BFLOAT16 if low else shape["vocab"]
    )
    group = sum(fed) // len(fed)
    q, k = drawn(shape["heads"], group, shape["width"]), drawn(shape["heads"], shape["width"], group)
    attention = speed(2.0 * shape["heads"] * group * group * shape["width"], lambda: q @ k)
    # dense products compute all pairs; only the causal ones are counted, so that the floor is below what they need
    return {
        "square": square,
        "linear": sum(f for f, _ in layer) / sum(s for _, s in layer),
        "attention": attention,
        "head": head[0] / head[1],
    }


# --- the profile ------------------------------------------------------------------------------------------------------

MARK = "benchmark::attention"


@contextmanager
def attention_marked() -> Iterator[None]:
    """The engine's attention function under a name that the profiler shows."""
    from torch.profiler import record_function
    from transformers import AttentionInterface

    from trimtab.logprobs import attention

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK):
            return attention.grouped_attention(*args, **kwargs)

    AttentionInterface.register(attention.NAME, marked)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, attention.grouped_attention)


def profiled_step(trainer: Any, batch: Sequence[Any]) -> tuple[dict[str, float], float]:
    """Group -> seconds, and the seconds of the step: gradient, clipping, AdamW."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    # the Trainer's own is wrapped and has ended its schedule; a fresh one of the same kind does the same work
    optimiser = torch.optim.AdamW(weights, lr=1e-9, weight_decay=0.0, fused=True)
    for timed in (False, False, False, True):  # until no memory is new
        trainer.model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU]) if timed else NoProfile() as seen:
            start = time.perf_counter()
            trainer.training_step(trainer.model, list(batch))
            with torch.profiler.record_function("benchmark::optimiser"):
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimiser.step()
            taken = time.perf_counter() - start
    found = grouped(seen.events())
    found["between operations"] = max(taken - sum(found.values()), 0.0)
    return {g: found[g] for g in GROUPS}, taken


class NoProfile:
    def __enter__(self) -> NoProfile:
        return self

    def __exit__(self, *_: Any) -> None: ...


COPIES = (
    "copy_",
    "_to_copy",
    "to",
    "clone",
    "contiguous",
    "cat",
    "index_select",
    "zero_",
    "fill_",
    "zeros",
    "zeros_like",
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")


def grouped(events: Sequence[Any]) -> Counter[str]:
    """Self CPU seconds of every operation by group."""

    def ancestors(e: Any) -> list[str]:
        names = []
        while e is not None:
            names.append(e.name)
            e = e.cpu_parent
        return names

    # forward operations that the backward pass will differentiate, by autograd's number
    attention, found = set(), Counter[str]()
    named = [(e, ancestors(e)) for e in events]
    for e, above in named:
        if MARK in above and e.sequence_nr >= 0:
            attention.add(e.sequence_nr)
    for e, above in named:
        backward = [n for n in above if n.startswith("autograd::engine::evaluate_function")]
        number = e.sequence_nr
        node = e
        while node is not None and not node.name.startswith("autograd::engine::evaluate_function"):
            node = node.cpu_parent
        if node is not None:
            number = node.sequence_nr
        found[group_of(e.name, above, bool(backward), number in attention)] += e.self_cpu_time_total / 1e6
    return found


def group_of(name: str, above: Sequence[str], backward: bool, of_attention: bool) -> str:
    short = name.removeprefix("aten::")
    way = "backward" if backward else "forward"
    if "benchmark::optimiser" in above:
        return "optimiser and clipping"
    if any(n.startswith("_TokenLogps") for n in above):
        return f"head {way}"
    if MARK in above or (backward and of_attention):
        return f"attention {way}"
    if any("AccumulateGrad" in n for n in above):
        return "gradient accumulation"
    if short in COPIES:
        return "copies and casts"
    if short in PRODUCTS or short.startswith("mkldnn"):
        return f"linear {way}"
    return "elementwise" if name.startswith("aten::") else "other operations"


if __name__ == "__main__":
    main()
