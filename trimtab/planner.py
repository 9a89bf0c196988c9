"""``trimtab plan``: peak memory and time of an optimiser step before any weight is loaded, and a setting that fits.

Memory. The model's configuration gives a hollow model (:mod:`trimtab.dry`), and the engine's own code runs on it: the check of
the layout, the heaviest pass of the run, the samples. A ledger counts, byte by byte, what torch would hold:

    weights      in the type that they are held in, those of an adapter included
    reference    the weights of a frozen copy
    optimiser    the state that it keeps for what is trained: two moments for AdamW
    pass         the most that is alive beside these: activations kept for the backward pass of every token of the microbatch in
                 this precision, weights cast to bfloat16, attention weights of its groups, blocks of logits, the
                 reference's own pass, and the gradients as they come

The ledger's peak is that of torch's allocator (tests/test_plan.py compares them). On CUDA it is the prediction. On a CPU
the peak of the process is

    process + what stays during a phase + PASS * what comes and goes + HOLES * weights

where the first is measured here, with the same libraries and data. The last two are the C library's heap, whose free pieces do
not always fit, and what the matrix products' library packs: fitted. With gradient checkpointing there are more such pieces: AGAIN
times what comes and goes in a first pass, and once what more a later one needs, which adds its gradients to those there are. The
prediction is that of the highest phase.

Time. On this machine an optimiser step of the engine is timed with random weights: the whole model's where there is room and it
takes no longer than PATIENCE; else that of models with few of the layers, FEW and MORE, and every further layer takes what the
additional ones took. For a stated device it is a roofline of the ledger: operations over REACH of the stated rate, and all
other bytes over REACH_BYTES of the stated bandwidth.
"""

from __future__ import annotations

import copy
import math
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, assert_never

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.config import RunConfig
from trimtab.doctor import bandwidth, rate
from trimtab.dry import Hollow, HollowScorer
from trimtab.errors import CacheError, ConfigError, ModelError, nearest
from trimtab.feedback.records import Comparison, Demonstration, Message, Ranking, Score, Solution, Thumb
from trimtab.logprobs.critic import add_critic
from trimtab.logprobs.extras import Distribution
from trimtab.logprobs.layout import Mode, cost
from trimtab.logprobs.reference import AdapterOff, FrozenCopy, Reference
from trimtab.logprobs.score import Scorer, base_model, choose_layout, install
from trimtab.models import resolve
from trimtab.objectives import Objective
from trimtab.prepare import make_template, prepare
from trimtab.run import reference_kind, resolve_precision, shortest, training_arguments
from trimtab.tokens.batch import Example
from trimtab.update.callbacks import peak_memory_gb
from trimtab.update.trainer import Batches, Update
from trimtab.update.weights import no_dropout, with_adapter

# Fitted on SmolLM2-135M (benchmarks/plan_vs_measured.py, rows 0-2, 4, 6, 8, 9, 11; 2026-11-22). The other five: -11 to +4 %.
PASS, HOLES = 1.2, 1.0
# With gradient checkpointing; chosen on float32 runs of DPO and KTO in full and of DPO with LoRA (rows 13 to 16, and two at 4
# pairs; 2026-11-23), which it gives within 15 %. Of three settings that came later KTO with LoRA took 19 % more.
AGAIN = 3.5
FEW, MORE = 1, 3  # layers of the models whose step is timed
PATIENCE = 90.0  # seconds for steps of the whole model
REPEATS, COUNTED = 6, 3  # the heap grows for up to four steps more after the first: only the last ones count
# Assumed, not measured (no GPU was at hand): the share of the data sheet's figures that training reaches.
REACH, REACH_BYTES = 0.45, 0.7
CONTEXT_GB = 1.0  # of a GPU's memory that no tensor can have: driver, kernels, blocks that do not fit


