"""``trimtab compare``: methods against each other in a controlled world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.compare.promises import PROMISES, Arm, Promise, Verdict, judge
from trimtab.compare.results import Results
from trimtab.compare.runner import TUNING_SEEDS, best, run_all, tune
from trimtab.compare.stats import check_paired
from trimtab.compare.table import Row, legend, methods_table, promises_table
from trimtab.compare.trial import JUDGED, RUN_OPTIONS, Budget, Trial
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives import Objective, methods, objective_class
from trimtab.world.named import world

OUTPUT = Path("runs/compare")
Tell = Callable[[str], None]

BUDGET = Budget()


def compare(
    world_name: str,
    arms: Sequence[Arm],
    seeds: int,
    *,
    against: str = "dpo",
    output: Path = OUTPUT,
    workers: int = 2,
    command: str = "",
    budget: Budget = BUDGET,
    verdicts: Sequence[Verdict] = (),
    tell: Tell = print,
) -> str:
    """Tune, run and tabulate these arms in one world; with ``verdicts`` the table says what became of their promises."""
    if seeds < 2:
        raise ConfigError(f"seeds is {seeds}: an interval over seeds needs at least 2, better 5.")
    results, judged = Results(output), world(world_name)
    trials = [Trial(world_name, judged, a.method, 0.0, 0, dict(a.options), budget) for a in arms]
    tuned = tune(trials, results, command, workers, tell)
    grid = [replace(t, learning_rate=best(g), seed=s) for t, g in zip(trials, tuned, strict=True) for s in range(seeds)]
    found = run_all(grid, results, command, workers, tell)
    for seed in range(seeds):
        check_paired(found[seed::seeds])
    rows = [
        Row(a, objective_class(a.method).feedback.__name__.lower(), g, found[i * seeds : (i + 1) * seeds])
        for i, (a, g) in enumerate(zip(arms, tuned, strict=True))
    ]
    return f"{methods_table(rows, against, verdicts)}\n\n{legend(seeds, len(TUNING_SEEDS))}"


def check_promises(
    seeds: int,
    *,
    promises: Sequence[Promise] = PROMISES,
    output: Path = OUTPUT,
    workers: int = 2,
    command: str = "",
    tell: Tell = print,
) -> list[Verdict]:
    """Tune and run both arms of these promises where their methods are there, each in its world."""
    results, verdicts = Results(output), list[Verdict]()
    for promise in (p for p in promises if not _absent(p)):
        tuned = tune([promise.trial(a, 0.0, 0) for a in promise.arms], results, command, workers, tell)
        grid = [promise.trial(a, best(g), s) for a, g in zip(promise.arms, tuned, strict=True) for s in range(seeds)]
        found = run_all(grid, results, command, workers, tell)
        for seed in range(seeds):
            check_paired(found[seed::seeds])
        verdicts.append(judge(promise, found[:seeds], found[seeds:]))
    return verdicts


def told(promises: Sequence[Promise], verdicts: Sequence[Verdict]) -> str:
    """The table of promises, and which methods are not there."""
    absent = sorted({name for p in promises for name in _absent(p)})
    return promises_table(verdicts) + (f"\n\nNot there yet: {', '.join(absent)}." if absent else "")


def _absent(promise: Promise) -> set[str]:
    return {a.method for a in promise.arms} - set(methods())


def parse_arms(text: str) -> list[Arm]:
    """``dpo,cdpo:label_smoothing=0.2,kto``: methods separated by commas, options after colons; ``all`` that can be compared."""
    if text == "all":
        return [Arm(name) for name, cls in methods().items() if not _unfit(cls)]
    arms = []
    for part in text.split(","):
        method, *options = part.split(":")
        given = dict(option.partition("=")[::2] for option in options)
        if why := _unfit(objective_class(method), "rounds" in given):
            raise ConfigError(f"methods: {method} {why}.")
        arms.append(Arm(method, _options(method, options)))
    return arms


def _unfit(cls: type[Objective], online: bool = False) -> str:
    """Why a method cannot be compared here, or ""."""
    if "score" in cls.needs:
        return "trains a reward model, which gives no answers to compare"
    if cls.partner:
        return "learns from pairs with an answer of the reference, which no file has"
    if cls.feedback is Rollouts:
        return (
            ""
            if online
            else f"learns from answers that it writes itself: say in how many rounds, {cls.name()}:rounds=32"
        )
    return (
        ""
        if cls.feedback.record in JUDGED
        else f"learns from {cls.feedback.record.__name__.lower()}, which no judge gives"
    )


def _options(method: str, said: Sequence[str]) -> dict[str, Any]:
    given = dict[str, str]()
    for text in said:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f'methods: "{text}" is not name=value; write {method}:name=value.')
        given[name] = value
    # the run's own configuration knows every option's type and range, and which have no effect
    rounds = {"judge": "rule:trimtab.world.utility:utility"} if "rounds" in given else {}
    config = resolve({"data": "-", "method": method, "finetune": "full", **rounds, **given})
    unknown = [name for name in given if name not in config.options and name not in RUN_OPTIONS]
    if unknown:
        raise ConfigError(f'methods: "{unknown[0]}" is an option of a run that a comparison fixes for all methods.')
    return {name: config.options.get(name, getattr(config, name, None)) for name in given}
