"""Three steps of every method in float64, as one process or as one of several:  every_method.py FOLDER [few] [float32]

Batches of 4 out of 7 examples, and out of 5: the last batch is smaller, in the second case than the number of processes.
``few``: one objective of each class instead, always out of 5.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from tests.engine import engine, weights, worst
from tests.test_invariance import EVERY, Shifted, Sorted, data, with_lora
from trimtab.logprobs.reference import AdapterOff
from trimtab.logprobs.sharded import engine_of, whole
from trimtab.objectives.base import Objective
from trimtab.objectives.bco import BCO
from trimtab.objectives.cpo import CPO
from trimtab.objectives.dapo import DAPO
from trimtab.objectives.dpo import DPO
from trimtab.objectives.kto import KTO
from trimtab.objectives.ppo import PPO
from trimtab.objectives.reward_model import RewardModel
from trimtab.objectives.sft import SFT
from trimtab.objectives.tdpo1 import TDPO1

TIMES = ("runtime", "per_second", "flos")


Found = dict[str, dict[str, Any]]  # case -> what was found
Case = tuple[str, Objective, Callable[[], nn.Module], int]


def few() -> Iterator[Case]:
    """Independent rows; a baseline of the whole batch; coupled rows; memory; token means, in the denominator and beside the
    loss; rollouts, with a critic too; a reward model; the whole distribution; an adapter; a head that is not the embeddings."""
    for objective in (DPO(), KTO(), Sorted(), BCO(), SFT(), CPO(), DAPO(), PPO(), RewardModel(centring=0.1), TDPO1()):
        yield objective.name(), objective, partial(tiny.model_for, objective), 5
    yield "dpo, adapter", DPO(), with_lora, 5
    yield "dpo, a head of its own", DPO(), partial(tiny.model, tie_word_embeddings=False), 5


def cases() -> Iterator[Case]:
    """(name, objective, what makes the model, number of examples)."""
    for objective in EVERY:
        yield objective.name(), objective, partial(tiny.model_for, objective), 7
    rewards = RewardModel(centring=0.1)
    yield "reward_model, a process without rows", rewards, partial(tiny.model_for, rewards), 5
    for objective in (DPO(), KTO(), Sorted(), Shifted()):
        yield f"{objective.name()}, a process without rows", objective, tiny.model, 5
        yield f"{objective.name()}, adapter", objective, with_lora, 7


def run(folder: Path, which: Iterable[Case], dtype: torch.dtype = torch.float64) -> Found:
    """case -> what was logged, the weights, the memory, and held-out metrics."""
    found = {}
    for name, objective, make, n in which:
        model = make().to(dtype)
        trainer = engine(
            model, objective, data(objective, n), folder, batch_size=4, budget=50, max_steps=3,
            held_out=data(objective, 5, seed=3), max_grad_norm=1.0, dtype=dtype,
        )  # fmt: skip
        if name.endswith("adapter"):
            trainer.reference = AdapterOff(trainer.scorer, "a test")
        trainer.train()
        trainer.evaluate()
        logged = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in trainer.state.log_history]
        world = trainer.accelerator.num_processes
        with whole(model):
            learned = weights(model)
        found[name] = {"logged": logged, "weights": learned, "memory": dict(trainer.memory), "world": world}
        found[name]["held"] = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        found[name]["zero"] = 0 if engine_of(model) is None else engine_of(model).zero_optimization_stage()
    return found


def read(folder: Path, processes: int) -> list[Found]:
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(processes)]


def assert_same_run(alone: dict[str, Any], each: list[dict[str, Any]], steps: int = 3, within: float = 1e-10) -> None:
    """What several processes found is what one did, and they all hold the same model.

    ``within``: losses; weights and metrics ten times that."""
    assert alone["world"] == 1 and all(found["world"] == len(each) for found in each)
    assert all(worst(each[0]["weights"], found["weights"]) == 0 for found in each)
    assert worst(each[0]["weights"], alone["weights"]) < 10 * within
    for key, value in alone["memory"].items():
        assert each[0]["memory"][key].item() == pytest.approx(value.item(), rel=within)
    logged = each[0]["logged"]
    assert len(logged) == len(alone["logged"]) and [r["step"] for r in logged[:steps]] == list(range(1, steps + 1))
    for ours, wanted in zip(logged, alone["logged"], strict=True):
        assert ours.keys() == wanted.keys()
        assert ours.get("loss", 0.0) == pytest.approx(wanted.get("loss", 0.0), rel=within, abs=within)
        single = {"train_loss"}  # the Trainer's own, added up in float32
        assert {k: v for k, v in ours.items() if k not in single} == pytest.approx(
            {k: v for k, v in wanted.items() if k not in single}, rel=10 * within, abs=within
        )
    assert any("eval/loss" in row for row in logged)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        precision = torch.float32 if "float32" in sys.argv[2:] else torch.float64
        result = run(Path(temporary), few() if "few" in sys.argv[2:] else cases(), precision)
    from accelerate import PartialState

    rank = PartialState().process_index
    torch.save(result, Path(sys.argv[1]) / f"rank-{rank}.pt")
    PartialState().destroy_process_group()
    gc.collect()  # joins gloo's threads: one that is late aborts the process when the interpreter closes
