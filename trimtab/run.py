"""One run, from configuration to report: the folder list of the README again, in code."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import TrainingArguments, set_seed

from trimtab import __version__
from trimtab.config import RunConfig
from trimtab.errors import CheckpointError, ConfigError, ModelError, TrimtabError
from trimtab.feedback.read import read
from trimtab.feedback.records import Demonstration
from trimtab.feedback.shift import prompt_text
from trimtab.judges.named import named_judge
from trimtab.judges.rule import RuleJudge
from trimtab.launch import check_launch
from trimtab.logprobs.attention import KERNEL
from trimtab.logprobs.cache import LogpCache, weights_hash
from trimtab.logprobs.critic import add_critic
from trimtab.logprobs.hidden import mean_hidden
from trimtab.logprobs.pages import give_back
from trimtab.logprobs.products import bfloat16_is_quicker
from trimtab.logprobs.reference import (
    AdapterOff,
    Cached,
    FrozenCopy,
    Reference,
    adapter_on,
    sequence_tolerance,
)
from trimtab.logprobs.score import LayoutChoice, Scorer, base_model, choose_layout, install, reward_head
from trimtab.logprobs.scored import Solutions
from trimtab.logprobs.sharded import whole
from trimtab.models import (
    FIRST_WINS,
    REWARD,
    STEP_RIGHT,
    check_weights,
    grow_vocabulary,
    home,
    load_model,
    load_reward_model,
)
from trimtab.online.rounds import Plan, Rounds
from trimtab.online.served import Served
from trimtab.online.watch import FILE as WATCHED
from trimtab.online.watch import Watch, account, in_words, looks
from trimtab.prepare import Prepared, make_template, match_prompts, prepare, prepare_prompts
from trimtab.processes import together
from trimtab.report import Interval, write_report
from trimtab.report.held_out import held_out_intervals
from trimtab.report.text import visible
from trimtab.samples import Probe, Reward
from trimtab.tokens.batch import Example, completion_keys
from trimtab.tokens.template import Template, tokenize
from trimtab.update.beside import Beside
from trimtab.update.callbacks import MetricsFile, MovingReference, Progress, Shrink, peak_memory_gb
from trimtab.update.checks import Check, policy_equals_reference, scores_stand_alone
from trimtab.update.trainer import Update, last_checkpoint, out_of_memory
from trimtab.update.weights import nf4, no_dropout, save_weights, with_adapter


def train(
    config: RunConfig,
    *,
    command: str = "",
    console: Console | None = None,
    reward: Reward | None = None,
    test_prompts: Sequence[str] = (),
) -> Path:
    """Align a model as configured. Returns the run folder, which holds the model, the run card and the report.

    Args:
        command: what the user typed, for the reproduction block.
        console: where to print; None prints nothing.
        reward: the true reward of an answer, where the experiment knows it; measured before and after on samples.
        test_prompts: prompts to sample from instead of held-out ones.
    """
    check_launch(config)
    with together() as peers:
        run = _Run(config, command, console or Console(quiet=True))
        if peers:
            peers.on_loss = run.lost
        try:
            run.go(reward, test_prompts)
        except BaseException as e:
            run.abandon(e)
            if isinstance(e, Exception) and disk_full(e):
                raise CheckpointError(run.no_room(str(getattr(e, "filename", None) or run.folder))) from e
            if out_of_memory(e):
                raise ModelError(
                    f"out of memory ({(str(e) or type(e).__name__).splitlines()[0]}). Lower token_budget (now "
                    f"{run.card.get('engine', {}).get('token_budget', config.token_budget)}; no number depends on it), or pass "
                    "gradient_checkpointing: true, finetune: lora, or a smaller max_length. `trimtab plan` with the same "
                    "options says what fits."
                ) from e
            raise
    return run.folder


class _Run:
    def __init__(self, config: RunConfig, command: str, console: Console) -> None:
        self.config, self.console = config, console
        self.main = PartialState().is_main_process
        if not self.main:
            self.console = Console(quiet=True)
        if config.threads:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)
        self.started = time.perf_counter()
        self.objective = config.objective()
        self.precision = resolve_precision(config.precision, config.weights)
        # the first process chooses, and nobody writes before all have looked
        (folder,) = broadcast_object_list([config.output or str(next_folder(config))])
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"output: {self.folder} is a file. Name a folder, which will be made.")
        previous = self._previous_card()
        PartialState().wait_for_everyone()
        self.began = False  # whether there is anything worth keeping
        self.folder.mkdir(parents=True, exist_ok=True)
        self.card: dict[str, Any] = {
            "trimtab": __version__,
            "command": command,
            "method": config.method,
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config.flat(),
            "versions": versions(),
            "machine": machine(),
            "seed": config.seed,
            "checks": [],
            "explain": {
                "title": type(self.objective).__name__,
                "equation": self.objective.equation(),
                "paper": self.objective.paper,
            },
            "evaluation": previous.get("evaluation", {}),
            "answers_before": previous.get("answers_before", []),
            "resumed": bool(previous),
        }
        self.previous = previous

    def say(self, text: str) -> None:
        self.console.print(Text(visible(text)), soft_wrap=True)

    # --- the stages, in order ---------------------------------------------------------------------------------------

    def go(self, reward: Reward | None, test_prompts: Sequence[str]) -> None:
        config = self.config
        template = make_template(config)
        self.judge = named_judge(config.judge) if config.judge else None
        test_judge = named_judge(config.test_judge) if config.test_judge else None
        data = (prepare_prompts if self.judge else prepare)(config, self.objective, template)
        if data.objective != self.objective:
            self.objective = data.objective
            self.card["settled"] = dataclasses.asdict(self.objective)
        self._tell_data(data, template)
        model, choice = self._model(data, template)
        if config.match_prompts == "policy":
            self._match_prompts(data, model)
        scorer = Scorer(model, choice.mode, config.token_budget)
        trainer = self._trainer(model, scorer, data, template)
        trainer.reference = self._reference(model, scorer, trainer)
        rewards = "score" in self.objective.needs  # a reward model answers nothing
        count, test_prompts = (0, ()) if rewards else (config.samples, test_prompts)
        probe = Probe(template, data, count, config.sample_tokens, config.seed, self.precision, test_prompts)
        if isinstance(self.judge, RuleJudge):
            reward = self.judge.call
        if self.judge and test_judge:
            among, folder = [*data.held_out, *data.train], self.folder / "rounds"
            trainer.rounds.watch = Watch(probe, among, self.judge, test_judge, folder, config.watch_every, config.model)
        if not self.previous:
            self._check(trainer, data)
            self.card["evaluation"]["before"] = self._evaluate(trainer, quiet="reference" in self.objective.needs)
            self.card["answers_before"] = probe.answer(model)
        self.save_card()
        give_back()
        self._train(trainer)
        trainer.forget()
        give_back()
        self._save_weights(model, template)
        if rewards:
            self._check_saved(trainer, data)
        self.card["evaluation"]["after"] = self._evaluate(trainer)
        give_back()
        self._compare_samples(probe, trainer, reward)
        self._tell_watch(trainer)
        if self.card["status"] == "running":
            self.card["status"] = "finished"
        self.card["seconds"] = round(time.perf_counter() - self.started, 1)
        self.card["engine"]["peak_memory_gb"] = round(peak_memory_gb(), 2)
        self.save_card()
        if self.main:
            report = write_report(self.folder)
            self.say(f"report: {report}")

    def _tell_data(self, data: Prepared, template: Template) -> None:
        card = self.card["data"] = data.card(self.config.data)
        self.card["fingerprints"] = {"data": data.reading.sha256, "code": code_hash(), "template": template.fingerprint}
        self._refuse_other_run()
        if self.judge and self.previous:
            card["notes"] = self.previous["data"]["notes"]  # those of the first round, too
        self.save_card()
        if self.main:
            flat = self.config.flat() | {"resume": False}
            (self.folder / "config.yaml").write_text(yaml.safe_dump(flat, sort_keys=False, allow_unicode=True))
        say = self.say
        say(
            f"{card['file']}: {card['shape']}; {card['rows']:,} rows -> {card['train']:,} to train on, "
            f"{card['held_out']:,} held out"
        )
        for reason, n in card["dropped"].items():
            say(f"  left out {n:,}: {reason}")
        for told in (*card["conversions"], *card["notes"], *(f"{n} × {r}" for r, n in card["repaired"].items())):
            say(f"  {told}")
        tokens = card["tokens"]
        sizes = ", ".join(
            f"{s} {v['mean']:.0f} (max {v['max']:.0f})"
            for s, v in tokens.items()
            if isinstance(v, dict) and "mean" in v
        )
        say(
            f"  tokens: {sizes}; {tokens['truncated_rows']} rows cut, end-of-sequence lost in {sum(tokens['eos_lost'].values())}"
        )

    def _tell_first_round(self, notes: Sequence[str]) -> None:
        """What the method says about labels that only exist now; a run that is resumed in that round hears it again."""
        kept = self.card["data"]["notes"]
        new = [note for note in (f"round 1: {n}" for n in notes) if note not in kept]
        kept += new
        for note in new:
            self.say(f"  {note}")
        self.save_card()

    def _match_prompts(self, data: Prepared, model: nn.Module) -> None:
        """Prompts as the policy sees them before it learns anything."""
        ids = {prompt_text(e.record.prompt): e.prompt for e in (*data.train, *data.held_out)}
        budget = self.config.token_budget
        match_prompts(self.config, data, lambda texts: mean_hidden(model, [ids[t] for t in texts], budget).numpy())
        self.card["data"] = data.card(self.config.data)
        self.say(f"  {data.notes[-1]}")

    def _model(self, data: Prepared, template: Template) -> tuple[nn.Module, LayoutChoice]:
        config = self.config
        dtype = torch.float64 if self.precision == torch.float64 else torch.float32
        dtype = dtype if config.weights == "float32" else torch.bfloat16
        model: nn.Module
        if "score" in self.objective.needs:
            number = FIRST_WINS if self.objective.jointly else REWARD
            number = STEP_RIGHT if self.objective.feedback is Solutions else number
            model = load_reward_model(config.model, template.tokenizer, dtype, config.seed, template.eos_ids, number)
        else:
            model = load_model(
                config.model, dtype=dtype, **({"quantization_config": nf4()} if config.weights == "nf4" else {})
            )
        if (head := reward_head(model)) is not None and config.weights != "float32":
            head.float()  # rounded to 8 bits, two good answers would often have the same reward
        check_weights(model)
        no_dropout(model)
        self.card["fingerprints"]["model"] = weights_hash(model)
        self._refuse_other_run()
        self._refuse_small_disk(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if config.weights != "nf4":  # bitsandbytes has placed it
            model.to(device)
        control = template.tokenizer.convert_tokens_to_ids(list(self.objective.control_tokens))
        if control:
            grow_vocabulary(base_model(model), len(template.tokenizer))
        choice = choose_layout(model, shortest(with_answers(data.train)), config.layout)
        if config.finetune == "lora":
            set_seed(config.seed)
            try:
                model = with_adapter(model, config.lora_rank, config.lora_alpha, config.lora_targets, control)
            except ValueError as e:
                linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
                raise ConfigError(
                    f'lora_targets is "{config.lora_targets}": {str(e).splitlines()[0]} Linear modules of this model: '
                    f"{', '.join(sorted(linear))}. Name some of them, or all-linear."
                ) from e
        if "value" in self.objective.needs:
            add_critic(base_model(model), self.objective.critic, config.seed)
        install(model, self.precision, choice.mode)
        self.card["engine"] = {
            "layout": choice.mode,
            "precision": str(self.precision).removeprefix("torch."),
            "weights": config.weights,
            "fallback": choice.fallback,
            "threads": torch.get_num_threads(),
        }
        self.card["checks"].append(Check("layouts agree with the plain forward pass", True, choice.detail).to_json())
        self.say(f"model {config.model} ({config.finetune}, {self.card['engine']['precision']}, {choice.mode})")
        if choice.fallback:
            self.say(f"  slower layout: {choice.fallback}")
        return model, choice

    def _trainer(self, model: nn.Module, scorer: Scorer, data: Prepared, template: Template) -> Update:
        config = self.config
        progress = Progress(self.console)
        rounds = None
        if self.judge:
            served = None
            if config.sampler:
                served = Served(config.sampler, config.sampler_model or config.model, config.sampler_reload)
            folder = self.folder / "rounds"
            rounds = Rounds(data.train, plan(config), self.judge, template, folder, self.precision, served)
            rounds.tell = self._tell_first_round
        trainer = Update(
            model,
            self.objective,
            scorer,
            None,
            () if self.judge else data.train,
            config.batch_size,
            training_arguments(config, self.folder, self.main),
            held_out=() if self.judge else data.held_out,
            rounds=rounds,
            beside=self._beside(template),
            callbacks=[progress, *([Shrink(config.l1)] if config.l1 else [])],
            processing_class=template.tokenizer,
        )
        # the metrics file is written before the progress line is: it adds the speed
        trainer.callback_handler.callbacks.insert(
            0, MetricsFile(self.folder / "metrics.jsonl", lambda: trainer.tokens_seen)
        )
        self.progress = progress
        trainer.tell = self.say
        return trainer

    def _beside(self, template: Template) -> Beside | None:
        """Demonstrations of another file, learned in the same steps."""
        config = self.config
        if config.ptx_data is None:
            return None
        records = read(config.ptx_data).records
        if any(not isinstance(r, Demonstration) for r in records):
            raise ConfigError(
                f"ptx_data: {config.ptx_data} holds {type(records[0]).__name__.lower()} records; expected demonstrations "
                "(`trimtab data convert FILE --to demonstration`)."
            )
        examples, report = tokenize(records, template, max_length=config.max_length)
        self.say(f"beside: {len(examples):,} demonstrations of {config.ptx_data}, weight {config.ptx_weight:g}")
        for reason, n in report.dropped.items():
            self.say(f"  left out {n:,}: {reason}")
        self.card["beside"] = {"file": config.ptx_data, "examples": len(examples), "dropped": dict(report.dropped)}
        return Beside(examples, config.ptx_weight, config.ptx_batch_size, config.seed)

    def _reference(self, model: nn.Module, scorer: Scorer, trainer: Update) -> Reference | None:
        if "reference" not in self.objective.needs:
            self.card["reference"] = None
            return None
        config, fingerprint = self.config, self.card["fingerprints"]["model"]
        identity = f"{config.model} (weights {fingerprint[:12]})"
        reference: Reference
        match how := reference_kind(config):
            case "adapter":
                reference = AdapterOff(scorer, identity)
            case "copy":
                reference = FrozenCopy(model, scorer, self.precision, identity)
                if config.reference_every is not None:
                    trainer.add_callback(MovingReference(reference, config.reference_every, config.reference_mix))
                    reference.identity += (
                        f", renewed every {config.reference_every} steps (mix {config.reference_mix:g})"
                    )
            case "cache":
                reference = self._cached(model, scorer, trainer, identity, fingerprint)
            case _:
                raise AssertionError(how)
        self.card["reference"] = reference.identity
        self.say(f"reference: {reference.identity}")
        return reference

    def _cached(self, model: nn.Module, scorer: Scorer, trainer: Update, identity: str, fingerprint: str) -> Cached:
        engine = self.card["engine"]
        folder = Path(self.config.cache) if self.config.cache else home() / "reference"
        name = f"{fingerprint}-{engine['precision']}-{engine['layout']}-k{KERNEL}"
        if not self.main:
            PartialState().wait_for_everyone()
        cached = Cached(LogpCache(folder / name), identity)
        live = AdapterOff(scorer, identity)  # at this point the policy still is the reference
        wanted = trainer.to_be_scored(int(np.ceil(self.config.epochs)), self.config.max_steps)
        known = [e for e in wanted[:64] if _all_cached(cached, e)]
        if known:
            tolerance = sequence_tolerance(self.precision)
            told = cached.spot_check(known, live, tolerance, self.config.seed)
            self.card["checks"].append(Check("reference cache", True, told).to_json())
        asked, began = {k for e in wanted for k in completion_keys(e)}, time.perf_counter()
        added = cached.fill(wanted, live) if self.main else 0
        if self.main:
            PartialState().wait_for_everyone()
        self.card["engine"]["reference_cache"] = {
            "scored": added,
            "read": len(asked) - added,
            "seconds": round(time.perf_counter() - began, 1),
            "entries": len(cached.cache),
        }
        return cached

    def _check(self, trainer: Update, data: Prepared) -> None:
        if "reference" in self.objective.needs:
            check = policy_equals_reference(trainer, shortest(with_answers(data.train), 8), self.precision)
            self.card["checks"].append(check.to_json())
            self.say(f"check: {check.name}: {check.detail}")

    def _evaluate(self, trainer: Update, quiet: bool = False) -> dict[str, Any]:
        if not trainer.held_out_examples:
            return {}
        rows = trainer.held_out_rows()
        found = held_out_intervals(rows, [e.prompt for e in trainer.held_out_examples], self.config.seed)
        for name in ("rewards/accuracies", "rewards/auc", "accuracies/three_way", "nll"):
            if name in found and not quiet:
                self.say(f"held out: {name} {Interval.from_json(found[name])}")
        return found

    def _train(self, trainer: Update) -> None:
        resume = None
        if self.config.resume:
            resume = str(last_checkpoint(self.folder / "checkpoints"))
            self.say(f"resuming from {resume}")
        self.began = True
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            if not trainer.alone:  # the others are at another place of the step: together they can only end
                raise
            adapter_on(trainer.scorer.model)
            self.card["status"] = "interrupted"
            self.say("interrupted: saving the model and writing the report")
        except TrimtabError:
            raise
        except Exception as e:
            if disk_full(e):
                raise CheckpointError(self.no_room(f"a checkpoint of step {trainer.state.global_step}")) from e
            if resume and trainer.state.global_step <= _step(resume) and not out_of_memory(e):
                raise CheckpointError(
                    f"{resume} is damaged ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}). Delete that "
                    "folder to resume from an earlier checkpoint, or start again with another output."
                ) from e
            raise
        finally:
            self.progress.stop()
            if trainer.halvings:
                self.card["engine"] |= {"token_budget": trainer.scorer.budget, "out_of_memory": trainer.halvings}
        self.card["steps"] = trainer.state.global_step

    def _save_weights(self, model: nn.Module, template: Template) -> None:
        """A folder that plain ``AutoModelForCausalLM.from_pretrained`` loads; the adapter, too, where there is one."""
        try:
            save_weights(model, self.folder, self.main)
            if self.main:
                template.tokenizer.save_pretrained(self.folder)
        except Exception as e:
            if not disk_full(e):
                raise
            raise CheckpointError(self.no_room(f"the model of {self.folder}")) from e

    def _check_saved(self, trainer: Update, data: Prepared) -> None:
        """Whether a score of the saved reward model depends on what stands beside the text."""
        pool = data.held_out or data.train
        examples = [*shortest(pool, 7), max(pool, key=lambda e: e.tokens)]
        scores = trainer.scorer.completions(examples).score
        if not self.main:
            return
        check = scores_stand_alone(self.folder, examples, scores, self.precision)
        self.card["checks"].append(check.to_json())
        self.say(f"check: {check.name}: {check.detail}")

    def _compare_samples(self, probe: Probe, trainer: Update, reward: Reward | None) -> None:
        if not probe.prompts:
            return
        before = [tuple(ids) for ids in self.card["answers_before"]]
        after = probe.answer(trainer.scorer.model)
        reward = reward if self.main else None  # which may be the judge: one process asks
        rows, self.card["samples"] = probe.compare(before, after, reward)
        self.card["samples"]["kl"] = probe.kl(after, trainer.scorer, self.config.model)
        if self.main:
            with (self.folder / "samples.jsonl").open("w") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _tell_watch(self, trainer: Update) -> None:
        """What train and test judge said, the policy at the end included."""
        if not (self.judge and trainer.rounds.watch):
            return
        folder = self.folder / "rounds"
        if self.card["status"] == "running":  # of a run that was interrupted in a round there is no such end
            with whole(trainer.scorer.model):
                trainer.rounds.watch.look(self.config.rounds, trainer, folder / WATCHED)
        if seen := looks(folder):
            self.card["watch"] = account(seen)
            self.say(in_words(seen))

    # --- the run folder -----------------------------------------------------------------------------------------------

    def abandon(self, error: BaseException) -> None:
        """A run that stops: what was trained is kept and marked, and a run that never began leaves no folder behind."""
        if not self.main or self.card["status"] != "running":
            return
        if self.began:
            self.card["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.card["error"] = str(error) or type(error).__name__
            with suppress(OSError):
                self.save_card()
        elif self.previous:  # it could not be resumed: it stays the run that it was
            self.card = self.previous
            self.save_card()
        else:
            for name in ("run.json", ".run.json", "config.yaml"):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in there
                self.folder.rmdir()

    def no_room(self, what: str) -> str:
        """The message for a full disk: what could not be written, what is kept, what to do."""
        free = shutil.disk_usage(self.folder).free / 1e6
        told = f"the disk is full: {what} could not be written ({free:,.1f} MB are free)"
        return f"{told}. Free space, then {self._go_on()}."

    def lost(self, text: str) -> str:
        """Another process of this run is gone: what is trained is kept and marked. Returns what to do."""
        if self.main:
            self.card |= {"status": "failed", "error": text}
            self.save_card()
        return f"To have the rest of it, {self._go_on()}."

    def _go_on(self) -> str:
        try:
            last = last_checkpoint(self.folder / "checkpoints").name
            return f"go on from {last} with --resume --output {self.folder}"
        except CheckpointError:
            return f"remove {self.folder} and start again; with save_every a run can go on from a checkpoint"

    def _refuse_small_disk(self, model: nn.Module) -> None:
        """The end of a long run is the wrong time to learn that the model does not fit."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        kept = 3 * self.config.keep_checkpoints if self.config.save_every and self.config.finetune == "full" else 0
        free = shutil.disk_usage(self.folder).free
        if free < size * (1 + kept):
            raise CheckpointError(
                f"the disk of {self.folder} has {free / 1e6:,.1f} MB free, and this run will write about "
                f"{size * (1 + kept) / 1e6:,.1f} MB (the model{', and checkpoints with the optimizer' if kept else ''}). "
                "Free space, or choose another output."
            )

    def save_card(self) -> None:
        """Write ``run.json`` whole or not at all."""
        if self.main:
            temporary = self.folder / ".run.json"
            temporary.write_text(json.dumps(self.card, indent=1, ensure_ascii=False, default=str))
            temporary.replace(self.folder / "run.json")

    def _previous_card(self) -> dict[str, Any]:
        file = self.folder / "run.json"
        if not self.config.resume:
            if file.exists():
                there = sorted(p.name for p in (self.folder / "checkpoints").glob("checkpoint-*"))
                resume = "pass resume to go on from its last checkpoint" if there else "remove that folder"
                raise CheckpointError(f"{self.folder} already holds a run. Choose another output, or {resume}.")
            return {}
        last_checkpoint(self.folder / "checkpoints")
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"{self.folder} cannot be resumed: its run.json, which says what was run, is missing or damaged. Start "
                "again with another output."
            ) from e

    def _refuse_other_run(self) -> None:
        """A checkpoint is continued with the options and the data it was made with, or not at all."""
        if not self.previous:
            return
        free = {"resume", "report_to", "threads", "log_every", "keep_checkpoints", "output", "token_budget"}
        if self.config.sampler and self.previous["config"].get("sampler"):  # a server that was started again
            free |= {"sampler", "sampler_model", "sampler_reload"}
        old, new = self.previous["config"], json.loads(json.dumps(self.card["config"]))
        changed = [
            f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new} - free) if old.get(k) != new.get(k)
        ]
        prints, files = (
            self.previous.get("fingerprints", {}),
            {"data": "the data file", "template": "the chat template"},
        )
        for name, told in (files | {"model": "the model it started from"}).items():
            if name in self.card["fingerprints"] and prints.get(name) != self.card["fingerprints"][name]:
                changed.append(f"the content of {told}")
        if changed:
            raise CheckpointError(
                f"{self.folder} cannot be resumed: changed since it started: {'; '.join(changed)}. Resume with what it "
                f"started with ({self.folder / 'config.yaml'}), or start again with another output."
            )


