"""One trial: one method, one seed, one world. Everything but the method is the same for all of them.

For a seed, all methods get the same prompts, the same answers of the start model, the same judgements of them (as the
view each learns from), the same number of optimiser steps on the same number of judged answers, the same order of the
data where the view is the same, and are evaluated on the same held-out prompts under the same sampling noise.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

from trimtab.compare.measures import Trained, log_ratios, measure
from trimtab.errors import DataError, TrimtabError
from trimtab.feedback.records import Comparison, Demonstration, Message, Origin, Prompt, Ranking, Record, Score, Thumb
from trimtab.feedback.shift import prompt_shift
from trimtab.logprobs.critic import add_critic
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.reference import FrozenCopy
from trimtab.logprobs.score import Scorer, install
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives import Objective, objective_class
from trimtab.online.rounds import Plan, Rounds
from trimtab.tokens.batch import Example, completion_keys
from trimtab.tokens.template import tokenize
from trimtab.update.callbacks import MovingReference
from trimtab.update.trainer import Update
from trimtab.world import model as world_model
from trimtab.world.asked import AskedJudge
from trimtab.world.judge import Judge
from trimtab.world.model import Pool
from trimtab.world.utility import Terms, terms, utility, word_count

MODE: Mode = "shared"
TOKENS = 8192  # per forward pass; no number depends on it
MAX_LENGTH = 256
# options of a run, or of a pipeline, that a trial knows too: ``after`` names a method whose result is start and reference,
# ``merged_with`` one that is trained beside it and whose weights are averaged with it (PAFT); ``rounds`` the number of them in
# which the policy itself writes the answers that are judged, each learned from ``passes`` times, a method on pairs from ``pairs``
RUN_OPTIONS = ("match_prompts", "reference_every", "reference_mix", "after", "merged_with", "rounds", "passes", "pairs")


# judged answers behind one record; 0: all of a prompt's
JUDGED: dict[type[Record], int] = {Comparison: 2, Demonstration: 2, Thumb: 1, Score: 1, Ranking: 0}


@dataclass(frozen=True)
class Budget:
    """What every method may use.

    Attributes:
        prompts: with feedback on ``answers`` answers each.
        steps: of the optimiser.
        answers_per_step: judged answers behind the records of one batch: 32 are 16 pairs, 32 thumbs or scores, 8
            rankings of 4, or 16 demonstrations (each won against an answer that is not shown).
        held_out: prompts that are evaluated on, with ``held_out_answers`` samples each.
    """

    prompts: int = 256
    answers: int = 4
    steps: int = 48
    answers_per_step: int = 32
    held_out: int = 128
    held_out_answers: int = 3

    def batch_size(self, kind: type[Record]) -> int:
        """Records in a batch."""
        return max(1, self.answers_per_step // (JUDGED[kind] or self.answers))


@dataclass(frozen=True)
class Trial:
    """What is run; together with the code and the versions it decides every number.

    Attributes:
        options: hyperparameters of the method, and :data:`RUN_OPTIONS`.
    """

    world: str
    judge: Judge
    method: str
    learning_rate: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget = Budget()

    def to_json(self) -> dict[str, Any]:
        """All of it but the world's name: two names for one judge are one trial."""
        return {k: v for k, v in asdict(self).items() if k != "world"}

    def objective(self) -> Objective:
        return objective_class(self.method)(**{k: v for k, v in self.options.items() if k not in RUN_OPTIONS})


def run(trial: Trial) -> dict[str, Any]:
    """Train, evaluate, measure. A run that cannot be, or that diverges, is a result too: ``{"failed": why}``."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _run(trial)
    except TrimtabError as e:
        found = {"failed": str(e)}
    finally:
        torch.set_num_threads(threads)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _run(trial: Trial) -> dict[str, Any]:
    objective, drawn = trial.objective(), draw_pool(trial)
    model = world_model.load_start()
    good, bad = _control(objective, model, trial.seed)
    online = "rounds" in trial.options
    examples = _prompts(drawn) if online else _examples(trial, objective, drawn, good, bad)
    first = _other(trial, "after", drawn)
    if first is not None:
        model.load_state_dict(first.model.state_dict())
    policy = fit(model, objective, examples, trial, first)
    beside = _other(trial, "merged_with", drawn)
    if beside is not None:
        with torch.no_grad():
            for mine, other in zip(policy.model.parameters(), beside.model.parameters(), strict=True):
                mine.lerp_(other, 0.5)
    begun = _beginning(objective, trial.seed)
    found = evaluate(policy, begun, drawn, trial, good)
    measures = measure(
        Trained(
            policy=policy,
            start=begun,
            train_pairs=encode(trial.judge.pairs(drawn.train[: trial.budget.held_out], trial.seed)),
            # what is asked of the policy there is what the judge meant to say
            held_out_pairs=encode(replace(trial.judge, flip=0.0).pairs(drawn.held_out, trial.seed)),
            asked=good,
        )
    )
    if bad:
        worse = evaluate(policy, begun, drawn, trial, bad)["prompts"]["utility"]
        measures["good_minus_bad"] = float(np.mean(found["prompts"]["utility"]) - np.mean(worse))
    return {"records": len(examples), **found, "measures": measures}


def _other(trial: Trial, which: str, drawn: Pool) -> Scorer | None:
    """Another method of this trial, trained from the start model at the same rate and for as many steps."""
    if which not in trial.options:
        return None
    other = replace(trial, method=trial.options[which], options={})
    objective = other.objective()
    return fit(world_model.load_start(), objective, _examples(other, objective, drawn, (), ()), other)


def draw_pool(trial: Trial) -> Pool:
    """The prompts and answers of this trial's seed."""
    b = trial.budget
    return world_model.pool(trial.seed, b.prompts, b.answers, b.held_out, b.held_out_answers)