@dataclass(frozen=True)
class Device:
    """Where a run would take place: bytes of memory that it can have, and where it is not this machine, rates per second."""

    name: str
    memory: float
    cuda: bool = False
    flops: dict[torch.dtype, float] = field(default_factory=dict)
    bandwidth: float = 0.0


# GB, TFLOP/s in bfloat16 (dense) and in float32, TB/s: NVIDIA's data sheets
SHEETS = {
    "b200-180": (180, 2250, 75, 8.0),
    "h200-141": (141, 989, 67, 4.8),
    "h100-80": (80, 989, 67, 3.35),
    "a100-80": (80, 312, 19.5, 2.04),
    "a100-40": (40, 312, 19.5, 1.56),
    "l40s-48": (48, 362, 91.6, 0.864),
    "l4-24": (24, 121, 30.3, 0.3),
    "rtx4090-24": (24, 165, 82.6, 1.01),
}
BYTES_A_FLOP = 1 / 200  # of bandwidth where only a rate is stated: between an A100's 1/153 and an H100's 1/295


def place(name: str | None, memory_gb: float | None, tflops: float | None) -> Device:
    """The stated device, or this machine where nothing (or only its memory) is stated."""
    if name is not None:
        if name not in SHEETS:
            raise ConfigError(
                f'device is "{name}".{nearest(name, list(SHEETS))} Known: {", ".join(SHEETS)}; for any other pass --memory_gb '
                "and --tflops."
            )
        if memory_gb is not None or tflops is not None:
            raise ConfigError(f"device {name} states memory and rate. Remove memory_gb and tflops, or device.")
        gb, low, full, tb = SHEETS[name]
        rates = {torch.bfloat16: low * 1e12, torch.float32: full * 1e12, torch.float64: full / 2 * 1e12}
        return Device(name, (gb - CONTEXT_GB) * 1e9, True, rates, tb * 1e12)
    if tflops is not None:
        if memory_gb is None:
            raise ConfigError("tflops states a device's rate; state its memory, too: --memory_gb 24.")
        rates = dict.fromkeys((torch.bfloat16, torch.float32, torch.float64), tflops * 1e12)
        stated = f"{memory_gb:g} GB, {tflops:g} TFLOP/s"
        return Device(stated, (memory_gb - CONTEXT_GB) * 1e9, True, rates, tflops * 1e12 * BYTES_A_FLOP)
    here = torch.cuda.is_available()
    return Device("this machine", memory_gb * 1e9 if memory_gb else _free_memory(), here)


def _free_memory() -> float:
    """Bytes that a run could have here."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(free + _process())  # what this process holds is the run's, too


def _process() -> float:
    """Bytes of this process in memory."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_gb() * 1e9


# --- what a run consists of -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """Lengths where there is no data: tokens of a prompt and of an answer, answers to a prompt of a ranking, rows."""

    prompt: int
    completion: int
    completions: int
    rows: int

    def __str__(self) -> str:
        return f"prompts of {self.prompt} and answers of {self.completion} tokens"

    def examples(self, objective: Objective) -> list[Example]:
        """Rows of these lengths in the method's kind of feedback; labels alternate."""
        return [self._row(objective, i, random.Random(i)) for i in range(self.rows)]

    def _row(self, objective: Objective, i: int, rng: random.Random) -> Example:
        said = (Message("user", str(i)),)
        kind: Any = objective.feedback.record
        record: Any
        count, marks = 1, tuple[int, ...]()
        if kind is Comparison:
            record, count = Comparison(said, "a", "b", strength=1.0), 2
        elif kind is Thumb:
            record = Thumb(said, "a", desirable=i % 2 == 0)
        elif kind is Ranking:
            count = self.completions
            places = range(1, count + 1)
            record = Ranking(said, ("a",) * count, tuple(places), tuple(1 / p for p in places))
        elif kind is Score:
            record = Score(said, "a", rng.random())
        elif kind is Solution:
            record, marks = Solution(said, ("a",), (1.0,)), (self.completion - 1,)
        elif kind is Demonstration:
            record = Demonstration(said, "a")
        else:
            assert_never(kind)
        draw = lambda n: tuple(rng.randrange(8) for _ in range(n))  # noqa: E731
        return Example(draw(self.prompt), tuple(draw(self.completion) for _ in range(count)), record, marks=marks)


