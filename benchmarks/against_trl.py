"""TRL's side of the benchmarks: its DPOTrainer and its KTOTrainer on exactly the token ids that trimtab gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from engine import LEARNING_RATE, MAX_LENGTH, MODEL, StepClock, Time, stopwatch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trimtab.logprobs.reference import mismatch
from trimtab.models import load_tokenizer
from trimtab.tokens.batch import Example


@contextmanager
def completions_only() -> Iterator[None]:
    """The "+cp" patch: let TRL project only completion positions onto the vocabulary on CPU, as it does on CUDA.

    ``add_fused_lm_head`` in trl/trainer/utils.py keeps the valid positions where ``_use_triton(device)`` is true. The
    name is replaced in that module only: the kernels module goes on choosing the plain torch kernels.
    """
    from trl.trainer import utils

    own = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = own


def trainer_class(method: str) -> Any:
    from trl import DPOTrainer, KTOTrainer

    match method:
        case "dpo":
            return DPOTrainer
        case "kto":
            return KTOTrainer
        case _:
            raise AssertionError(method)


def trl_trainer(
    model: torch.nn.Module,
    examples: Sequence[Example],
    folder: Path,
    *,
    batch_size: int,
    method: str = "dpo",
    at_once: int | None = None,
    seed: int = 0,
    ref_model: torch.nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    peft_config: Any = None,
    use_cpu: bool = True,
    processing_class: Any = None,
    **options: Any,
) -> Any:
    """TRL's trainer on the examples' own token ids, in the order given, with its defaults but ``options``.

    ``at_once``: rows of a forward pass; a larger batch accumulates gradients.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, KTOConfig

    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    own, settings = trainer_class(method), {"dpo": DPOConfig, "kto": KTOConfig}[method]

    class Tokenised(own):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the rows are what TRL's own preparation ends with

    size = min(batch_size, at_once or batch_size)
    assert batch_size % size == 0
    args = settings(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=batch_size // size,
        num_train_epochs=1,
        # rows are no longer than that; a prompt with another row's answer may be, and trimtab does not cut it either
        max_length=MAX_LENGTH if method == "dpo" else None,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        seed=seed,
        use_cpu=use_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Tokenised(
        model=model,
        ref_model=ref_model,
        peft_config=peft_config,
        args=args,
        train_dataset=Dataset.from_list(pair_rows(examples) if method == "dpo" else thumb_rows(examples, size)),
        processing_class=processing_class or load_tokenizer(MODEL),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(
    model: torch.nn.Module,
    examples: Sequence[Example],
    folder: Path,
    *,
    batch_size: int,
    at_once: int,
    method: str = "dpo",
    **options: Any,
) -> tuple[StepClock, Time, Time]:
    """What ``engine.trained`` is for trimtab: (clock, the reference's pass beforehand, when training began).

    The pass beforehand takes its whole call, writing included, less the forward passes of the warm-up batch.
    """
    whole, batch = list[Time](), list[Time]()
    own = trainer_class(method)
    own._precompute_ref_logps = stopwatch(own._precompute_ref_logps, whole)
    own.compute_ref_log_probs = stopwatch(own.compute_ref_log_probs, batch)
    clock = StepClock()
    trainer = trl_trainer(
        model, examples, folder, batch_size=batch_size, at_once=at_once, method=method, callbacks=[clock], **options
    )
    begun = Time.now()
    trainer.train()
    if not whole:
        return clock, Time(0, 0), begun
    passes = -(-batch_size // at_once)
    return clock, Time(0, 0).plus(*whole).since(Time(0, 0).plus(*batch[:passes])), begun


def pair_rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": list(e.prompt), "chosen_ids": list(e.completions[0]), "rejected_ids": list(e.completions[1])}
        for e in examples
    ]


def thumb_rows(examples: Sequence[Example], size: int) -> list[dict[str, Any]]:
    """As ``KTOTrainer._prepare_dataset`` leaves them, but each prompt's mismatched answer is the one that trimtab takes among
    the rows of that forward pass: the next row's, where TRL would take the one before."""
    rows = []
    for a in range(0, len(examples), size):
        batch = examples[a : a + size]
        for e, other in zip(batch, mismatch(batch), strict=True):
            row = {"prompt_ids": list(e.prompt), "completion_ids": list(e.completions[0]), "label": e.record.desirable}  # type: ignore[attr-defined]
            rows.append({**row, "KL_completion_ids": list(other.completions[0])})
    return rows
