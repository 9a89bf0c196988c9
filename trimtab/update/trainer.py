"""One subclass of transformers.Trainer for every method.

Batch size is mathematics, microbatch is memory: one call of :meth:`Update.training_step` sees the whole batch of one
optimiser step, on every rank. Each rank scores its share of the examples in microbatches of a token budget; sums are
divided by the whole batch's denominator, so no number depends on where the cuts fall or how many ranks there are.

``gradient_accumulation_steps`` of the Trainer stays 1; its optimizer, schedulers, callbacks, checkpoints and trackers
are used as they are.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from trimtab.errors import CheckFailed, CheckpointError, ModelError
from trimtab.launch import launched
from trimtab.logprobs.critic import critic_of
from trimtab.logprobs.extras import Extras, gumbel
from trimtab.logprobs.layout import cost
from trimtab.logprobs.reference import AdapterOff, Cached, FrozenCopy, Reference, mismatch
from trimtab.logprobs.score import Scorer, base_model, casts_kept, evaluating
from trimtab.logprobs.scored import EXTRAS, Completions
from trimtab.logprobs.sharded import engine_of, in_step, is_sharded, load_whole, remember_structure, whole
from trimtab.objectives.base import Objective
from trimtab.tokens.batch import Example
from trimtab.update import zero
from trimtab.update.clipping import clip, divides
from trimtab.update.master import MasterAdamW, full_gradients, held_low
from trimtab.update.measure import Tally, measure

MEMORY_FILE, CRITIC_FILE, COMPLETE_FILE = "objective_memory.safetensors", "critic.safetensors", "complete.json"
REFERENCE_FILE = "reference.safetensors"  # of one that moved


class _StillToRead(NamedTuple):
    """Mismatched completions that the pass which learns scores, too, and their reference's log-probs."""

    examples: list[Example]
    reference: list[Tensor | None]


Unmatched = Completions | _StillToRead | None


class _NoRoom(Exception):
    """A step did not fit into the memory of some rank; every rank raises it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory could not be had, of a GPU or of the machine."""
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "memory" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


class Batches:
    """The order of the data: a permutation per epoch that depends on the seed and the epoch alone, so a resumed run
    sees what the uninterrupted one would have seen, and a cache can be filled for batches that are still to come."""

    figures: Mapping[str, float] = {}  # of an epoch, logged with each step; rounds have some
    learner: Any = None

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed, self.current = n, batch_size, seed, 0

    def epoch(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch)).tolist()
        return [order[a : a + self.batch_size] for a in range(0, self.n, self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.epoch(self.current))

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)


class _Whole:
    """The batches; a round is made before the first one of an epoch, with the weights whole on every process."""

    def __init__(self, trainer: Update) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.trainer.batches)
        with whole(self.trainer.scorer.model) if self.trainer.rounds is not None else nullcontext():
            first = next(batches)
        yield first
        yield from batches

    def __len__(self) -> int:
        return len(self.trainer.batches)


