"""trimtab's side of the benchmarks: the HH feedback as token ids, and the trainer as a run builds it."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from trimtab.config import RunConfig
from trimtab.feedback.records import Comparison, Message, Ranking, Thumb
from trimtab.logprobs.cache import LogpCache
from trimtab.logprobs.reference import AdapterOff, Cached, FrozenCopy, mismatch
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import load_model
from trimtab.prepare import make_template, prepare
from trimtab.run import no_dropout, resolve_precision, training_arguments
from trimtab.tokens.batch import Example
from trimtab.update.callbacks import MetricsFile, peak_memory_gb
from trimtab.update.trainer import Update
from trimtab.update.weights import with_adapter

MODEL, MAX_LENGTH, LEARNING_RATE = "smollm2", 512, 1e-6  # the learning rate is TRL's own for DPO and KTO
HH = "hh-rlhf/harmless-base-test.jsonl.gz"


# --- feedback ---------------------------------------------------------------------------------------------------------


def hh_file() -> Path:
    """The pairs: below ``$TRIMTAB_DATA`` (a data folder, or the hh-rlhf folder itself), else ../shared/data."""
    given = Path(os.environ.get("TRIMTAB_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return next((f for f in (given / HH, given / Path(HH).name) if f.is_file()), given / HH)


def hh_examples(config: RunConfig) -> list[Example]:
    """All pairs of at most MAX_LENGTH tokens, tokenised by trimtab, in the file's order."""
    return prepare(config, config.objective(), make_template(config)).train


def thumbs(pairs: Sequence[Example], seed: int) -> list[Example]:
    """One answer of each pair, drawn: a thumb up on the chosen one, or down on the other."""
    draw, found = random.Random(seed), []
    for e in pairs:
        assert isinstance(e.record, Comparison)
        side = draw.randrange(2)
        record = Thumb(e.record.prompt, e.record.completions[side], side == 0)
        found.append(Example(e.prompt, (e.completions[side],), record))
    return found


def groups(pairs: Sequence[Example], k: int, seed: int) -> list[Example]:
    """Each prompt with K answers: its own two, and others drawn from all of HH that fit into MAX_LENGTH with it."""
    draw = random.Random(seed)
    answers = [c for e in pairs for c in e.completions]
    found = []
    for e in pairs:
        fits = [a for a in draw.sample(answers, 4 * k) if len(e.prompt) + len(a) <= MAX_LENGTH]
        found.append(ranked(e.prompt, (*e.completions, *fits)[:k]))
    return [e for e in found if len(e.completions) == k]


def ranked(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Example:
    """A ranking in the order given; its texts stand for nothing."""
    k = len(answers)
    record = Ranking((Message("user", ""),), tuple(map(str, range(k))), tuple(range(1, k + 1)))
    return Example(tuple(prompt), tuple(map(tuple, answers)), record)


def random_ranked(vocab: int, prompt: int, answer: int, k: int, draw: random.Random) -> Example:
    """K answers of ``answer`` tokens to a prompt of ``prompt`` tokens, all drawn at random."""
    ids = lambda n: [draw.randrange(3, vocab) for _ in range(n)]  # noqa: E731
    return ranked(ids(prompt), [ids(answer) for _ in range(k)])


# --- the model and the run --------------------------------------------------------------------------------------------


def run_config(batch_size: int = 4, seed: int = 0, **more: Any) -> RunConfig:
    """trimtab's defaults, but for full fine-tuning, the length, and what two sides must have in common."""
    common = {
        "data": str(hh_file()), "method": "dpo", "finetune": "full", "max_length": MAX_LENGTH, "holdout": 0.0,
        "learning_rate": LEARNING_RATE, "warmup": 0,
    }  # fmt: skip
    return RunConfig(batch_size=batch_size, seed=seed, **{**common, **more})


def load() -> Any:
    """SmolLM2-135M-Instruct, float32 master weights."""
    return load_model(MODEL)


def random_llama(seed: int = 0, **shape: Any) -> Any:
    """A Llama of that shape with random weights: 28 M parameters where nothing else is asked for."""
    torch.manual_seed(seed)
    small = {
        "vocab_size": 49152, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**small, **shape})).eval()


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
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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


