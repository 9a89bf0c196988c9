"""DPO on a GPU: trimtab against TRL 1.16 with its best settings, random weights in the shapes of 0.5, 1.5 and 8 B models.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes 0.5b --repetitions 1
    python benchmarks/gpu.py --shapes tiny --batch-size 2 --repetitions 1 --steps 1 --output FILE     # does it run? CPU will do
    python benchmarks/gpu.py --write-lengths FILE       # where the HH pairs are; --lengths FILE where they are not
    python benchmarks/gpu.py --table FILE

Rows have the lengths of HH pairs of at most 512 tokens, and random tokens. Each measurement is a process of its own: a warm-up
step, then the timed ones; settings interleaved, rows of a repetition the same for all of them. Counted: the optimiser steps and
the reference, wherever it is computed. 0.5b and 1.5b learn in full (float32 weights under bfloat16 autocast, or bfloat16 weights
with float32 masters), 8b through LoRA of rank 16 on bfloat16 weights with the adapter switched off as reference.

MFU: minimal FLOPs (``roofline.minimal_flops``: each prompt once, the reference's pass counted) over seconds and the best rate of
square bfloat16 products measured in the same process. TRL's padding_free is not among its settings: 1.16 disables it.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import Results, markdown, spread

QWEN = {"family": "Qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {**QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "8b": {
        "family": "Llama", "vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False,
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "tiny": {
        **QWEN, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
}  # fmt: skip
TRL = {"side": "trl", "bf16": True, "gradient_checkpointing": False, "use_liger_kernel": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "trl default": {**TRL, "gradient_checkpointing": True},
    "trl": TRL,
    "trl, liger": {**TRL, "use_liger_kernel": True},
    "trl, precomputed": {**TRL, "precompute_ref_log_probs": True},
    "trl, liger, precomputed": {**TRL, "use_liger_kernel": True, "precompute_ref_log_probs": True},
    "trimtab": {"side": "trimtab", "weights": "float32"},
    "trimtab, bfloat16 weights": {"side": "trimtab", "weights": "bfloat16"},
    "trimtab, bfloat16 weights, flex": {"side": "trimtab", "weights": "bfloat16", "flex": True},
}
LORA = ("8b",)


def main() -> None:
    ask = harness.arguments(__doc__, repetitions=3)
    ask.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b", "8b"])
    ask.add_argument("--batch-size", type=int, default=16, help="pairs of a step")
    ask.add_argument("--at-once", type=int, default=16, help="pairs in one forward pass of TRL")
    ask.add_argument("--token-budget", type=int, default=16_384, help="tokens in one forward pass of trimtab")
    ask.add_argument("--steps", type=int, default=5, help="timed steps of a measurement")
    ask.add_argument("--lengths", type=Path, help="JSON: [prompt, chosen, rejected] tokens of every pair")
    ask.add_argument("--write-lengths", type=Path, metavar="FILE")
    asked = ask.parse_args()
    if asked.child:
        return harness.answer(asked.child, child)
    if asked.table:
        return print(tables(json.loads(asked.table.read_text())))
    lengths = (
        json.loads(asked.lengths.read_text()) if asked.lengths else harness.run_child({"do": "lengths"})["lengths"]
    )
    if asked.write_lengths:
        asked.write_lengths.write_text(json.dumps(lengths))
        return print(f"written: {asked.write_lengths} ({len(lengths)} pairs)")
    common = {
        "batch_size": asked.batch_size,
        "at_once": asked.at_once,
        "budget": asked.token_budget,
        "steps": asked.steps,
    }
    device = harness.run_child({"do": "device"})
    liger = device["name"] != "CPU" and find_spec("liger_kernel") is not None
    results = Results(
        asked.output or harness.RESULTS / "gpu.json",
        {"seed": asked.seed, **common},
        ("trl",),
        device=device,
        liger=liger,
    )
    scratch = Path(tempfile.mkdtemp(prefix="gpu-"))
    (scratch / "lengths.json").write_text(json.dumps(lengths))
    try:
        for shape in asked.shapes:
            names = [n for n, s in SETTINGS.items() if shape not in LORA or s.get("weights") != "float32"]
            names = [n for n in names if liger or not SETTINGS[n].get("use_liger_kernel")]
            names = [n for n in names if device["name"] != "CPU" or not SETTINGS[n].get("flex")]
            jobs = harness.interleaved([{"shape": shape, "setting": name} for name in names], asked)
            more = {"do": "run", "scratch": str(scratch), **common}
            results.measure([(key, {**job, **more}) for key, job in jobs], lambda r: f"{rate(r):,.0f} tokens/s")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    harness.finish(results, tables)
    return None


def rate(run: dict[str, Any]) -> float:
    return run["tokens"] / run["counted_s"]  # type: ignore[no-any-return]


def tables(found: dict[str, Any]) -> str:
    """Markdown: a line per shape and setting, with its speed against the same repetition of trimtab's."""
    rows = []
    for shape in SHAPES:
        every = [r for r in found["runs"] if r["shape"] == shape]
        good = [r for r in every if "failed" not in r]
        best = {r["repetition"]: r for r in good if r["setting"] == "trimtab, bfloat16 weights"}
        for name in SETTINGS:
            mine = [r for r in good if r["setting"] == name]
            failed = {r["failed"] for r in every if r["setting"] == name and "failed" in r}
            if failed:
                rows.append([shape, name, ", ".join(sorted(failed)), "", "", ""])
            if not mine:
                continue
            ratios = [rate(best[r["repetition"]]) / rate(r) for r in mine if r["repetition"] in best]
            mfu = [100 * r["flops"] / r["square"] / r["counted_s"] for r in mine]
            rows.append([
                shape, name, spread([rate(r) for r in mine], 0), spread(mfu, 0), spread([r["peak_gb"] for r in mine], 1),
                spread(ratios, 2),
            ])  # fmt: skip
    head = ["shape", "setting", "tokens/s", "MFU, %", "peak GB", "trimtab (bfloat16 weights) is faster by"]
    speeds = [r["square"] for r in found["runs"] if "square" in r]
    told = (
        [f"{found['device']['name']}, {median(speeds) / 1e12:.3g} TFLOP/s in square bfloat16 products."]
        if speeds
        else []
    )
    if not found["liger"]:
        told.append(
            "TRL's settings with liger are left out: they need a GPU and the package liger_kernel. On a CPU flex is, too."
        )
    return "\n".join([markdown(head, rows), "", *told, harness.where(found)])