class _SetEpoch(TrainerCallback):
    """Tells the batch order which epoch begins (the Trainer only tells samplers that accelerate has wrapped)."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.batches.current = int(state.epoch or 0)


class Update(Trainer):
    """Trains ``model`` with an objective.

    Args:
        model: on which :func:`trimtab.logprobs.score.install` was called.
        objective: any :class:`~trimtab.objectives.base.Objective`, the user's own included.
        scorer: how the model is scored (layout, token budget).
        reference: where reference log-probs come from; None for methods without one.
        examples: training data; ``batch_size`` of them make one optimiser step over all ranks together.
        held_out: examples for :meth:`evaluate`.
        args: the Trainer's own arguments.
        rounds: a :class:`trimtab.online.rounds.Rounds`, which makes the examples itself, an epoch at a time.
        beside: a :class:`trimtab.update.beside.Beside`, text whose likelihood is learned in the same steps.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        scorer: Scorer,
        reference: Reference | None,
        examples: Sequence[Example],
        batch_size: int,
        args: TrainingArguments,
        held_out: Sequence[Example] = (),
        callbacks: Sequence[TrainerCallback] = (),
        processing_class: Any = None,
        rounds: Any = None,
        beside: Any = None,
    ) -> None:
        self.beside = beside
        self.objective, self.scorer, self.reference = objective, scorer, reference
        self.rounds = rounds
        self.examples = list(examples) if rounds is None else rounds.examples
        self.held_out_examples = list(held_out)
        self.context = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
        self.extras = tuple(sorted(EXTRAS.keys() & objective.needs))
        if ("score" in self.extras) != scorer.closed:
            found, needed = "a reward model", "log-probs"
            if not scorer.closed:
                found, needed = "a language model", "a reward model"
            raise ModelError(f"{objective.name()} needs {needed}, and the model is {found}.")
        self.batches: Any = Batches(len(self.examples), batch_size, args.seed) if rounds is None else rounds
        self.batches.learner = self
        self.memory: Mapping[str, Tensor] = {}
        self.tally = Tally()
        self.tokens_seen = 0
        self.halvings: list[dict[str, int]] = []  # of the token budget: step, from, to
        self.tell: Callable[[str], None] = lambda text: None  # for the user
        self.current: list[Example] = []  # the batch of this step
        self.whole: Any = None  # its view, without log-probs
        chosen = None
        if held_low(model):
            full_gradients(model.parameters())
            own, options = Trainer.get_optimizer_cls_and_kwargs(args)
            if own is not torch.optim.AdamW:
                raise ModelError(
                    f"weights held in low precision learn with AdamW, and the optimizer is {own.__name__}."
                )
            chosen = (MasterAdamW, options)
        # a NaN must be seen, not averaged away
        args.logging_nan_inf_filter = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.examples,  # type: ignore[arg-type]
            eval_dataset=self.held_out_examples,  # type: ignore[arg-type]
            callbacks=[_SetEpoch(self.batches), *callbacks],
            processing_class=processing_class,
            optimizer_cls_and_kwargs=chosen,
        )
        for stock in (PrinterCallback, ProgressCallback):
            self.remove_callback(stock)

    # --- data: every rank gets the whole batch, token ids cost nothing ------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.examples, batch_sampler=_Whole(self), collate_fn=list)  # type: ignore[arg-type]

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's. FSDP2 runs on a CPU, too, but accelerate would take it for DDP there without a word."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and launched() == "fsdp2":
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin, self.is_fsdp_enabled = FullyShardedDataParallelPlugin(), True
        if launched() == "zero":
            self.is_deepspeed_enabled = True
            zero.set_up(self.accelerator, self.args)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not in_step(self.model):
            remember_structure(self.model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            zero.take_over(self.accelerator, self.model)
            if resume_from_checkpoint is not None:  # the engine has loaded its own
                self._load_ours(Path(resume_from_checkpoint))
        return prepared

    @property
    def _world(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process is the first."""
        return self._world[0] == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self._world[1] == 1

    def share(self, n: int) -> list[int]:
        """Which of n items this process works on."""
        rank, world = self._world
        return list(range(rank, n, world))

    def gathered(self, mine: dict[int, Any], n: int) -> list[Any]:
        """All n values in order, from each process's index -> value."""
        if self._world[1] > 1:
            mine = dict(gather_object(list(mine.items())))
        return [mine[i] for i in range(n)]

    # --- one optimiser step ----------------------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: list[Example],
        num_items_in_batch: Tensor | int | None = None,  # type: ignore[override]
    ) -> Tensor:
        """The gradient of one batch. Where memory does not suffice the token budget is halved, and the step made again."""
        while True:
            memory, tally, state = self.memory, dict(self.tally.sums), _rng_state()
            try:
                with self._unreduced(model):
                    loss = self._step(model, inputs)
                break
            except _NoRoom as e:
                told = str(e)
            # nothing of the half-done step is kept: its frames, which held tensors, are gone with the exception
            self.memory, self.tally.sums = memory, tally
            _set_rng_state(state)
            model.zero_grad()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(inputs, told)
        self._reduce(model)
        self.tokens_seen += sum(e.tokens for e in inputs)
        return loss

    def _step(self, model: nn.Module, batch: list[Example]) -> Tensor:
        model.train()
        share = self.share(len(batch))
        self.current = batch
        denominator = self.denominator(batch)
        asked = "mismatched" in self.objective.needs or isinstance(self.reference, AdapterOff)
        with whole(self.scorer.model) if asked else nullcontext():
            reference, unmatched = self._constants(batch, share)
        together = self.objective.coupled or self.objective.has_memory()
        learn = self._learn_together if together else self._learn_apart
        # of shards, what is converted would be the whole model
        once = nullcontext() if together or in_step(self.scorer.model) else casts_kept()
        with self._agreed(), once:
            if self.beside is not None:
                self._learn_beside(model)
            return learn(model, batch, share, reference, unmatched, denominator)

    # --- out of memory ----------------------------------------------------------------------------------------------

    @property
    def _recovers(self) -> bool:
        """Whether a process that ran out of memory can still meet the others: shards are in the middle of a collective call."""
        return self.alone or self.accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """Out of memory on one rank is out of memory on all of them, before the next collective call."""
        if not self._recovers:
            yield
            return
        told = ""
        try:
            yield
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            told = str(e).splitlines()[0] if str(e) else type(e).__name__
        found = [told] if self.alone else gather_object([told])
        if worst := next((t for t in found if t), ""):
            raise _NoRoom(worst)

    def _unreduced(self, model: nn.Module) -> AbstractContextManager[Any]:
        """DDP would reduce gradients in the last backward pass, before every rank is known to be through."""
        return self.accelerator.no_sync(model) if isinstance(model, DistributedDataParallel) else nullcontext()

    def _reduce(self, model: nn.Module) -> None:
        """The mean of every gradient over ranks, as DDP takes it."""
        if not isinstance(model, DistributedDataParallel):
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for work in [torch.distributed.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()  # type: ignore[union-attr]
        torch._foreach_div_(gradients, self._world[1])

    def _halve(self, batch: list[Example], told: str) -> None:
        """Half the tokens of the largest microbatch of this step on any rank, but no less than the longest example."""
        world, used = self._world[1], 0
        costs = [cost(e, self.scorer.mode, self.scorer.closed) for e in batch]
        for r in range(world):
            share = range(r, len(batch), world)
            parts = self.scorer.microbatches([batch[i] for i in share])
            used = max([used, *(sum(costs[share[j]] for j in part) for part in parts)])
        if used <= max(costs):
            raise torch.OutOfMemoryError(told)
        halving = {"step": self.state.global_step + 1, "from": used, "to": max(used // 2, max(costs))}
        self.halvings.append(halving)
        for scorer in {id(s): s for s in (self.scorer, getattr(self.reference, "scorer", self.scorer))}.values():
            scorer.budget = halving["to"]
        self.tell(
            f"step {halving['step']}: out of memory ({told}). token_budget is {halving['to']:,} from now on, and the step is "
            "made again: no number depends on it"
        )

    def denominator(self, batch: Sequence[Example]) -> float:
        """What the summed loss of the whole batch is divided by. Log-probs are NaN here: it must not depend on them."""
        lengths = _lengths(batch)
        unscored = Completions(torch.full((int(lengths.sum()),), torch.nan, dtype=torch.float64), lengths)
        self.whole = self.objective.feedback.of(unscored, batch)
        return float(self.objective.size(self.whole).sum())

    def _learn_apart(
        self,
        model: nn.Module,
        batch: list[Example],
        share: list[int],
        reference: list[Tensor | None],
        unmatched: Unmatched,
        denominator: float,
    ) -> Tensor:
        """Rows do not depend on each other's policy log-probs: each microbatch is scored once and differentiated."""
        scale = self._world[1] / denominator
        total = torch.zeros((), device=self.args.device)
        for part, context in self._parts(model, batch):
            with context:
                examples = [batch[i] for i in part] or batch[:1]
                if isinstance(unmatched, _StillToRead):
                    found, others = self.scorer.score_with(examples, unmatched.examples, model)
                    scored = found[:, None]
                    unmatched = self._unmatched(unmatched.examples, [others], unmatched.reference)
                else:
                    scored = self._columns(examples, model)
                if not part:  # this rank has no row left: it only joins the others' gradient reduction
                    self.accelerator.backward(scored.sum() * 0)
                    continue
                y = self._completions(scored, examples, self._pick(reference, share, part, scored))
                view = self._view(y, examples, unmatched)
                losses = self.objective.loss(view)
                self._refuse_nonfinite(losses, examples)
                self.accelerator.backward(losses.sum() * scale)
                total = total + losses.detach().sum() * scale  # not in place: it takes the precision of the losses
                self._record(view, losses)
        return total

    def _learn_together(
        self,
        model: nn.Module,
        batch: list[Example],
        share: list[int],
        reference: list[Tensor | None],
        unmatched: Unmatched,
        denominator: float,
    ) -> Tensor:
        """Rows depend on each other: score all without a graph, differentiate the loss by the log-probs, and push those
        gradients through each microbatch. Exact, for one more forward pass."""
        assert not isinstance(unmatched, _StillToRead)
        parts = self._parts(model, batch)
        states: list[Any] = []
        mine: dict[int, tuple[Tensor, Tensor | None]] = {}
        with whole(self.scorer.model), self._agreed():
            for part, _ in parts:
                states.append(_rng_state())
                if not part:
                    continue
                examples = [batch[i] for i in part]
                with torch.no_grad():
                    rows = self._columns(examples, self.scorer.model).split(_token_counts(examples))
                for i, row in zip(part, rows, strict=True):
                    ref = reference[share.index(i)]
                    mine[i] = (row.cpu(), None if ref is None else ref.cpu())
        scored = self.gathered(mine, len(batch))
        leaf = torch.cat([a for a, _ in scored]).to(self.args.device).requires_grad_()
        refs = torch.cat([b for _, b in scored]).to(leaf.device) if scored[0][1] is not None else None
        y = self._completions(leaf, batch, refs)
        self.memory = self.objective.remember(self._view(y.detach(), batch, unmatched), self.memory)
        view = self._view(y, batch, unmatched)
        losses = self.objective.loss(view)
        self._refuse_nonfinite(losses, batch)
        (slope,) = torch.autograd.grad(losses.sum() / denominator, leaf)
        slopes = slope.split(_token_counts(batch))
        after = _rng_state()
        for (part, context), state in zip(parts, states, strict=True):
            _set_rng_state(state)
            with context:
                row = self._columns([batch[i] for i in part] or batch[:1], model)
                pushed = torch.cat([slopes[i] for i in part]) if part else torch.zeros_like(row)
                self.accelerator.backward((row * pushed).sum() * self._world[1])
        _set_rng_state(after)
        if self._world[0] == 0:  # every rank holds the whole batch here; it must be counted once
            self._record(view, losses)
        return losses.detach().sum() / denominator

    def _learn_beside(self, model: nn.Module) -> None:
        """The gradient of the text beside; that of the batch, which comes after it, is reduced over ranks with it."""
        batch = self.beside.batch(self.state.global_step)
        tokens = sum(_token_counts(batch))
        for part in self._cut(batch):
            with self._alone(model):
                examples = [batch[i] for i in part] or batch[:1]
                y = self._completions(self._columns(examples, model), examples, None)
                self._refuse_nonfinite(y.logp, examples)
                weight = self.beside.weight * self._world[1] / tokens if part else 0.0
                self.accelerator.backward(-y.logp.sum() * weight)
            if part:
                self.tally.add_ratio("ptx/nll", -y.logp.detach(), y.length)

    def _columns(self, examples: Sequence[Example], model: nn.Module, step: int | None = None) -> Tensor:
        """[N, 1 + extras] of one microbatch: log-probs first, then what else the objective declared."""
        if not self.extras:
            return self.scorer.score(examples, model)[0][:, None]
        if "score" in self.extras:  # of a reward model, which has no log-probs
            return self.scorer.score(examples, model)[0]
        distribution = noise = None
        if "token_kl" in self.extras:
            assert self.reference is not None
            distribution = self.reference.distribution(examples)
        if "rival" in self.extras:
            step = self.state.global_step if step is None else step
            noise = gumbel(examples, self.objective.rivals, 1_000_003 * self.args.seed + step).to(self.scorer.device)
        names = tuple(n for n in self.extras if n != "value")
        return self.scorer.columns(examples, Extras(names, distribution, noise, "value" in self.extras), model)

    def _completions(self, scored: Tensor, examples: Sequence[Example], ref: Tensor | None) -> Completions:
        extras = {name: scored[:, 1 + i] for i, name in enumerate(self.extras)}  # "value" sorts last, as its column is
        return Completions(scored[:, 0], _lengths(examples).to(scored.device), ref, extras)

    def _record(self, view: Any, losses: Tensor) -> None:
        self.tally.add(measure(self.objective, view))
        # the Trainer adds losses up in float32; the one that is logged is ours
        self.tally.add_ratio("loss", losses.detach(), self.objective.size(view))

    def _parts(self, model: nn.Module, batch: list[Example]) -> list[tuple[list[int], AbstractContextManager[Any]]]:
        """Microbatches of this rank's share (indices into the batch); only the last one reduces gradients over ranks."""
        parts = self._cut(batch)
        wait = [self._alone(model) for _ in parts[1:]]
        return list(zip(parts, [*wait, nullcontext()], strict=True))

    def _cut(self, batch: list[Example]) -> list[list[int]]:
        """This rank's microbatches; an empty one where it has no row but must take part in what the others do."""
        rank, world = self._world
        each = []
        for r in range(world):
            share = range(r, len(batch), world)
            each.append([[share[j] for j in part] for part in self.scorer.microbatches([batch[i] for i in share])])
        mine = each[rank] or [[]]
        if in_step(self.scorer.model):
            mine += [[] for _ in range(max(map(len, each)) - len(mine))]
        return mine

    def _alone(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients are not reduced over ranks yet; those of shards always are: they would be as large as the model."""
        if self.is_deepspeed_enabled:
            return zero.not_the_last(self.accelerator)
        reduced = self.alone or is_sharded(self.scorer.model)
        return nullcontext() if reduced else self.accelerator.no_sync(model)

    def _view(
        self, y: Completions, examples: Sequence[Example], unmatched: Completions | None, learning: bool = True
    ) -> Any:
        around = self.whole if learning else None
        more: dict[str, Any] = {"memory": self.memory, "around": around, "learning": learning}
        if unmatched is not None:
            more["unmatched"] = unmatched
        return self.objective.feedback.of(y, examples, **more)

    def _reference_logps(self, examples: Sequence[Example]) -> list[Tensor | None]:
        if "reference" not in self.objective.needs or not examples:
            return [None] * len(examples)
        known = [e.columns.get("reference") for e in examples]  # scored when the answers were sampled
        asked = [e for e, logps in zip(examples, known, strict=True) if logps is None]
        if not asked:
            return known
        assert self.reference is not None
        found = iter(self.reference.logps(asked).split(_token_counts(asked)))
        return [next(found) if logps is None else logps for logps in known]

    @staticmethod
    def _pick(reference: list[Tensor | None], share: list[int], part: list[int], like: Tensor) -> Tensor | None:
        where = {i: j for j, i in enumerate(share)}
        rows = [reference[where[i]] for i in part]
        return torch.cat(rows).to(like) if rows and rows[0] is not None else None  # type: ignore[arg-type]

    def _constants(self, batch: Sequence[Example], share: list[int]) -> tuple[list[Tensor | None], Unmatched]:
        """What this step does not learn: the reference's log-probs of this rank's rows, and the whole batch's completions,
        each after another row's prompt: scored by all ranks together, or left to the pass that learns."""
        asked = "mismatched" in self.objective.needs
        pairs = mismatch(batch, self.context) if asked else []
        mine = self.share(len(pairs))
        others = [pairs[i] for i in mine]
        with self._agreed():
            once = self._reads_once(batch, pairs)
            policy = () if once or not others else self.scorer.score_all(others)[0].split(_token_counts(others))
            refs = self._reference_logps([*(batch[i] for i in share), *others])  # together: a prompt is read once
        n = len(share)
        if not asked or once:
            return refs[:n], _StillToRead(pairs, refs[n:]) if once else None
        scored = self.gathered({i: (a.cpu(), b) for i, a, b in zip(mine, policy, refs[n:], strict=True)}, len(pairs))
        return refs[:n], self._unmatched(pairs, [a for a, _ in scored], [b for _, b in scored])

    def _reads_once(self, batch: Sequence[Example], pairs: Sequence[Example]) -> bool:
        """Whether the mismatched completions go on from the prompts of the pass that learns: where that is one pass."""
        costs = [cost(e, self.scorer.mode) for e in batch] + _token_counts(pairs)
        return (
            self.alone
            and self.scorer.mode == "shared"
            and not (self.extras or self.objective.coupled or self.objective.has_memory())
            and 0 < len(pairs) == len(batch)
            and all(len(e.completions) == 1 and e.completions[0] for e in pairs)
            and sum(costs) <= self.scorer.budget
        )

    def _unmatched(
        self, pairs: Sequence[Example], policy: Sequence[Tensor], refs: Sequence[Tensor | None]
    ) -> Completions:
        device = self.args.device
        join = lambda rows: torch.cat([torch.zeros(0), *(r.cpu() for r in rows)]).to(device)  # noqa: E731
        known = join(refs) if refs and refs[0] is not None else None
        return Completions(join(policy), _lengths(pairs).to(device), known if pairs else join([]))

    # --- what stops a run -----------------------------------------------------------------------------------------

    def _refuse_nonfinite(self, losses: Tensor, examples: Sequence[Example]) -> None:
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        if bad:
            self._stop(f"the loss is {losses[bad[0]].item()}", [examples[i] for i in bad if i < len(examples)])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wraps it
        if self.accelerator.scaler is None and divides(optimizer):
            return clip(optimizer, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = zero.step(self.accelerator) if self.is_deepspeed_enabled else super()._get_grad_norm(model, grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            self._stop(f"the gradient norm is {float(norm)} although every loss is finite", self.current)
        return norm

    def _stop(self, what: str, rows: Sequence[Example]) -> None:
        step = self.state.global_step + 1
        file = Path(self.args.output_dir).parent / f"nonfinite-step-{step}.json"
        told = [{"origin": str(e.record.origin), "record": e.record.to_json(), "prompt": e.prompt, "completions": e.completions} for e in rows]  # fmt: skip  # noqa: E501
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"step": step, "what": what, "rows": told}, ensure_ascii=False))
        where = ", ".join(str(e.record.origin) for e in rows[:5]) or "no single row"
        raise CheckFailed(
            f"step {step}: {what} ({where}). Nothing was updated in this step. The rows and their tokens are in {file}. "
            "A smaller learning_rate, float32 precision, or leaving these rows out are the usual remedies."
        )

    # --- evaluation and logs -----------------------------------------------------------------------------------------

    def held_out_rows(self, examples: Sequence[Example] | None = None) -> list[dict[str, tuple[float, float]]]:
        """Per example: name -> (sum, count) of every logged quantity, and ``loss``; dropout off, memory untouched."""
        examples = self.held_out_examples if examples is None else list(examples)
        size = self.batches.batch_size
        starts = list(range(0, len(examples), size))
        mine: dict[int, list[dict[str, tuple[float, float]]]] = {}
        with whole(self.scorer.model):
            for k in self.share(len(starts)):
                batch = examples[starts[k] : starts[k] + size]
                mine[k] = self._rows_of(batch)
        return [row for rows in self.gathered(mine, len(starts)) for row in rows]

    def scored(self, batch: Sequence[Example]) -> Completions:
        """These examples as the objective would see them: dropout off, no graph, extras and reference where declared."""
        with evaluating(self.scorer.model):
            parts = [[batch[i] for i in part] for part in self.scorer.microbatches(batch)]
            scored = torch.cat([self._columns(part, self.scorer.model, step=-1) for part in parts])
        refs = self._reference_logps(batch)
        return self._completions(scored, batch, torch.cat(refs).to(scored) if refs[0] is not None else None)  # type: ignore[arg-type]

    def _rows_of(self, batch: Sequence[Example]) -> list[dict[str, tuple[float, float]]]:
        y = self.scored(batch)
        unmatched = None
        if "mismatched" in self.objective.needs:
            pairs = mismatch(batch, self.context)
            policy = self.scorer.score_all(pairs)[0].split(_token_counts(pairs))
            unmatched = self._unmatched(pairs, policy, self._reference_logps(pairs))
        rows, first = [], 0
        for e in batch:
            k = len(e.completions)
            view = self._view(
                y.take(torch.arange(first, first + k, device=self.scorer.device)), [e], unmatched, learning=False
            )
            tally = Tally()
            tally.add(measure(self.objective, view))
            tally.add_ratio("loss", self.objective.loss(view), self.objective.size(view))
            rows.append(tally.sums)
            first += k
        return rows

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        tally = Tally()
        tally.merge(self.held_out_rows())  # type: ignore[arg-type]
        metrics = {f"{metric_key_prefix}/{k}": v for k, v in tally.means().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self._world[1] > 1:
                self.tally.merge(gather_object([self.tally.sums]))
            logs.update(self.tally.means())
            self.tally = Tally()
            logs.update(self.batches.figures)
        super().log(logs, start_time)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with warnings.catch_warnings():
            # peft says that it saves a vocabulary that has grown, which is right
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            super()._save(output_dir, state_dict)

    def _save_ours(self, folder: Path) -> None:
        """What the Trainer knows nothing of."""
        critic = critic_of(base_model(self.model))
        if critic is not None:  # peft would leave it out
            save_file({k: v.detach().contiguous().cpu() for k, v in critic.named_parameters()}, folder / CRITIC_FILE)
        if isinstance(self.reference, FrozenCopy) and self.reference.moved:
            save_file({k: v.contiguous().cpu() for k, v in self.reference.weights().items()}, folder / REFERENCE_FILE)
        if self.memory:
            save_file({k: v.contiguous().cpu() for k, v in self.memory.items()}, folder / MEMORY_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, mark as complete, only then delete old ones: at every moment a complete checkpoint is there."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = keep
        folder = Path(self.args.output_dir)
        here = folder / f"checkpoint-{self.state.global_step}"
        with whole(self.scorer.model):
            if self.args.should_save:
                self._save_ours(here)
        self.accelerator.wait_for_everyone()  # every process has written its random state
        if self.args.should_save:
            done = {"step": self.state.global_step, "tokens_seen": self.tokens_seen}
            (here / COMPLETE_FILE).write_text(json.dumps(done))
            for old in checkpoints(folder)[: -keep if keep else 0]:
                (old / COMPLETE_FILE).unlink(missing_ok=True)
                shutil.rmtree(old)

    def train(self, resume_from_checkpoint: str | bool | None = None, **more: Any) -> TrainOutput:
        """As the Trainer's; a checkpoint at the last step is only loaded (the Trainer would take one more step)."""
        if not isinstance(resume_from_checkpoint, str):
            return super().train(resume_from_checkpoint, **more)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
        steps = self.args.max_steps if self.args.max_steps > 0 else self.args.num_train_epochs * len(self.batches)
        if state.global_step < steps:
            return super().train(resume_from_checkpoint, **more)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        return TrainOutput(state.global_step, 0.0, {})

    def forget(self) -> None:
        """Let go of what only learning needs; there is none after this."""
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_ours(Path(resume_from_checkpoint))

    def _load_ours(self, folder: Path) -> None:
        self.tokens_seen = json.loads((folder / COMPLETE_FILE).read_text())["tokens_seen"]
        critic = critic_of(base_model(self.model))
        if critic is not None and engine_of(self.model) is None:
            load_whole(critic, load_file(folder / CRITIC_FILE))
        if (folder / REFERENCE_FILE).exists() and isinstance(self.reference, FrozenCopy):
            kept, self.reference.moved = load_file(folder / REFERENCE_FILE), True
            for name, weight in self.reference.weights().items():
                weight.copy_(kept[name])
        if (folder / MEMORY_FILE).exists():
            self.memory = {k: v.to(self.args.device) for k, v in load_file(folder / MEMORY_FILE).items()}

    # --- the reference cache ------------------------------------------------------------------------------------------

    def to_be_scored(self, epochs: int, max_steps: int = -1) -> list[Example]:
        """Everything that the reference will be asked for in this run, mismatched completions of every batch included."""
        wanted, held_out, size = (
            [*self.examples, *self.held_out_examples],
            self.held_out_examples,
            self.batches.batch_size,
        )
        if "mismatched" in self.objective.needs:
            if max_steps > 0:  # may take more epochs than were asked for
                epochs = math.ceil(max_steps / len(self.batches))
            plan = [b for e in range(max(epochs, 1)) for b in self.batches.epoch(e)]
            plan = plan if max_steps <= 0 else plan[:max_steps]
            batches = [[self.examples[i] for i in b] for b in plan]
            batches += [held_out[a : a + size] for a in range(0, len(held_out), size)]
            wanted += [m for b in batches for m in mismatch(b, self.context)]
        return wanted

    def fill_cache(self, cached: Cached, live: Reference, epochs: int, max_steps: int = -1) -> int:
        """Score with the live reference what the cache lacks; returns how many completions that were."""
        return cached.fill(self.to_be_scored(epochs, max_steps), live)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in the folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that was written to its end; :class:`CheckpointError` where there is none."""
    found = checkpoints(folder)
    complete = [p for p in found if (p / COMPLETE_FILE).exists()]
    if not complete:
        broken = f" {len(found)} incomplete one(s) there: {', '.join(p.name for p in found)}." if found else ""
        raise CheckpointError(
            f"{folder} has no complete checkpoint to resume from.{broken} Start again with another "
            "output; save_every says how often a checkpoint is written."
        )
    return complete[-1]


def _lengths(examples: Sequence[Example]) -> Tensor:
    """[B] tokens of every completion."""
    return torch.tensor([len(c) for e in examples for c in e.completions], dtype=torch.long)


def _token_counts(examples: Sequence[Example]) -> list[int]:
    """Completion tokens of every example."""
    return [sum(len(c) for c in e.completions) for e in examples]


def _rng_state() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _set_rng_state(state: tuple[Tensor, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
