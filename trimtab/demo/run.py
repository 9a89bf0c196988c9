"""The demo: align a real model on the shipped feedback, and measure the true reward on prompts it never saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab import run
from trimtab.config import resolve
from trimtab.demo.feedback import FEEDBACK, held_out_prompts
from trimtab.demo.reward import reward
from trimtab.objectives import objective_class
from trimtab.report import Interval, mean_interval, paired_gain, write_report

JUDGE = "rule:trimtab.demo.run:scored"


def demo_data(method: str, online: bool = False) -> dict[str, Any]:
    """Options that turn the shipped scores into the feedback that a method learns from; ``online``: into prompts."""
    kind = objective_class(method).feedback.record.__name__.lower()
    options: dict[str, Any] = {"data": str(FEEDBACK)}
    match "prompt" if online else kind:
        case "prompt":
            options |= {"judge": JUDGE}
        case "comparison":
            options |= {"convert": "comparison", "pairs": "best-worst", "tie_threshold": 0.1}
            if not objective_class(method).ties:
                options["ties"] = "drop"
        case "thumb":
            options |= {"convert": "thumb", "score_threshold": -0.2}
        case "demonstration" | "ranking":
            options |= {"convert": kind}
    return options


def run_demo(seeds: int, output: Path, flags: dict[str, Any], command: str, console: Console) -> Path:
    """One run per seed, a report each, and one over all. Returns the demo's folder."""
    output = _free(output)
    method = str(flags.get("method", "dpo"))
    data = {} if "data" in flags else demo_data(method, "judge" in flags)
    values = {"method": method, "learning_rate": 4e-4, "batch_size": 16, "holdout": 0.05, "sample_tokens": 80, **data}
    known = "data" not in flags
    rows = []
    for seed in range(seeds):
        folder = output if seeds == 1 else output / f"seed-{seed}"
        config = resolve({**values, **flags, "seed": seed, "output": str(folder)})
        console.print(f"seed {seed}")
        run.train(
            config,
            command=command,
            console=console,
            reward=scored if known else None,
            test_prompts=held_out_prompts() if known else (),
        )
        rows.append((seed, folder, json.loads((folder / "run.json").read_text())["samples"]))
    if known:
        _verdict(output, rows, console)
    return output


def scored(prompt: str, answer: str) -> float:
    """the demo's true reward: sentiment and brevity (trimtab/demo/reward.py)"""
    return reward(answer)


def _verdict(output: Path, rows: Sequence[tuple[int, Path, dict[str, Any]]], console: Console) -> None:
    keys = ("reward_before", "reward_after", "reward_gain", "kl", "length_before", "length_after")
    for seed, _, found in rows:
        shown = "  ".join(f"{k.replace('_', ' ')} {Interval.from_json(found[k])}" for k in keys)
        console.print(f"seed {seed}: {shown}", markup=False, soft_wrap=True)
    if len(rows) == 1:
        return
    samples = [[json.loads(line) for line in (f / "samples.jsonl").read_text().splitlines()] for _, f, _ in rows]
    flat = [s for run_samples in samples for s in run_samples]
    # answers to one prompt are not independent, whatever the seed: prompts are what was drawn
    gain = paired_gain(
        [s["reward_before"] for s in flat],
        [s["reward_after"] for s in flat],
        clusters=[s["prompt"] for s in flat],
    )
    by_seed = mean_interval([found["reward_gain"]["value"] for _, _, found in rows])
    mean = lambda k: mean_interval([found[k]["value"] for _, _, found in rows]).to_json()  # noqa: E731
    seeds = [{"seed": seed, **{k: found[k] for k in keys}} for seed, _, found in rows]
    card = {"seeds": seeds, "gain": gain.to_json(), "gain_over_seeds": by_seed.to_json(), "kl": mean("kl")}
    card |= {"length": mean("length_after"), "run": rows[0][1].name}
    (output / "demo.json").write_text(json.dumps(card, indent=1))
    console.print(f"true reward gain over {len(rows)} seeds, by prompt: {gain}; by seed: {by_seed}", markup=False)
    console.print(f"report: {write_report(output)}", soft_wrap=True)


def _free(folder: Path) -> Path:
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