# --- small decisions ------------------------------------------------------------------------------------------------------


def disk_full(error: BaseException) -> bool:
    """Whether this error says that there is no room, in the words of the system, of safetensors or of torch.save."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return "No space left on device" in text or "PytorchStreamWriter failed writing" in text or "unexpected pos" in text


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def resolve_precision(name: str, weights: str = "float32") -> torch.dtype:
    """``auto`` is bfloat16 where the hardware is quicker at it or the weights are held in no more, else float32."""
    if weights != "float32":
        return torch.bfloat16
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if bfloat16_is_quicker() else torch.float32


def reference_kind(config: RunConfig) -> str:
    """Where reference log-probs come from in this run: adapter, copy or cache."""
    if config.reference != "auto":
        return config.reference
    how = "copy" if "token_kl" in config.objective().needs else "cache"
    how = "adapter" if config.finetune == "lora" else how
    return "copy" if config.reference_every is not None or (config.judge and how == "cache") else how


def training_arguments(config: RunConfig, folder: Path, main: bool) -> TrainingArguments:
    """The Trainer's own arguments for this configuration."""
    rate = config.learning_rate or (1e-4 if config.finetune == "lora" else 1e-5)
    recompute: dict[str, Any] = {}
    if config.gradient_checkpointing:
        recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=config.seed,
        num_train_epochs=config.rounds if config.judge else config.epochs,
        max_steps=-1 if config.judge else config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        **recompute,
        logging_steps=config.log_every,
        logging_first_step=True,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        report_to=[] if config.report_to == "none" else [config.report_to],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )


