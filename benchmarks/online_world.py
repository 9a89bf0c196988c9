"""Three promises of online learning in the controlled world, where the true utility of every answer is known.

    python benchmarks/online_world.py                       # all of them, five seeds, two processes
    python benchmarks/online_world.py --study position --seeds 2
    python benchmarks/online_world.py --table               # of what is there, without running

overoptimised   Two reward models learn from two halves of the same pairs; RLOO without a KL penalty maximises the first, and
                `test_judge` watches with the second. Does the true utility fall while the first still rises, and do train and
                test judge part before it has fallen (Bai et al., arXiv:2204.05862, section 4.2)? Once with few pairs (weak),
                once with ten times as many.
position        A judge of pairs that adds a bonus to the answer it is shown first. What is learned by DPO from its labels, asked
                in one order and in both?
self-rewarding  DPO on a few labelled pairs; then the model's own implicit reward judges its next answers, again and again,
                without further labels (arXiv:2406.09760). How long does the true utility rise, and does the judge's agreement
                with labels (of the start model's held-out answers, and of its own) say when to stop?

Each seed has its own prompts, answers, labels and held-out prompts; intervals are Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import trimtab
from trimtab.compare.runner import quiet
from trimtab.compare.trial import Budget, Trial, encode, evaluate, fit, start
from trimtab.config import resolve
from trimtab.feedback.records import Comparison, Conversation, Message, Prompt, Record
from trimtab.judges import records as judged_as
from trimtab.judges.base import Preference, Question, Verdicts
from trimtab.judges.language import LanguageJudge
from trimtab.judges.model import load_judge
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.score import Scorer, install
from trimtab.models import load_model
from trimtab.objectives import objective_class
from trimtab.online.watch import BOTH, FILE, Seen, divergence, looks
from trimtab.report.stats import mean_interval as interval
from trimtab.report.stats import paired_gain
from trimtab.run import train
from trimtab.world import model as world_model
from trimtab.world.asked import AskedJudge
from trimtab.world.judge import Judge
from trimtab.world.utility import utility

RESULTS = Path(__file__).parent / "results" / "online_world.json"
JUDGE = Judge()
COMMON = {
    "model": str(world_model.FOLDER),
    "finetune": "full",
    "precision": "float32",
    "threads": 1,
    "schedule": "linear",
}
HELD_OUT = 128
MODE: Mode = "shared"


def write(file: Path, records: Iterable[Record]) -> str:
    file.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    return str(file)


def asking(prompts: Sequence[str]) -> list[Prompt]:
    return [Prompt((Message("user", p),)) for p in prompts]


# --- over-optimisation --------------------------------------------------------------------------------------------------

ROUNDS, LOOK = 48, 4


def overoptimised(seed: int, folder: Path, prompts: int, epochs: int, rate: float) -> dict[str, Any]:
    """After every look: means over the same held-out prompts of the train judge, the test judge, and the truth.

    ``prompts``: with two labelled pairs each, that either reward model learns from.
    """
    drawn = world_model.pool(seed, max(256, 2 * prompts), 4, HELD_OUT, 3)
    halves = drawn.train[:prompts], drawn.train[prompts : 2 * prompts]
    judges = []
    for name, half in zip(("train", "test"), halves, strict=True):
        data = write(folder / f"{name}.jsonl", JUDGE.pairs(half, seed))
        how = {
            **COMMON,
            "data": data,
            "method": "reward_model",
            "epochs": epochs,
            "batch_size": 16,
            "learning_rate": rate,
        }
        judges.append(train(resolve({**how, "seed": seed, "holdout": 0, "samples": 0, "output": str(folder / name)})))
    held_out = [p for p, _ in drawn.held_out]
    options = {
        **COMMON,
        "data": write(folder / "prompts.jsonl", asking([p for p, _ in drawn.train])),
        "method": "rloo",
        "beta": 0.0,
        "judge": f"model:{judges[0]}",
        "test_judge": f"model:{judges[1]}",
        "watch_every": LOOK,
        "samples": HELD_OUT,
        "rounds": ROUNDS,
        "prompts_per_round": 16,
        "answers": 4,
        "batch_size": 16,
        "sample_tokens": world_model.MAX_NEW_TOKENS,
        "learning_rate": 1e-3,
        "seed": seed,
        "output": str(folder / "policy"),
    }
    rounds = train(resolve(options), test_prompts=held_out) / "rounds"
    seen, truth = looks(rounds), dict[int, tuple[float, ...]]()
    for file in (*rounds.glob(f"*/{FILE}"), rounds / FILE):
        told = json.loads(file.read_text())
        texts = [world_model.text(ids) for ids in told["answers"]]
        truth[told["after"]] = tuple(utility(p, t) for p, t in zip(held_out, texts, strict=True))
    true = [Seen(s.after, s.train, truth[s.after], s.kl) for s in seen]
    rows = [
        {"after": s.after, **{n: s.mean(n).value for n in BOTH}, "truth": t.mean("test").value, "kl": s.kl}
        for s, t in zip(seen, true, strict=True)
    ]
    return {"looks": rows, "part": divergence(seen), "truth_falls": divergence(true)}


# --- position bias ------------------------------------------------------------------------------------------------------

BONUS = 2.0  # added to what the judge feels for the answer that it is shown first; answers differ by about 1.5
PIECE = re.compile(r"^=== [0-9a-f]{16} (USER|ANSWER A|ANSWER B) ===\n(.*?)\n=== [0-9a-f]{16} END ===$", re.S | re.M)


@dataclass
class Biased:
    """A language model that judges as the world does, and favours what it reads first (a backend of the toolkit's judge)."""

    seed: int
    bonus: float
    temperature: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)
    control: Sequence[str] = ()

    @property
    def identity(self) -> str:
        return f"biased {self.seed} {self.bonus}"

    def write(self, *_: Any) -> Any:
        raise NotImplementedError

    def weigh(self, asked: Sequence[Conversation], options: Sequence[str]) -> list[Any]:
        felt = AskedJudge(JUDGE, self.seed)
        found = []
        for conversation in asked:
            said = dict(PIECE.findall(conversation[-1].content))
            a, b = (felt.felt(said["USER"], said[name]) for name in ("ANSWER A", "ANSWER B"))
            first = 1 / (1 + math.exp(b - a - self.bonus))
            found.append({"A": first, "B": 1 - first, "C": 0.0})
        return found


