"""TR-DPO's reference moves as told, comes back with a checkpoint, and L1 gives zeros."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.engine import engine, weights
from trimtab.feedback.records import Comparison
from trimtab.logprobs.reference import FrozenCopy
from trimtab.logprobs.score import Scorer
from trimtab.objectives.dpo import DPO
from trimtab.update.callbacks import MovingReference, Shrink
from trimtab.update.trainer import Update

BATCHES = 6


class Keep(TrainerCallback):
    """The policy's weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, *_: object, model: torch.nn.Module | None = None, **__: object) -> None:
        assert model is not None
        self.seen.append(weights(model))


def moving(folder: Path, every: int, mix: float, **arguments: object) -> tuple[Update, FrozenCopy, Keep]:
    examples, keep = tiny.examples(Comparison, 4, seed=5), Keep()
    trainer = engine(tiny.model(), DPO(), examples, folder, callbacks=[keep], max_steps=BATCHES, **arguments)  # type: ignore[arg-type]
    reference = FrozenCopy(trainer.model, Scorer(trainer.model, "shared", 10**6), torch.float64, "a test")
    trainer.reference = reference
    trainer.add_callback(MovingReference(reference, every, mix))
    return trainer, reference, keep


def test_hard_update_copies_every_second_step(tmp_path: Path) -> None:
    trainer, reference, keep = moving(tmp_path, every=2, mix=1.0)
    trainer.train()
    assert all(torch.equal(w, keep.seen[-1][n]) for n, w in reference.weights().items())
    rows = [r for r in trainer.state.log_history if "rewards/margins" in r]
    # margins are measured before the step: 0 right after a copy, not 0 a step later
    assert [abs(r["rewards/margins"]) < 1e-12 for r in rows] == [True, False] * 3


def test_soft_update_is_a_moving_average(tmp_path: Path) -> None:
    trainer, reference, keep = moving(tmp_path, every=3, mix=0.25)
    start = {n: w.clone() for n, w in reference.weights().items()}
    trainer.train()
    for n, w in reference.weights().items():
        once = torch.lerp(start[n], keep.seen[2][n], 0.25)
        assert torch.allclose(w, torch.lerp(once, keep.seen[5][n], 0.25), atol=1e-12)


def test_a_moved_reference_is_in_the_checkpoint(tmp_path: Path) -> None:
    whole, _, _ = moving(tmp_path / "a", every=2, mix=0.5)
    whole.train()
    first, _, _ = moving(tmp_path / "b", every=2, mix=0.5, save_strategy="steps", save_steps=3)
    first.train()
    second, reference, _ = moving(tmp_path / "b", every=2, mix=0.5, save_strategy="steps", save_steps=3)
    before = copy.deepcopy(reference.weights())
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoints" / "checkpoint-3"))
    assert any(not torch.equal(before[n], w) for n, w in reference.weights().items())
    assert all(torch.equal(w, weights(whole.model)[n]) for n, w in weights(second.model).items())


def test_soft_thresholding_gives_zeros(tmp_path: Path) -> None:
    """Weights below strength x learning rate become exactly 0, the others move by that much towards it."""
    model = tiny.model()
    before = weights(model)
    examples = tiny.examples(Comparison, 4, seed=5)
    keep = engine(model, DPO(beta=1e-9), examples, tmp_path, max_steps=1, learning_rate=1e-2, optim="sgd", callbacks=[Shrink(3.0)])  # fmt: skip  # noqa: E501
    keep.train()
    for n, w in weights(model).items():
        assert torch.allclose(w, torch.nn.functional.softshrink(before[n], 0.03), atol=1e-8)
        assert (w == 0).any() or before[n].abs().min() > 0.03


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reference_every", 2, "--reference", "cache"), "reference_every renews a copy of the model"),
        (
            ("--reference_every", 2, "--reference_mix", 0.5, "--finetune", "lora"),
            "would mix the factors, not their product",
        ),
        (("--reference_mix", 0.5), 'The option "reference_mix" has no effect here: the reference does not move'),
        (("--l1", 0.5, "--finetune", "full"), 'The option "l1" has no effect here: finetune is full'),
    ],
)
def test_what_is_refused(flags: tuple[object, ...], message: str) -> None:
    from tests.command import trimtab

    assert message in trimtab("train", "prefs.jsonl", "--method", "dpo", *flags).error