@dataclass(frozen=True)
class Steps:
    """The optimiser steps of a run, as its batches will be cut.

    Attributes:
        count: how many.
        tokens: that the model reads in one, the mean.
        heaviest: microbatches that may need most memory, each with whether one before it left gradients; most tokens first.
        timed: the batch with most tokens, then those closest to the mean.
    """

    count: int
    tokens: float
    heaviest: list[tuple[list[Example], bool]]
    timed: list[list[Example]]


def steps_of(config: RunConfig, examples: Sequence[Example], scorer: Scorer) -> Steps:
    """What the run's own order of batches gives."""
    batches, closed = Batches(len(examples), config.batch_size, config.seed), scorer.closed
    limit = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * len(batches))
    costs = [cost(e, scorer.mode, closed) for e in examples]
    groups = [_longest_group(e, scorer.mode) ** 2 for e in examples]
    order = [b for e in range(math.ceil(limit / len(batches))) for b in batches.epoch(e)][:limit]
    sums = [sum(costs[i] for i in b) for b in order]
    mean = sum(sums) / len(sums)
    parts = [([b[j] for j in part], k > 0) for b in order for k, part in enumerate(_cut(scorer, b, examples))]
    heaviest: list[tuple[list[int], bool]] = []
    for weight in (costs, groups):
        for when in (False, True):  # a lighter one that finds gradients may need more
            found = [p for p in parts if p[1] == when]
            if found and (most := max(found, key=lambda p: sum(weight[i] for i in p[0]))) not in heaviest:
                heaviest.append(most)
    near = sorted(range(len(order)), key=lambda k: abs(sums[k] - mean))[:REPEATS]
    return Steps(
        len(order),
        mean,
        [
            ([examples[i] for i in p], later)
            for p, later in sorted(heaviest, key=lambda h: -sum(costs[i] for i in h[0]))
        ],
        [[examples[i] for i in order[k]] for k in (sums.index(max(sums)), *near)],
    )


def _cut(scorer: Scorer, batch: Sequence[int], examples: Sequence[Example]) -> list[list[int]]:
    return scorer.microbatches([examples[i] for i in batch])


def _tokens(examples: Sequence[Example], scorer: Scorer) -> int:
    return sum(cost(e, scorer.mode, scorer.closed) for e in examples)


def _longest_group(example: Example, mode: Mode) -> int:
    """Tokens that attend to each other at most."""
    lengths = [len(c) for c in example.completions]
    return len(example.prompt) + (sum(lengths) if mode == "shared" else max(lengths))


# --- the model, hollow or with few layers -----------------------------------------------------------------------------


def sizes_of(name: str) -> Any:
    """The model's configuration, which needs no weights beside it."""
    place = resolve(name)
    try:
        return AutoConfig.from_pretrained(place)
    except Exception as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f'The configuration of "{name}" cannot be read: {told[0]} Name a hub name, or a folder with a config.json.'
        ) from error


def _few_layers(sizes: Any, n: int) -> Any:
    sizes = copy.deepcopy(sizes)
    text = sizes.get_text_config()
    text.num_hidden_layers = n
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n]
    return sizes