# --- a child: one setting, one repetition -----------------------------------------------------------------------------


def child(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    if job["do"] == "device":
        return {"name": torch.cuda.get_device_name() if cuda else "CPU"}
    import engine

    if job["do"] == "lengths":
        rows = engine.hh_examples(engine.run_config())
        return {"lengths": [[len(e.prompt), *map(len, e.completions)] for e in rows]}
    from roofline import minimal_flops, shape_of

    shape, setting, size = SHAPES[job["shape"]], SETTINGS[job["setting"]], job["batch_size"]
    lengths = json.loads((Path(job["scratch"]) / "lengths.json").read_text())
    random.Random(job["seed"]).shuffle(lengths)
    per = (job["steps"] + 1) * size
    mine = lengths[job["repetition"] * per :][:per]
    examples = [pair(row, shape["vocab_size"], f"{job['seed']} {k}") for k, row in enumerate(mine)]
    lora = job["shape"] in LORA
    held = "bfloat16" if lora else setting.get("weights", "float32")
    model = made(shape, getattr(torch, held), job["seed"])
    flops = minimal_flops(shape_of(model.config), [(p, c) for p, *c in mine[size:]], rank=16 if lora else None)
    folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
    clock, beforehand, begun = (run_trl if setting["side"] == "trl" else run_trimtab)(
        job, setting, held, lora, model, examples, folder
    )
    return {
        **engine.figures(clock, beforehand, begun),
        "tokens": sum(e.tokens for e in examples[size:]),
        "flops": sum(flops.values()),
        "square": square(torch.device("cuda" if cuda else "cpu")),
    }


def pair(lengths: list[int], vocab: int, seed: str) -> Any:
    from trimtab.feedback.records import Comparison, Message
    from trimtab.tokens.batch import Example

    draw = random.Random(seed)
    prompt, *answers = (tuple(draw.randrange(3, vocab) for _ in range(n)) for n in lengths)
    return Example(prompt, tuple(answers), Comparison((Message("user", seed),), "a", "b"))


def made(shape: dict[str, Any], dtype: Any, seed: int) -> Any:
    """A model of that shape with random weights, on the GPU where there is one."""
    import torch
    import transformers

    sizes = {k: v for k, v in shape.items() if k != "family"}
    config = getattr(transformers, f"{shape['family']}Config")(**sizes, max_position_embeddings=4096)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def square(device: Any) -> float:
    """FLOP/s of the best of ten products of large square matrices in bfloat16."""
    import time

    import torch

    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
    return best


def run_trimtab(
    job: dict[str, Any], setting: dict[str, Any], held: str, lora: bool, model: Any, examples: list[Any], folder: Path
) -> Any:
    import engine

    from trimtab.logprobs import attention

    attention.FLEX = setting.get("flex", False)
    config = engine.run_config(
        job["batch_size"], job["seed"], precision="bfloat16", weights=held, token_budget=job["budget"],
        finetune="lora" if lora else "full", reference="adapter" if lora else "cache",
    )  # fmt: skip
    clock, beforehand, begun, _ = engine.trained(config, model, examples, folder)
    return clock, beforehand, begun


def run_trl(
    job: dict[str, Any], setting: dict[str, Any], held: str, lora: bool, model: Any, examples: list[Any], folder: Path
) -> Any:
    import torch
    from against_trl import trained

    more: dict[str, Any] = {k: v for k, v in setting.items() if k != "side"}
    if lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    elif not setting.get("precompute_ref_log_probs"):
        more["ref_model"] = copy.deepcopy(model)  # TRL would load it by the model's name, and it has none
    return trained(
        model, examples, folder, batch_size=job["batch_size"], at_once=job["at_once"], seed=job["seed"],
        use_cpu=not torch.cuda.is_available(), processing_class=no_tokenizer(), **more,
    )  # fmt: skip


def no_tokenizer() -> Any:
    """What TRL asks for a padding token; the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


if __name__ == "__main__":
    main()