def position(seed: int, folder: Path) -> dict[str, Any]:
    """The same answers, labelled by a judge without bias, a biased one asked once, and one asked in both orders."""
    trial = Trial("plain", JUDGE, "dpo", 3e-4, seed, budget=Budget(steps=32))
    drawn = world_model.pool(seed, 256, 4, HELD_OUT, 3)
    questions = [
        Question((Message("user", p),), (row[i], row[i + 1]))
        for p, row in drawn.train
        for i in (0, 2)
        if row[i] != row[i + 1]
    ]
    found: dict[str, Any] = {}
    for name, bonus, both in (
        ("no bias, one order", 0.0, False),
        ("bias, one order", BONUS, False),
        ("bias, both orders", BONUS, True),
    ):
        verdicts = LanguageJudge(Biased(seed, bonus)).judge(questions)
        if not both:
            alone = [Preference(j.orders[0]) for j in verdicts.judgements if isinstance(j, Preference) and j.orders]
            verdicts = Verdicts(verdicts.questions, tuple(alone))
        pairs = judged_as.comparisons(verdicts)[0]
        firsts = {(q.completions[0], q.prompt) for q in questions}
        true = [utility(p.prompt[0].content, p.chosen) - utility(p.prompt[0].content, p.rejected) for p in pairs]
        objective, model = objective_class("dpo")(), world_model.load_start()
        policy = fit(model, objective, encode(pairs), trial)
        after = evaluate(policy, start().scorer, drawn, trial, ())["prompts"]
        found[name] = {
            "first place": float(np.mean([(p.chosen, p.prompt) in firsts for p in pairs])),
            "label right": float(np.mean([g > 0 for g in true if g])),
            "gain": float(np.mean(after["utility"]) - np.mean(after["utility_start"])),
            "reported bias": verdicts.position.get("bias"),
        }
    return found