def _made(sizes: Any, objective: Objective, dtype: torch.dtype) -> nn.Module:
    """A model with random (or hollow) weights of these sizes, as a run would load it."""
    sizes = copy.deepcopy(sizes)
    model: nn.Module
    if "score" in objective.needs:
        sizes.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(sizes, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(sizes, dtype=dtype)
    no_dropout(model)
    return model.train(False)


def _with_adapter(model: nn.Module, config: RunConfig, objective: Objective) -> nn.Module:
    """What learns beside the weights, or instead of them: an adapter, a critic."""
    if config.finetune == "lora":
        new = range(len(objective.control_tokens))
        try:
            model = with_adapter(model, config.lora_rank, config.lora_alpha, config.lora_targets, list(new))
        except ValueError as e:
            raise ConfigError(f'lora_targets is "{config.lora_targets}": {str(e).splitlines()[0]}') from e
    if "value" in objective.needs:
        add_critic(base_model(model), objective.critic, config.seed)
    return model


class _Constant:
    """Log-probs that were computed before: a cache. Those of random weights, so that a step has the gradients of a run: far from
    the policy's the loss is flat, and gradients below 1e-38 take some processors ten times as long (docs/decisions.md)."""

    identity = "cache"

    def __init__(self, sizes: Any) -> None:
        self.logp = -math.log(sizes.get_text_config().vocab_size)

    def logps(self, examples: Sequence[Example], budgets: int = 1) -> Tensor:
        return torch.full((sum(len(c) for e in examples for c in e.completions),), self.logp)

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        raise CacheError("a cache holds no distributions")


def _trainer(config: RunConfig, objective: Objective, scorer: Scorer, examples: Sequence[Example], tmp: str) -> Update:
    arguments = training_arguments(config, Path(tmp), True)
    model = scorer.model
    trainer = Update(model, objective, scorer, None, examples, config.batch_size, arguments)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)  # type: ignore[operator]
    trainer.create_optimizer()
    return trainer


def _gradients(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype or p.dtype)


