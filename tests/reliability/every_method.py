"""Three steps of every method in float64, as one process or as one of several:  every_method.py FOLDER

Batches of 4 out of 7 examples, and out of 5: the last batch is smaller, in the second case than the number of processes.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import tiny
from tests.engine import engine, weights
from tests.test_invariance import EVERY, Shifted, Sorted, data, with_lora
from trimtab.logprobs.reference import AdapterOff
from trimtab.objectives.base import Objective
from trimtab.objectives.dpo import DPO
from trimtab.objectives.kto import KTO
from trimtab.objectives.reward_model import RewardModel

TIMES = ("runtime", "per_second", "flos")


def cases() -> Iterator[tuple[str, Objective, Callable[[], nn.Module], int]]:
    """(name, objective, what makes the model, number of examples)."""
    for objective in EVERY:
        yield objective.name(), objective, partial(tiny.model_for, objective), 7
    rewards = RewardModel(centring=0.1)
    yield "reward_model, a process without rows", rewards, partial(tiny.model_for, rewards), 5
    for objective in (DPO(), KTO(), Sorted(), Shifted()):
        yield f"{objective.name()}, a process without rows", objective, tiny.model, 5
        yield f"{objective.name()}, adapter", objective, with_lora, 7


def run(folder: Path) -> dict[str, dict[str, Any]]:
    """case -> what was logged, the weights, the memory, and held-out metrics."""
    found = {}
    for name, objective, make, n in cases():
        model = make()
        trainer = engine(
            model, objective, data(objective, n), folder, batch_size=4, budget=50, max_steps=3,
            held_out=data(objective, 5, seed=3), max_grad_norm=1.0,
        )  # fmt: skip
        if name.endswith("adapter"):
            trainer.reference = AdapterOff(trainer.scorer, "a test")
        trainer.train()
        trainer.evaluate()
        logged = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in trainer.state.log_history]
        world = trainer.accelerator.num_processes
        found[name] = {"logged": logged, "weights": weights(model), "memory": dict(trainer.memory), "world": world}
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        result = run(Path(temporary))
    from accelerate import PartialState

    rank = PartialState().process_index
    torch.save(result, Path(sys.argv[1]) / f"rank-{rank}.pt")
    PartialState().destroy_process_group()
    gc.collect()  # joins gloo's threads: one that is late aborts the process when the interpreter closes