# --- self-rewarding -----------------------------------------------------------------------------------------------------

LABELLED, TURN, TURNS = (
    256,
    128,
    5,
)  # prompts with two labelled pairs each; prompts of a turn without labels; such turns


def self_rewarding(seed: int, folder: Path) -> dict[str, Any]:
    """M1 from labelled pairs, then M2, M3, ... from what the model before says of its own answers."""
    drawn = world_model.pool(seed, LABELLED + TURNS * TURN, 4, HELD_OUT, 4)
    trial = Trial("plain", JUDGE, "dpo", 1e-4, seed, budget=Budget(prompts=len(drawn.train), held_out_answers=4))
    labelled, fresh = drawn.train[:LABELLED], [p for p, _ in drawn.train[LABELLED:]]
    held_out = JUDGE.pairs(drawn.held_out, seed)
    how = {**COMMON, "method": "dpo", "batch_size": 16, "learning_rate": 1e-4, "seed": seed, "samples": 0}
    data = write(folder / "labelled.jsonl", JUDGE.pairs(labelled, seed))
    current = train(resolve({**how, "data": data, "epochs": 3, "holdout": 0, "output": str(folder / "M1")}))
    turns = [state(1, current, trial, held_out, drawn)]
    for turn in range(2, 2 + TURNS):
        part = fresh[(turn - 2) * TURN :][:TURN]
        options = {
            **how,
            "data": write(folder / f"prompts-{turn}.jsonl", asking(part)),
            "holdout": 0,
            "model": str(current),
            "judge": f"model:{current},{world_model.FOLDER}",
            "rounds": 1,
            "prompts_per_round": len(part),
            "answers": 4,
            "passes": 2,
            "sample_tokens": world_model.MAX_NEW_TOKENS,
            "output": str(folder / f"M{turn}"),
        }
        current = train(resolve(options))
        turns.append(state(turn, current, trial, held_out, drawn))
    return {"turns": turns}


def state(
    turn: int, folder: Path, trial: Trial, held_out: Sequence[Comparison], drawn: world_model.Pool
) -> dict[str, Any]:
    """What M_turn is worth, and how often its implicit reward agrees with held-out labels."""
    model = load_model(str(folder), dtype=torch.float32)
    install(model, torch.float32, MODE)
    after = evaluate(Scorer(model, MODE, 8192), start().scorer, drawn, trial, ())["prompts"]
    judge = load_judge(str(folder), str(world_model.FOLDER))
    asked = [p for p, _ in drawn.held_out]
    ids = world_model.answers(model, [world_model.prompt_ids(p) for p in asked], 4, trial.seed + 2_000_000)
    own = JUDGE.pairs([(p, [world_model.text(a) for a in row]) for p, row in zip(asked, ids, strict=True)], trial.seed)
    return {
        "model": f"M{turn}",
        "gain": float(np.mean(after["utility"]) - np.mean(after["utility_start"])),
        "kl": float(np.mean(after["kl"])),
        "words": float(np.mean(after["words"])),
        "agreement": agreement(judge, held_out),
        "own": agreement(judge, own),
        "own_low": agreement(judge, own) - 1.96 * math.sqrt(0.25 / len(own)),
    }


def agreement(judge: Any, pairs: Sequence[Comparison]) -> float:
    """Share of labels that the judge would have given, too."""
    said = judge.judge([Question(p.prompt, (p.chosen, p.rejected)) for p in pairs]).judgements
    return float(np.mean([j.scores[0] > j.scores[1] for j in said]))


def stop(turns: Sequence[dict[str, Any]]) -> int:
    """The model to keep: the first one that agrees with labels of its own answers no better than a coin (95 % interval), since
    what it would teach the next one is noise."""
    return next((i for i, turn in enumerate(turns) if turn["own_low"] <= 0.5), len(turns) - 1)


# --- all of them --------------------------------------------------------------------------------------------------------

