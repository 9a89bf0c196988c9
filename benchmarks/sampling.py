"""Tokens per second of the sampler against transformers' `generate`, on the demo's prompts, interleaved.

    python benchmarks/sampling.py                    # K = 4 and 8 answers, 64 tokens, 5 repetitions
    python benchmarks/sampling.py --tokens 32 --repetitions 3 --prompts 4

Three ways to the same number of answers, each to its own end-of-sequence or `--tokens`:
ours (the prompt read once, finished rows leave), `generate` once per answer, `generate` with num_return_sequences.
All in bfloat16 weights, sampled from the model's own distribution.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import spread

import trimtab
from trimtab.demo.feedback import training_prompts
from trimtab.feedback.records import Message
from trimtab.models import end_tokens, load_model, load_tokenizer
from trimtab.online.sample import sample, sampler, stop_ids
from trimtab.tokens.template import Template

MODEL = "smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 8])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = load_tokenizer(MODEL)
    template = Template(tokenizer, eos_ids=end_tokens(MODEL))
    prompts = [template.prompt_ids((Message("user", p),)) for p in training_prompts()[: given.prompts]]
    found: dict[str, Any] = {}
    with sampler(load_model(MODEL), torch.bfloat16) as model:
        for k in given.answers:
            found[f"K={k}"] = interleaved(ways(model, tokenizer, prompts, k, given.tokens), given.repetitions)
    card = {
        "command": f"python benchmarks/sampling.py --prompts {given.prompts} --tokens {given.tokens} "
        f"--repetitions {given.repetitions} --threads {given.threads}",
        "versions": {
            "trimtab": trimtab.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tokens_per_second": found,
    }
    out = Path(__file__).parent / "results" / "sampling.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(card, indent=1) + "\n")
    print(table(found))


def ways(model: Any, tokenizer: Any, prompts: list[list[int]], k: int, longest: int) -> dict[str, Callable[[int], int]]:
    """Name -> (repetition -> number of tokens written)."""
    ends = stop_ids(model, tokenizer)
    how = {
        "max_new_tokens": longest, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "repetition_penalty": 1.0, "eos_token_id": sorted(ends), "pad_token_id": min(ends),
    }  # fmt: skip

    def ours(seed: int) -> int:
        answers = sample(model, tokenizer, prompts, per_prompt=k, max_new_tokens=longest, seed=seed)
        return sum(len(a.ids) for row in answers for a in row)

    def one_by_one(seed: int) -> int:
        torch.manual_seed(seed)
        return sum(written(model.generate(torch.tensor([p]), **how), len(p)) for p in prompts for _ in range(k))

    def returned_together(seed: int) -> int:
        torch.manual_seed(seed)
        return sum(written(model.generate(torch.tensor([p]), num_return_sequences=k, **how), len(p)) for p in prompts)

    def written(out: torch.Tensor, start: int) -> int:
        total = 0
        for row in out[:, start:].tolist():
            total += next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
        return total

    return {"trimtab": ours, "generate per answer": one_by_one, "generate, num_return_sequences": returned_together}


def interleaved(todo: dict[str, Callable[[int], int]], repetitions: int) -> dict[str, list[float]]:
    """Name -> tokens per second of each repetition; the first, unmeasured one warms up."""
    rates: dict[str, list[float]] = {name: [] for name in todo}
    for repetition in range(repetitions + 1):
        for name, write in todo.items():
            started = time.perf_counter()
            with torch.inference_mode():
                tokens = write(repetition)
            if repetition:
                rates[name].append(tokens / (time.perf_counter() - started))
    return rates


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: medians and ranges of tokens per second, and of the paired ratios."""
    lines = ["| answers | way | tokens/s, median (range) | trimtab is faster by |", "|---|---|---|---|"]
    for k, rates in found.items():
        for name, values in rates.items():
            ratios = [a / b for a, b in zip(rates["trimtab"], values, strict=True)]
            lines.append(f"| {k} | {name} | {spread(values, 0)} | {spread(ratios, 2)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