def plan(config: RunConfig) -> Plan:
    """What a round of this run is."""
    return Plan(
        prompts=config.prompts_per_round,
        answers=config.answers,
        keep=None if config.keep_answers is None else (config.keep_answers, config.keep_beta),
        passes=config.passes,
        batch_size=config.batch_size,
        longest=config.sample_tokens,
        seed=config.seed,
        temperature=config.sample_temperature,
        pairs=config.pairs or "best-worst",
        tie_threshold=config.tie_threshold or 0.0,
        threshold=config.score_threshold,
        end_penalty=config.end_penalty,
        overlong=(config.overlong_buffer, config.overlong_penalty) if config.overlong_buffer else None,
        length_penalty=config.token_penalty,
        keep_all=config.keep_rounds == "all",
        redraw=config.redraw,
        largest_gap=config.largest_gap,
        correct_gap=config.correct_sampling,
        partner=config.partner_mix,
    )


def with_answers(examples: Sequence[Example]) -> list[Example]:
    """Prompts get pieces of themselves as answers, to try a layout on."""
    return [
        e if e.completions else dataclasses.replace(e, completions=(e.prompt[-8:], e.prompt[-5:])) for e in examples
    ]


def shortest(examples: Sequence[Example], n: int = 4) -> list[Example]:
    """A few short examples with distinct prompts: what the checks are run on."""
    distinct = {e.prompt: e for e in examples if e.completions}
    return sorted(distinct.values(), key=lambda e: e.tokens)[:n]


def _all_cached(cached: Cached, example: Example) -> bool:
    return all(k in cached.cache for k in completion_keys(example))


def next_folder(config: RunConfig) -> Path:
    """``runs/METHOD-DATA-N`` with the first free N."""
    stem = Path(config.data.removeprefix("hub:")).name.split(".")[0] or "data"
    number = 1
    while (folder := Path("runs") / f"{config.method}-{stem}-{number}").exists():
        number += 1
    return folder


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    names = ("torch", "transformers", "accelerate", "peft", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def machine() -> dict[str, Any]:
    """Where it ran, without naming the host."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def code_hash() -> str:
    """Hash of trimtab's own sources."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