STUDIES: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "overoptimised, weak judges": partial(overoptimised, prompts=48, epochs=3, rate=3e-4),
    "overoptimised, better judges": partial(overoptimised, prompts=512, epochs=2, rate=1e-3),
    "position": position,
    "self-rewarding": self_rewarding,
}


def one(study: str, seed: int) -> tuple[str, int, dict[str, Any]]:
    begun = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = STUDIES[study](seed, Path(folder))
    return study, seed, {**found, "seconds": round(time.perf_counter() - begun, 1)}


def table(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for study in [s for s in found if s.startswith("overoptimised")]:
        runs = list(found[study].values())
        lines += [
            f"{study.capitalize()}:\n",
            "| after rounds | train judge | test judge | true utility | KL, nats |",
            "|---|---|---|---|---|",
        ]
        for i, look in enumerate(runs[0]["looks"]):
            cells = [interval([r["looks"][i][n] for r in runs]) for n in ("train", "test", "truth", "kl")]
            lines.append(f"| {look['after']} | " + " | ".join(map(str, cells)) + " |")
        peaks = [max(look["truth"] for look in r["looks"]) for r in runs]
        ends = [r["looks"][-1]["truth"] for r in runs]
        lines.append(f"\nTrue utility, end minus best look: {paired_gain(peaks, ends)}.")
        told = [f"{r['part']} and {r['truth_falls']}" for r in runs]
        lines.append(f"Train and test judge part, and the truth falls, after rounds: {'; '.join(told)}.\n")
    if runs := list(found.get("position", {}).values()):
        lines += ["| labels | first place chosen | label right | true utility gain |", "|---|---|---|---|"]
        names = [n for n in runs[0] if n != "seconds"]
        for name in names:
            cells = [interval([r[name][n] for r in runs]) for n in ("first place", "label right", "gain")]
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
        one_order, both = ([r[n]["gain"] for r in runs] for n in names[1:])
        lines.append(f"\nBoth orders minus one, under bias: {paired_gain(one_order, both)}.\n")
    if runs := list(found.get("self-rewarding", {}).values()):
        lines += [
            "| model | true utility gain | agrees with labels, start model's answers | its own answers | KL, nats | words |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        for i, turn in enumerate(runs[0]["turns"]):
            cells = [interval([r["turns"][i][n] for r in runs]) for n in ("gain", "agreement", "own", "kl", "words")]
            lines.append(f"| {turn['model']} | " + " | ".join(map(str, cells)) + " |")
        kept = [stop(r["turns"]) for r in runs]
        first, last = ([r["turns"][i]["gain"] for r in runs] for i in (0, -1))
        chosen = [r["turns"][k]["gain"] for r, k in zip(runs, kept, strict=True)]
        second = [r["turns"][1]["gain"] for r in runs]
        lines.append(f"\nM2 minus M1: {paired_gain(first, second)}. ")
        lines[-1] += f"Kept by the agreement on its own answers: {', '.join(f'M{k + 1}' for k in kept)}. "
        lines[-1] += (
            f"Its gain minus M1's: {paired_gain(first, chosen)}; minus the last one's: {paired_gain(last, chosen)}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, nargs="+", default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    known = json.loads(given.output.read_text()) if given.output.exists() else {"studies": {}}
    if not given.table:
        begun = time.perf_counter()
        with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"), quiet) as pool:
            todo = [pool.submit(one, s, given.first + n) for s in given.study for n in range(given.seeds)]
            for done in todo:
                study, seed, found = done.result()
                known["studies"].setdefault(study, {})[str(seed)] = found
                print(f"{study} seed {seed}: {found['seconds']} s", flush=True)
                known["versions"] = {m.__name__: m.__version__ for m in (trimtab, torch, transformers)}
                given.output.parent.mkdir(parents=True, exist_ok=True)
                given.output.write_text(
                    json.dumps(known, indent=1) + "\n"
                )  # each as it comes: hours may be lost otherwise
        print(f"{time.perf_counter() - begun:.0f} s")
    whole = {k: v for k, v in known["studies"].items() if len(v) > 1}  # no interval over one seed
    print(table(whole) if whole else json.dumps(known["studies"], indent=1))


if __name__ == "__main__":
    main()