def _optimise(trainer: Update) -> None:
    if trainer.args.max_grad_norm:
        trainer._clip_grad_norm(trainer.model)
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a run of this configuration will need. Bytes but for ``tokens``, ``flops`` (per type) and ``seconds``."""

    config: RunConfig
    mode: Mode
    parameters: int
    trained: int
    process: float
    weights: int
    reference: int
    optimiser: int
    gradients: int
    check: int  # ledger's peaks
    step: int
    first: int  # of those passes before which nothing has a gradient yet
    samples: int
    copied: bool  # whether they are sampled from a copy
    steps: Steps
    flops: dict[torch.dtype, float]  # of a mean step
    moved: float
    cuda: bool

    @property
    def phases(self) -> dict[str, float]:
        """Peak of the process (of the GPU's allocator) in each phase."""
        often, holes = (1.0, 0.0) if self.cuda else (PASS, HOLES)
        held = self.weights + self.reference + self.optimiser + self.gradients
        pieces = often * (self.step - held)
        if self.config.gradient_checkpointing and not self.cuda:
            pieces = AGAIN * (self.first - held) + self.step - self.first
        found = {
            "check of the layout": self.weights + often * (self.check - self.weights),
            "step": held + pieces + holes * self.weights,
            # a copy to sample from is made among the pieces that the held-out evaluation left
            "samples": self.samples + holes * self.weights * self.copied,
        }
        return {name: self.process + size for name, size in found.items()}

    @property
    def peak(self) -> float:
        return max(self.phases.values())


class Planner:
    """Forecasts for one model, one method and one set of examples under different settings."""

    def __init__(self, config: RunConfig, examples: Sequence[Example], objective: Objective, device: Device) -> None:
        self.examples, self.objective, self.device = list(examples), objective, device
        self.sizes = sizes_of(config.model)
        self.precision = resolve_precision(config.precision, config.weights)
        if device.flops and config.precision == "auto":
            self.precision = torch.bfloat16  # every stated GPU multiplies it
        self.held = torch.float64 if self.precision == torch.float64 else getattr(torch, config.weights)
        self.process = 0.0 if device.cuda else _process()
        self.check, self.mode = self._check(config)

    def _check(self, config: RunConfig) -> tuple[int, Mode]:
        """(peak of the comparison at the start of a run, the layout)."""
        hollow = Hollow(self.device.cuda)
        with hollow.on() as ledger:
            model = _made(self.sizes, self.objective, self.held)
            choice = choose_layout(model, shortest(self.examples), config.layout)
        return ledger.peak, choice.mode

    def forecast(self, config: RunConfig) -> Forecast:
        """Memory and work of a run with this configuration."""
        hollow, objective = Hollow(self.device.cuda), self.objective
        ledger = hollow.ledger
        with tempfile.TemporaryDirectory() as tmp:
            with hollow.on():
                model = _with_adapter(_made(self.sizes, objective, self.held), config, objective)
                install(model, self.precision, self.mode)
                weights = ledger.live
                scorer = HollowScorer(model, self.mode, config.token_budget, hollow)
                trainer = _trainer(config, objective, scorer, self.examples, tmp)
                trainer.reference = self._reference(config, model, scorer, hollow)
                reference = ledger.live - weights
                trained = [p for p in model.parameters() if p.requires_grad]
                _gradients(trained)
                ledger.restart()
                _optimise(trainer)
                moved, optimiser = float(ledger.moved), ledger.live - weights - reference
            steps, peak, first = steps_of(config, self.examples, scorer), 0, 0
            for part, later in reversed(steps.heaviest):  # the work that counts is that of the one with most tokens
                for after in (False, True)[: 1 + later]:
                    with hollow.on():
                        if after:
                            _gradients(trained)
                        ledger.restart()
                    trainer.training_step(model, part)
                    model.zero_grad()
                    peak, first = max(peak, ledger.peak), first if after else max(first, ledger.peak)
                share = steps.tokens / _tokens(part, scorer)
                flops, work = {kind: n * share for kind, n in ledger.flops.items()}, ledger.moved * share
            gradients = sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in trained)
            samples = self._samples(config, model, weights + reference)
        return Forecast(
            config, self.mode, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), self.process,
            weights, reference, optimiser, gradients, self.check, peak, first, samples, samples > 0 and self._low, steps, flops,
            moved + work, self.device.cuda,
        )  # fmt: skip

    def _reference(self, config: RunConfig, model: nn.Module, scorer: HollowScorer, hollow: Hollow) -> Reference | None:
        if "reference" not in self.objective.needs:
            return None
        match reference_kind(config):
            case "adapter":
                return AdapterOff(scorer, "adapter")
            case "copy":
                found = FrozenCopy(model, scorer, self.precision, "copy")
                found.scorer = HollowScorer(found.scorer.model, self.mode, config.token_budget, hollow)
                return found
            case "cache":
                return _Constant(self.sizes)
            case other:
                raise AssertionError(other)

    @property
    def _low(self) -> bool:
        return self.precision == torch.bfloat16

    def _samples(self, config: RunConfig, model: nn.Module, live: int) -> int:
        """Peak of answers before and after, beside ``live``: see :mod:`trimtab.samples`."""
        if not config.samples or "score" in self.objective.needs:
            return 0
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        text = self.sizes.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        longest = max(len(e.prompt) for e in self.examples) + config.sample_tokens
        low = self._low
        # keys and values, with the cache's room to grow
        numbers = 2 * text.num_hidden_layers * heads * width * 2 * longest * min(config.samples, len(self.examples))
        copied = weights + weights // 2 if low else 0  # to sample from: what is copied, and what that is converted to
        again = weights if config.finetune == "full" else 0  # the model as it was, for the KL
        return live + copied + numbers * (2 if low else 4) + again

    # --- time ---------------------------------------------------------------------------------------------------------

    def seconds(self, found: Forecast) -> tuple[float, str]:
        """(seconds of a mean optimiser step, how they were found)."""
        if self.device.flops:
            return self._roofline(found, self.device.flops, self.device.bandwidth, REACH, REACH_BYTES), (
                f"from stated rates, of which {REACH:.0%} (memory: {REACH_BYTES:.0%}) are assumed to be reached"
            )
        text = self.sizes.get_text_config()
        layers = text.num_hidden_layers
        if self._room(found):
            if layers <= MORE:
                return self._timed(found, self.sizes), "timed here"
            few, more = (self._timed(found, _few_layers(self.sizes, n)) for n in (FEW, MORE))
            whole = few + (layers - FEW) * max(more - few, 0.0) / (MORE - FEW)
            fits = found.phases["step"] - found.process < 0.8 * (_free_memory() - _process())
            if fits and (1 + REPEATS) * whole < PATIENCE:
                return self._timed(found, self.sizes), "timed here"
            return whole, f"timed here with {FEW} and {MORE} of {layers} layers"
        tokens = min(int(found.steps.tokens), found.config.token_budget)
        measured = {t: rate(t, tokens, text.hidden_size, 4 * text.hidden_size) for t in found.flops}
        how = ", ".join(f"{v / 1e12:.2f} TFLOP/s in {str(t).removeprefix('torch.')}" for t, v in measured.items())
        return self._roofline(found, measured, bandwidth(), 1.0, 1.0), f"from matrix products measured here: {how}"

    @staticmethod
    def _roofline(found: Forecast, rates: dict[torch.dtype, float], bytes_: float, reach: float, fast: float) -> float:
        products = sum(n / (rates[kind] * reach) for kind, n in found.flops.items())
        return products + found.moved / (bytes_ * fast)

    def _room(self, found: Forecast) -> bool:
        """Whether a model with few layers can be trained here for a moment."""
        hollow = Hollow()
        layers = self.sizes.get_text_config().num_hidden_layers
        with hollow.on() as ledger:
            _made(_few_layers(self.sizes, min(MORE, layers)), self.objective, self.held)
        needed = 4 * ledger.live + (found.step - found.weights - found.reference - found.optimiser)
        return needed < 0.8 * (_free_memory() - _process())

    def _timed(self, found: Forecast, sizes: Any) -> float:
        """Seconds that a mean step takes with a real model of these sizes and random weights."""
        config, (first, *batches) = found.config, found.steps.timed
        place = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as tmp:
            made = _made(sizes, self.objective, self.held).to(place)
            model = _with_adapter(made, config, self.objective)
            install(model, self.precision, self.mode)
            scorer = Scorer(model, self.mode, config.token_budget)
            trainer = _trainer(config, self.objective, scorer, first, tmp)
            if "reference" in self.objective.needs:
                match reference_kind(config):
                    case "adapter":
                        trainer.reference = AdapterOff(scorer, "adapter")
                    case "copy":
                        trainer.reference = FrozenCopy(model, scorer, self.precision, "copy")
                    case _:
                        trainer.reference = _Constant(sizes)
            taken = []
            for batch in (first, *batches):  # the first one makes the optimiser's state
                start = time.perf_counter()
                trainer.training_step(model, batch)
                _optimise(trainer)
                if place == "cuda":
                    torch.cuda.synchronize()
                taken.append((time.perf_counter() - start) / _tokens(batch, scorer))
        return median(taken[1:][-COUNTED:]) * found.steps.tokens