def encode(records: Sequence[Record]) -> list[Example]:
    """Records as tokens; the few whose answer is empty are left out."""
    return tokenize(records, world_model.template(), max_length=MAX_LENGTH)[0] if records else []


def _examples(
    trial: Trial, objective: Objective, drawn: Pool, good: tuple[int, ...], bad: tuple[int, ...]
) -> list[Example]:
    records = trial.judge.feedback(objective.feedback.record, drawn.train, trial.seed)
    if not objective.ties:
        records = [r for r in records if not (isinstance(r, Comparison) and r.tie)]
    examples = encode(records)
    if good:
        marks = [good if e.record.desirable else bad for e in examples]  # type: ignore[attr-defined]
        examples = [replace(e, completions=((*m, *e.completions[0]),)) for e, m in zip(examples, marks, strict=True)]
    match trial.options.get("match_prompts", "none"):
        case "none":
            return examples
        case "tfidf":
            weights = prompt_shift([e.record for e in examples], seed=trial.seed).weights
            return [replace(e, weight=w) for e, w in zip(examples, weights, strict=True)]
        case other:
            raise DataError(f"match_prompts is {other}; a trial knows none and tfidf.")


def _control(objective: Objective, model: Any, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a prompt ends in to ask for a good answer, and for a bad one; nothing for most methods."""
    if not objective.control_tokens:
        return (), ()
    template = world_model.new_template()
    good, bad = template.add_control(*objective.control_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(template.tokenizer))
    return (good,), (bad,)


def _beginning(objective: Objective, seed: int) -> Scorer:
    """The start model as it was before this training: with the control tokens, which a policy may well write."""
    if not objective.control_tokens:
        return start().scorer
    model = world_model.load_start()
    _control(objective, model, seed)
    install(model, torch.float32, MODE)
    return Scorer(model, MODE, TOKENS)


@cache
def start() -> Known:
    """The start model: the reference of every method, one for the whole process."""
    return Known(_reference())


def _reference() -> FrozenCopy:
    model = world_model.load_start()
    install(model, torch.float32, MODE)
    return FrozenCopy(model, Scorer(model, MODE, TOKENS), torch.float32, "the controlled world's model")


class Known(FrozenCopy):
    """The start model, which remembers the log-probs of whole data sets: many trials learn from the same one."""

    def __init__(self, copied: FrozenCopy) -> None:
        self.scorer, self.identity, self.moved = copied.scorer, copied.identity, False
        self.rows: dict[bytes, torch.Tensor] = {}
        self.sets: dict[str, dict[bytes, torch.Tensor]] = {}

    def expect(self, examples: Sequence[Example]) -> None:
        """These examples will be asked for. A set is scored as a whole, so no number depends on earlier trials."""
        keys = [k for e in examples for k in completion_keys(e)]
        name = hashlib.blake2b(b"".join(keys)).hexdigest()
        if name not in self.sets:
            self.sets = dict(list(self.sets.items())[-7:])  # a seed has a few: one for each kind of feedback
            logps, lengths = self.scorer.score_all(examples)
            self.sets[name] = dict(zip(keys, logps.split(lengths.tolist()), strict=True))
        self.rows = self.sets[name]

    def logps(self, examples: Sequence[Example], budgets: int = 1) -> torch.Tensor:
        keys = [completion_keys(e) for e in examples]
        new = [
            e for e, ks in zip(examples, keys, strict=True) if any(k not in self.rows for k in ks)
        ]  # KTO's mismatched
        scored = super().logps(new)
        found = iter(scored.split([sum(map(len, e.completions)) for e in new]))
        known = lambda ks: all(k in self.rows for k in ks)  # noqa: E731
        return torch.cat([torch.cat([self.rows[k] for k in ks]) if known(ks) else next(found) for ks in keys])


def _prompts(drawn: Pool) -> list[Example]:
    """What rounds begin with; the start model's answers are not looked at."""
    records = [
        Prompt((Message("user", text),), origin=Origin("controlled world", i))
        for i, (text, _) in enumerate(drawn.train, 1)
    ]
    return [Example(world_model.prompt_ids(r.prompt[0].content), (), r) for r in records]


def _rounds(trial: Trial, objective: Objective, prompts: Sequence[Example], folder: Path) -> Rounds:
    """Rounds that use up what the budget grants: each prompt once, its judged answers, the optimiser's steps."""
    budget, n, passes = trial.budget, trial.options["rounds"], trial.options.get("passes", 1)
    plan = Plan(
        prompts=budget.prompts // n,
        answers=budget.answers,
        passes=passes,
        batch_size=1,
        longest=world_model.MAX_NEW_TOKENS,
        seed=trial.seed,
        pairs=trial.options.get("pairs", "best-worst"),
    )
    kind = Ranking if objective.feedback is Rollouts else objective.feedback.record
    plan = replace(plan, batch_size=-(-plan.examples(kind) * passes * n // budget.steps))
    if budget.prompts % n or plan.steps(kind) * n != budget.steps:
        raise DataError(
            f"{n} rounds of {plan.steps(kind)} steps do not use up {budget.prompts} prompts in {budget.steps} steps. Choose a "
            "number of rounds that divides both."
        )
    judge = AskedJudge(trial.judge, trial.seed)
    return Rounds(prompts, plan, judge, world_model.template(), folder, torch.float32)


def fit(
    model: nn.Module, objective: Objective, examples: Sequence[Example], trial: Trial, begin: Scorer | None = None
) -> Scorer:
    """Full fine-tuning in float32 by the engine; returns the model with the way to score it.

    Args:
        begin: what the reference is, where it is not the start model.
    """
    if "value" in objective.needs:
        add_critic(model, objective.critic, trial.seed)  # type: ignore[arg-type]
    install(model, torch.float32, MODE)
    scorer = Scorer(model, MODE, TOKENS)
    reference: FrozenCopy | None = None
    if "reference" in objective.needs and begin is not None:
        reference = FrozenCopy(begin.model, begin, torch.float32, "the stage before")
    elif "reference" in objective.needs:
        reference = start()
        if "rounds" not in trial.options:
            start().expect(examples)
    callbacks = []
    if "reference_every" in trial.options:
        reference = _reference()
        mix = trial.options.get("reference_mix", 1.0)
        callbacks.append(MovingReference(reference, trial.options["reference_every"], mix))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=f"{folder}/checkpoints",
            seed=trial.seed,
            max_steps=trial.budget.steps,
            learning_rate=trial.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, trial.budget.steps // 10),
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        if "rounds" in trial.options:
            rounds = _rounds(trial, objective, examples, Path(folder))
            Update(
                model, objective, scorer, reference, (), rounds.batch_size, args, callbacks=callbacks, rounds=rounds
            ).train()
            return scorer
        size = trial.budget.batch_size(objective.feedback.record)
        update = Update(model, objective, scorer, reference, examples, size, args, callbacks=callbacks)
        update.denominator(examples)  # makes the view of all of them, as labels only
        update.objective = objective.settle(update.whole)
        refusal, _ = update.objective.advise(update.whole)
        if refusal:
            raise DataError(refusal)
        update.train()
    return scorer


def evaluate(policy: Scorer, begun: Scorer, drawn: Pool, trial: Trial, asked: tuple[int, ...]) -> dict[str, Any]:
    """Per held-out prompt, the mean over its answers: true utility and words before and after, KL in nats per answer.

    KL(policy || start) is the mean log-ratio of the policy's own answers (estimator k1, unbiased).

    Args:
        begun: the start model.
        asked: token ids that the policy's prompts end in.
    """
    prompts, before = [p for p, _ in drawn.held_out], [a for _, a in drawn.held_out]
    per, seed = trial.budget.held_out_answers, world_model.evaluation_seed(trial.seed)
    plain = [world_model.prompt_ids(p) for p in prompts]
    ids = world_model.answers(policy.model, [(*p, *asked) for p in plain], per, seed)
    after = [[world_model.text(a) for a in row] for row in ids]
    rows = [Example(p, tuple(a), Demonstration((), "")) for p, a in zip(plain, ids, strict=True)]
    gaps = log_ratios(policy, begun, rows, asked)
    found = {
        "utility": _by_prompt(utility, prompts, after),
        "utility_start": _by_prompt(utility, prompts, before),
        "words": _by_prompt(lambda _, answer: word_count(answer), prompts, after),
        "words_start": _by_prompt(lambda _, answer: word_count(answer), prompts, before),
        "kl": np.array(gaps).reshape(-1, per).mean(1).tolist(),
    }
    parts = {
        f.name: [
            float(np.mean(_by_prompt(lambda p, a, name=f.name: getattr(terms(p, a), name), prompts, said)))  # type: ignore[misc]
            for said in (before, after)
        ]
        for f in fields(Terms)
    }
    return {"prompts": found, "terms": parts}


def _by_prompt(f: Callable[[str, str], float], prompts: Sequence[str], said: Sequence[Sequence[str]]) -> list[float]:
    return [float(np.mean([f(p, a) for a in row])) for p, row in zip(prompts, said, strict=True)]