def trimtab_trainer(
    config: RunConfig,
    model: Any,
    examples: Sequence[Example],
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Update:
    """trimtab's own Update trainer as ``trimtab.run`` builds it, on the examples in the order given. No reference yet."""
    no_dropout(model)
    precision = resolve_precision(config.precision, config.weights)
    short = sorted(examples, key=lambda e: e.tokens)[:4]
    # not timed; cut, because the plain forward pass of a whole long row would be the peak of the memory
    pieces = [dataclasses.replace(e, prompt=e.prompt[-64:], completions=tuple(c[:16] for c in e.completions)) for e in short]  # fmt: skip  # noqa: E501
    choice = choose_layout(model, pieces, config.layout)
    if config.finetune == "lora":
        model = with_adapter(model, config.lora_rank, config.lora_alpha, config.lora_targets)
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


def asked_of_reference(batch: Sequence[Example], config: RunConfig, context: int | None = None) -> list[Example]:
    """What the reference scores for a batch: its rows, and for KTO each prompt with another row's answer."""
    matched = mismatch(batch, context) if "mismatched" in config.objective().needs else []
    return [*batch, *matched]


def give_reference(trainer: Update, config: RunConfig, folder: Path) -> Time:
    """Set the reference that ``config.reference`` names. Returns what filling a cache took for all but the first batch."""
    live = AdapterOff(trainer.scorer, MODEL)
    match config.reference:
        case "copy":
            trainer.reference = frozen_reference(trainer, resolve_precision(config.precision))
        case "adapter":
            trainer.reference = live
        case "cache":
            batches = [[trainer.examples[i] for i in b] for b in trainer.batches.epoch(0)]
            first, *rest = (asked_of_reference(b, config, trainer.context) for b in batches)
            trainer.reference = cached = Cached(LogpCache(folder / "reference"), MODEL)
            cached.fill(first, live)
            start = Time.now()
            cached.fill([e for b in rest for e in b], live)
            return Time.now().since(start)
        case _:
            raise AssertionError(config.reference)
    return Time(0, 0)


def frozen_reference(trainer: Update, precision: torch.dtype) -> FrozenCopy:
    return FrozenCopy(trainer.scorer.model, trainer.scorer, precision, MODEL)


def trained(
    config: RunConfig, model: Any, examples: Sequence[Example], folder: Path
) -> tuple[StepClock, Time, Time, Update]:
    """One epoch in the order given, the first batch warming up: (clock, the reference's pass beforehand, when training
    began, the trainer)."""
    clock = StepClock()
    trainer = trimtab_trainer(config, model, examples, folder, [clock])
    beforehand = give_reference(trainer, config, folder)
    begun = Time.now()
    trainer.train()
    return clock, beforehand, begun, trainer


def figures(clock: StepClock, beforehand: Time, begun: Time) -> dict[str, Any]:
    """What one measurement says, the same on either side. The warm-up step is not counted."""
    counted = clock.after_warm_up.plus(beforehand)
    return {
        "counted_s": counted.wall,
        "counted_cpu_s": counted.cpu,
        "reference_s": beforehand.wall,
        "warm_up_s": clock.ends[0].wall - begun.wall,
        "steps": len(clock.ends) - 1,
        "peak_gb": peak_memory_gb(),
        "losses": clock.losses,
    }


def measured(config: RunConfig, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """:func:`trained` in a folder that is thrown away, and its figures."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        clock, beforehand, begun, _ = trained(config, model, examples, Path(folder))
    assert len(clock.ends) == len(examples) // config.batch_size
    return figures(clock, beforehand, begun)


def current_memory_gb() -> float:
    """Memory of this process now; its peak so far where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9 if statm.exists() else peak_memory_gb()


# --- models of the benchmarks by name ---------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "small": {},  # 28 M parameters, the vocabulary of SmolLM2
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


def model_named(name: str) -> Any:
    """SmolLM2, or one of SHAPES with random weights."""
    return load() if name == MODEL else random_llama(**SHAPES[name])