# --- a setting that fits ----------------------------------------------------------------------------------------------


def settings(config: RunConfig, objective: Objective) -> Iterator[dict[str, Any]]:
    """Changes to the configuration that save memory, those first that change least. None changes what is learned but LoRA."""
    yield {}
    yield {"gradient_checkpointing": True}
    cached = "token_kl" not in objective.needs and config.reference_every is None
    if config.finetune == "full" and "reference" in objective.needs and reference_kind(config) != "cache" and cached:
        yield {"gradient_checkpointing": True, "reference": "cache"}
    if config.finetune == "full":
        yield {"finetune": "lora", "reference": "auto"}
        yield {"finetune": "lora", "reference": "auto", "gradient_checkpointing": True}


def propose(planner: Planner, config: RunConfig) -> tuple[Forecast, dict[str, Any]] | None:
    """The first setting that fits, with the largest token budget that does; None where none of them does."""
    for change in settings(config, planner.objective):
        budgets = _budgets(config, planner)
        least = planner.forecast(config.model_copy(update={**change, "token_budget": budgets[-1]}))
        if least.peak > planner.device.memory:
            continue
        for budget in budgets[:-1]:
            found = planner.forecast(config.model_copy(update={**change, "token_budget": budget}))
            if found.peak <= planner.device.memory:
                break
        else:
            found, budget = least, budgets[-1]
        changed = {**change, "token_budget": budget}
        return found, {k: v for k, v in changed.items() if v != getattr(config, k)}
    return None


