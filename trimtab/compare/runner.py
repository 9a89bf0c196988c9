"""Many trials, a few processes: what is there is read, what is missing is run."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from trimtab.compare.results import Results
from trimtab.compare.stats import Result, gain, mean_of
from trimtab.compare.trial import Trial, draw_pool, run

Tell = Callable[[str], None]
RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEEDS = (9001, 9002)  # other prompts, answers and held-out prompts than those of any comparison


def run_all(
    trials: Sequence[Trial], results: Results, command: str, workers: int = 2, tell: Tell = print
) -> list[Result]:
    """The results of these trials, in their order; one thread for each worker."""
    found = {i: r for i, t in enumerate(trials) if (r := results.get(t)) is not None}
    missing = [i for i in range(len(trials)) if i not in found]
    for done, (i, result) in enumerate(_run([trials[i] for i in missing], workers), start=1):
        trial = trials[missing[i]]
        found[missing[i]] = results.put(trial, result, command)
        tell(f"{done}/{len(missing)} {summary(trial, result)}")
    return [found[i] for i in range(len(trials))]


def _run(trials: Sequence[Trial], workers: int) -> Iterator[tuple[int, Result]]:
    if workers < 2 or len(trials) < 2:
        yield from ((i, run(t)) for i, t in enumerate(trials))
        return
    # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quiet) as pool:
        # first every seed's answers, so that no two processes sample the same ones
        list(pool.map(_draw, {(t.seed, t.budget): t for t in trials}.values()))
        futures = {pool.submit(run, t): i for i, t in enumerate(trials)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draw(trial: Trial) -> None:
    draw_pool(trial)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would go on for hours, and nobody would read what it finds."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def quiet() -> None:
    """What a worker begins with."""
    import warnings

    import torch
    from transformers.utils import logging

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    hf: Any = logging  # untyped
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    hf.set_verbosity_error()
    hf.disable_progress_bar()


def summary(trial: Trial, result: Result) -> str:
    """One line for the eye."""
    options = "".join(f" {k}={v}" for k, v in trial.options.items())
    what = f"{trial.world} {trial.method}{options} rate {trial.learning_rate:g} seed {trial.seed}"
    if "failed" in result:
        return f"{what}: failed, {result['failed']}"
    return f"{what}: gain {gain(result):+.3f}, KL {mean_of('kl')(result):.2f}, {result['seconds']} s"


def tune(
    trials: Sequence[Trial], results: Results, command: str, workers: int = 2, tell: Tell = print
) -> list[dict[float, float]]:
    """For each trial (its own rate and seed do not matter): learning rate -> mean gain over the tuning seeds.

    Every method gets the same grid and the same seeds, and so the same budget. A rate at which a run diverges counts as
    minus infinity. See :func:`best`.
    """
    grid = [replace(t, learning_rate=r, seed=s) for t in trials for r in RATES for s in TUNING_SEEDS]
    gains = iter([gain(r) for r in run_all(grid, results, command, workers, tell)])
    return [{r: sum(next(gains) for _ in TUNING_SEEDS) / len(TUNING_SEEDS) for r in RATES} for _ in trials]


def best(gains: dict[float, float]) -> float:
    """The rate with the largest gain; the smaller of two that are equal."""
    return max(gains, key=lambda rate: (gains[rate], -rate))
