"""A whole RLOO step (sample, judge, learn) against TRL's RLOOTrainer: the same prompts, reward and sizes, interleaved.

    pip install -e .[bench]
    python benchmarks/rloo_vs_trl.py                                     # 4 prompts x 4 answers x 64 tokens, 5 repetitions
    python benchmarks/rloo_vs_trl.py --repetitions 2 --steps 2 --answers 8

Both fine-tune all of SmolLM2 with bfloat16 in the forward pass, float32 master weights, AdamW, a frozen copy as reference and
beta 0.05. Settings of TRL: its default (which samples in float32 weights under autocast), and with `generate` in bfloat16 weights
(`model.to(bfloat16)`, so that its optimiser state is bfloat16, too: less than what ours computes). The first step of each
repetition warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from engine import StepClock, Time, frozen_reference, stopwatch
from harness import spread

import trimtab
from trimtab.config import resolve
from trimtab.demo.feedback import FEEDBACK, training_prompts
from trimtab.demo.reward import reward
from trimtab.judges.named import named_judge
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import load_model, load_tokenizer
from trimtab.objectives import objective_class
from trimtab.online import rounds as online
from trimtab.prepare import make_template, prepare_prompts
from trimtab.run import no_dropout, plan, shortest, training_arguments, with_answers
from trimtab.update.trainer import Update

MODEL = "smollm2"


def ours(given: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Rounds of one step, as `trimtab train` makes them."""
    config = resolve(
        {
            "data": str(FEEDBACK), "method": "rloo", "model": MODEL, "judge": "rule:trimtab.demo.run:scored",
            "finetune": "full", "precision": "bfloat16", "rounds": given.steps + 1, "prompts_per_round": given.prompts,
            "answers": given.answers, "batch_size": given.prompts, "sample_tokens": given.tokens, "learning_rate": 1e-6,
            "seed": seed, "warmup": 0,
        }
    )  # fmt: skip
    template = make_template(config)
    data = prepare_prompts(config, config.objective(), template)
    model = load_model(MODEL)
    no_dropout(model)
    choice = choose_layout(model, shortest(with_answers(data.train)), config.layout)
    install(model, torch.bfloat16, choice.mode)
    scorer = Scorer(model, choice.mode, config.token_budget)
    assert config.judge is not None
    made = online.Rounds(
        data.train, plan(config), named_judge(config.judge), template, folder / "rounds", torch.bfloat16
    )
    clock, sampling, tokens = StepClock(), list[Time](), list[int]()
    draw = stopwatch(made._sampled, sampling)

    def counted(*args: Any) -> Any:
        found = draw(*args)
        tokens.append(sum(len(a.ids) for d in found for a in d.answers))
        return found

    made._sampled = counted  # type: ignore[method-assign]
    arguments = training_arguments(config, folder, True)
    trainer = Update(
        model, objective_class("rloo")(), scorer, None, (), config.batch_size, arguments, rounds=made, callbacks=[clock]
    )
    trainer.reference = frozen_reference(trainer, torch.bfloat16)
    trainer.train()
    return measured(clock, sampling, tokens)


def theirs(given: argparse.Namespace, seed: int, folder: Path, weights: torch.dtype) -> dict[str, Any]:
    """RLOOTrainer with one generation per step."""
    from datasets import Dataset, disable_progress_bars
    from transformers.trainer_callback import PrinterCallback
    from trl import RLOOConfig, RLOOTrainer

    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"

    def scored(completions: list[Any], **_: Any) -> list[float]:
        return [reward(c[0]["content"]) for c in completions]

    args = RLOOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=given.prompts * given.answers,
        num_generations=given.answers,
        max_completion_length=given.tokens,
        max_steps=given.steps + 1,
        beta=0.05,
        seed=seed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in training_prompts()]
    clock = StepClock()
    trainer = RLOOTrainer(
        model=load_model(MODEL).to(weights),
        reward_funcs=scored,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(MODEL),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    sampling, tokens = list[Time](), list[int]()
    draw = stopwatch(trainer._generate_single_turn, sampling)

    def counted(*args: Any, **more: Any) -> Any:
        found = draw(*args, **more)
        ids = found[0] if isinstance(found, tuple) else found
        tokens.append(sum(map(len, ids)))
        return found

    trainer._generate_single_turn = counted
    trainer.train()
    return measured(clock, sampling, tokens)


def measured(clock: StepClock, sampling: list[Time], tokens: list[int]) -> dict[str, Any]:
    """Without the first step."""
    steps = len(clock.ends) - 1
    wall, written = clock.after_warm_up.wall, sum(tokens[1:])
    drawing = sum(t.wall for t in sampling[1:])
    return {
        "seconds per step": wall / steps,
        "sampled tokens per second": written / drawing,
        "share of sampling": drawing / wall,
        "tokens per step": written / steps,
        "seconds per 1,000 sampled tokens": 1000 * wall / written,
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ["side", "s per step", "s per 1,000 sampled tokens", "sampled tokens/s", "tokens per step"]
    head.append("trimtab is faster by (step, per token, sampling)")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    own = found["trimtab"]
    for name, rows in found.items():
        cells = [spread([r[k] for r in rows], d) for k, d in COLUMNS]
        ratios = [
            spread([a[k] / b[k] if up else b[k] / a[k] for a, b in zip(own, rows, strict=True)], 2)
            for k, up in (
                ("seconds per step", False),
                ("seconds per 1,000 sampled tokens", False),
                ("sampled tokens per second", True),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(ratios)} |")
    return "\n".join(lines)


COLUMNS = (
    ("seconds per step", 2),
    ("seconds per 1,000 sampled tokens", 2),
    ("sampled tokens per second", 0),
    ("tokens per step", 0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="measured in each repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sides = {
        "trimtab": ours,
        "TRL, default": lambda *a: theirs(*a, torch.float32),
        "TRL, bfloat16 weights": lambda *a: theirs(*a, torch.bfloat16),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repetition in range(given.repetitions):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(side(given, repetition, Path(folder)))
            print(repetition, name, {k: round(v, 2) for k, v in found[name][-1].items()}, flush=True)
    import trl

    card = {
        "command": "python benchmarks/rloo_vs_trl.py " + " ".join(f"--{k} {v}" for k, v in vars(given).items()),
        "versions": {m.__name__: m.__version__ for m in (trimtab, torch, transformers, trl)},
        "found": found,
    }
    out = Path(__file__).parent / "results" / f"rloo_vs_trl-{given.answers}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(card, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
