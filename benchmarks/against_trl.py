"""What both TRL benchmarks share: the HH pairs as token ids, TRL's DPOTrainer on exactly those ids, and ours."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from trimtab.config import RunConfig
from trimtab.logprobs.cache import LogpCache
from trimtab.logprobs.reference import AdapterOff, Cached, FrozenCopy
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import load_model, load_tokenizer
from trimtab.prepare import make_template, prepare
from trimtab.run import no_dropout, training_arguments
from trimtab.tokens.batch import Example
from trimtab.update.callbacks import MetricsFile
from trimtab.update.trainer import Update

MODEL, MAX_LENGTH, LEARNING_RATE = "smollm2", 512, 1e-6  # the learning rate is DPOConfig's own
HH = "hh-rlhf/harmless-base-test.jsonl.gz"


def hh_file() -> Path:
    """The pairs: below ``$TRIMTAB_DATA`` (a data folder, or the hh-rlhf folder itself), else ../shared/data."""
    given = Path(os.environ.get("TRIMTAB_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return next((f for f in (given / HH, given / Path(HH).name) if f.is_file()), given / HH)


def hh_examples(config: RunConfig) -> list[Example]:
    """All pairs of at most MAX_LENGTH tokens, tokenised by trimtab, in the file's order."""
    return prepare(config, config.objective(), make_template(config)).train


def run_config(batch_size: int = 4, seed: int = 0, **more: Any) -> RunConfig:
    """trimtab's defaults, but for full fine-tuning, the length, and what the two sides must have in common."""
    common = {"finetune": "full", "max_length": MAX_LENGTH, "holdout": 0.0, "learning_rate": LEARNING_RATE, "warmup": 0}
    return RunConfig(data=str(hh_file()), method="dpo", batch_size=batch_size, seed=seed, **{**common, **more})


class Time(NamedTuple):
    """Seconds on the wall and seconds of processor time; the second says something on a busy machine, too."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Time:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Time) -> Time:
        return Time(self.wall - start.wall, self.cpu - start.cpu)

    def plus(self, *others: Time) -> Time:
        return Time(*map(sum, zip(self, *others, strict=True)))


class StepClock(TrainerCallback):
    """When each optimiser step ended, and what loss it logged."""

    def __init__(self) -> None:
        self.ends: list[Time] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(Time.now())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    @property
    def after_warm_up(self) -> Time:
        """From the end of the first step to the end of the last."""
        return self.ends[-1].since(self.ends[0])


def stopwatch(function: Callable[..., Any], taken: list[Time]) -> Callable[..., Any]:
    """The function (or method), noting what every call took."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = Time.now()
        result = function(*args, **kwargs)
        taken.append(Time.now().since(start))
        return result

    return timed


# --- TRL ----------------------------------------------------------------------------------------------------------


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


def trl_trainer(
    model: torch.nn.Module,
    examples: Sequence[Example],
    folder: Path,
    *,
    batch_size: int,
    seed: int = 0,
    ref_model: torch.nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> Any:
    """TRL's DPOTrainer on the examples' own token ids, in the order given, with DPOConfig's defaults but ``options``."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the rows are what TRL's own preparation ends with

    rows = [
        {"prompt_ids": list(e.prompt), "chosen_ids": list(e.completions[0]), "rejected_ids": list(e.completions[1])}
        for e in examples
    ]
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        seed=seed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Tokenised(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(MODEL),
        callbacks=list(callbacks),
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


# --- trimtab ------------------------------------------------------------------------------------------------------


def trimtab_trainer(
    config: RunConfig,
    model: Any,
    examples: Sequence[Example],
    folder: Path,
    precision: torch.dtype,
    callbacks: Sequence[TrainerCallback] = (),
) -> Update:
    """trimtab's own Update trainer as ``trimtab.run`` builds it, on the examples in the order given. No reference yet."""
    no_dropout(model)
    short = sorted(examples, key=lambda e: e.tokens)[:4]
    choice = choose_layout(model, short, config.layout)
    install(model, precision, choice.mode)
    scorer = Scorer(model, choice.mode, config.token_budget)
    arguments = training_arguments(config, folder, True)
    trainer = Update(
        model, config.objective(), scorer, None, examples, config.batch_size, arguments, callbacks=list(callbacks)
    )
    order = list(range(len(examples)))
    size = config.batch_size
    trainer.batches.epoch = lambda epoch: [order[a : a + size] for a in range(0, len(order), size)]  # type: ignore[method-assign]
    trainer.callback_handler.callbacks.insert(0, MetricsFile(folder / "metrics.jsonl", lambda: trainer.tokens_seen))
    return trainer


def cached_reference(trainer: Update, folder: Path, warm_up: int) -> tuple[Cached, Time]:
    """The default reference of a full fine-tune, and the time it took to fill it for all but the warm-up rows."""
    cached = Cached(LogpCache(folder), MODEL)
    live = AdapterOff(trainer.scorer, MODEL)
    cached.fill(trainer.examples[:warm_up], live)
    start = Time.now()
    cached.fill(trainer.examples[warm_up:], live)
    return cached, Time.now().since(start)


def frozen_reference(trainer: Update, precision: torch.dtype) -> FrozenCopy:
    return FrozenCopy(trainer.scorer.model, trainer.scorer, precision, MODEL)


def load() -> Any:
    """SmolLM2-135M-Instruct, float32 master weights on both sides."""
    return load_model(MODEL)