def _budgets(config: RunConfig, planner: Planner) -> list[int]:
    """The budget that was asked for, its halves, and the longest example, below which none matters."""
    longest = max(cost(e, planner.mode) for e in planner.examples)
    found = [config.token_budget]
    while found[-1] > longest:
        found.append(max(found[-1] // 2, longest))
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def tell(config: RunConfig, stated: Stated | None, where: Device, console: Console) -> Forecast:
    """Print what this run would need, and a setting that fits. ``stated``: lengths, where there is no data."""
    if config.judge is not None:
        raise ConfigError(
            "plan knows the lengths of answers in a file, and with judge they are yet to be sampled. Plan the method on a "
            "file of answers of the length that you expect, without judge."
        )
    if config.weights == "nf4":
        raise ConfigError(
            "plan does not know weights: nf4. Plan weights: bfloat16; the linear maps, most of the weights, take 0.3 of that."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    objective, source = config.objective(), str(stated)
    if stated is None:
        data = prepare(config, objective, make_template(config))
        objective, source, examples = data.objective, config.data, data.train
    else:
        examples = stated.examples(objective)
    planner = Planner(config, examples, objective, where)
    found = planner.forecast(config)
    say = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    precision = str(planner.precision).removeprefix("torch.")
    say(
        f"{config.model}: {found.parameters / 1e6:,.1f} million parameters, {found.trained / 1e6:,.1f} trained "
        f"({config.finetune}), {precision}, {found.mode}"
    )
    say(
        f"{source}: {len(examples):,} examples, {found.steps.count:,} optimiser steps of {config.batch_size}; "
        f"{found.steps.tokens:,.0f} tokens in a step, at most {config.token_budget:,} at once"
    )
    held = found.weights + found.reference + found.optimiser
    parts = {"process": found.process, "weights": found.weights, "reference": found.reference}
    parts |= {"optimiser": found.optimiser, "heaviest pass": found.step - held}
    say("memory in a step, GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size))
    say(
        "peak, GB: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.phases.items() if size > found.process)
    )
    fits = found.peak <= where.memory
    say(
        f"expected peak memory: {found.peak / 1e9:.2f} GB of {where.memory / 1e9:.1f} ({where.name}): "
        f"{'fits' if fits else 'does not fit'}"
    )
    _tell_time(planner, found, say)
    if fits:
        say("this setting fits as it is")
        return found
    better = propose(planner, config)
    if better is None:
        binding = max(found.phases, key=lambda name: found.phases[name])
        say(f"no setting fits (largest: {binding}). Take a smaller model, more memory, or a smaller max_length.")
        return found
    found, change = better
    flags = " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in change.items())
    say(f"this fits, with {found.peak / 1e9:.2f} GB: {flags}")
    _tell_time(planner, found, say)
    return found


def _tell_time(planner: Planner, found: Forecast, say: Any) -> None:
    seconds, how = planner.seconds(found)
    whole = seconds * found.steps.count
    say(f"expected time: {seconds:.2f} s per optimiser step, {whole / 60:.1f} minutes for all ({how})")
