"""Batch size is mathematics, everything else is memory: no number depends on how a batch was scored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tests import tiny
from tests.engine import WHOLE, assert_same, engine, frozen, gradients, losses, other_model, step, weights, worst
from tests.twins.pairs import logps_of_pairs
from trimtab.errors import CacheError
from trimtab.feedback.records import Thumb
from trimtab.logprobs import layout, score
from trimtab.logprobs.cache import LogpCache
from trimtab.logprobs.layout import Mode, cost
from trimtab.logprobs.reference import AdapterOff, Cached, FrozenCopy, mismatch
from trimtab.logprobs.score import Scorer, install
from trimtab.logprobs.scored import Completions, Pairs, Rollouts
from trimtab.objectives import methods
from trimtab.objectives.base import Objective, option
from trimtab.objectives.check import check_objective
from trimtab.objectives.dpo import DPO
from trimtab.objectives.kto import KTO
from trimtab.tokens.batch import Example
from trimtab.update.trainer import MEMORY_FILE, Batches, Update, last_checkpoint

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODES: tuple[Mode, ...] = get_args(Mode)
N = 16


@dataclass(frozen=True)
class Sorted(Objective):
    """L = -log sigma(beta (the k-th largest h_w - the k-th largest h_l)),   h = log pi/pi_ref   (as in AOT)"""

    beta: float = option(0.1, "scale", above=0)
    feedback, needs, coupled = Pairs, frozenset({"reference"}), True
    paper = "a test"

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def loss(self, batch: Pairs) -> Tensor:
        chosen, rejected = self.reward(batch.chosen), self.reward(batch.rejected)
        return -logsigmoid(chosen.sort(descending=True).values - rejected.sort(descending=True).values)


@dataclass(frozen=True)
class Shifted(Objective):
    """L = -log sigma(r_w - delta) - log sigma(-(r_l - delta)),   delta = running mean of all rewards   (as in BCO)"""

    beta: float = option(0.1, "scale", above=0)
    feedback, needs = Pairs, frozenset({"reference"})
    paper = "a test"

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def remember(self, batch: Pairs, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        mean = (self.reward(batch.chosen).mean() + self.reward(batch.rejected).mean()) / 2
        return {"delta": 0.8 * memory.get("delta", torch.zeros_like(mean)) + 0.2 * mean}

    def loss(self, batch: Pairs) -> Tensor:
        delta = batch.memory.get("delta", torch.zeros(()))
        return -logsigmoid(self.reward(batch.chosen) - delta) - logsigmoid(delta - self.reward(batch.rejected))


OPENING = (
    5,
    9,
    2,
    6,
    5,
    3,
    5,
    8,
)  # what all prompts begin with, as under a chat template: read once where rows are together
EVERY: list[Objective] = [*(cls() for cls in methods().values()), Sorted(), Shifted()]


def data(objective: Objective, n: int = N, seed: int = 0) -> list[Example]:
    examples = tiny.examples(objective.feedback.record, n, k=4, seed=seed, ties=objective.ties)
    examples = [replace(e, prompt=OPENING + e.prompt) for e in examples]
    for i, e in enumerate(examples):  # equal answers would tie up to rounding, and accuracies count strictly larger
        apart = tuple(c if c not in e.completions[:k] else (3 + k, *c) for k, c in enumerate(e.completions))
        examples[i] = replace(e, completions=apart)
    if objective.feedback.record is Thumb and n > 3:  # two answers to one prompt, next to each other
        examples[3] = Example(examples[2].prompt, examples[3].completions, examples[3].record)
    return tiny.sampled(objective, examples, seed) if objective.feedback is Rollouts else examples


def test_the_objectives_of_this_file_keep_the_contract() -> None:
    assert check_objective(Sorted()) and check_objective(Shifted())


# --- microbatches and layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: o.name())
def test_cuts_and_layouts_change_nothing(objective: Objective, tmp_path: Path) -> None:
    """16 alone, about 4 x 4, 1 x 16; shared, packed, padded: loss, gradient and every logged metric."""
    model, examples = tiny.model_for(objective), data(objective)
    wanted, metrics = None, {}
    cuts = set()
    for mode in MODES:
        for budget in (WHOLE, sum(cost(e, mode) for e in examples) // 4, 1):
            trainer = engine(model, objective, examples, tmp_path, mode=mode, budget=budget)
            cuts.add(len(trainer.scorer.microbatches(examples)))
            found, told = step(trainer), trainer.tally.means()
            if wanted is None:
                wanted, metrics = found, told
            assert_same(found, wanted)
            assert told == pytest.approx(metrics, rel=1e-10, abs=1e-12) and told["loss"] == pytest.approx(found[0])
    assert {1, N} < cuts and any(2 < c < 9 for c in cuts)


def test_metrics_are_of_the_whole_batch(tmp_path: Path) -> None:
    """rewards/margins and accuracies against the flat script."""
    model, examples = tiny.model(), data(DPO())
    with torch.no_grad():
        chosen, rejected, *_ = logps_of_pairs(model, examples)
        ref_chosen, ref_rejected, *_ = logps_of_pairs(other_model(), examples)
    margin = 0.1 * (chosen - ref_chosen - rejected + ref_rejected)
    trainer = engine(model, DPO(), examples, tmp_path, budget=60)
    step(trainer)
    told = trainer.tally.means()
    assert told["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-10)
    assert told["rewards/accuracies"] == pytest.approx((margin > 0).double().mean().item(), rel=1e-10)
    assert told["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-10)


@pytest.mark.parametrize("objective", [DPO(), Sorted()], ids=lambda o: o.name())
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_nothing(objective: Objective, mode: Mode, tmp_path: Path) -> None:
    model, examples = tiny.model(), data(objective, 6)
    trainer = engine(model, objective, examples, tmp_path, mode=mode, budget=60)
    calls: list[int] = []
    hook = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    wanted, plain = step(trainer), len(calls)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(step(trainer), wanted, 1e-13)
    parts = len(trainer.scorer.microbatches(examples))
    assert len(calls) - plain == plain + parts  # each microbatch that learns was computed twice
    hook.remove()


def test_the_order_of_the_data() -> None:
    """A permutation per epoch, another one in the next, decided by the seed alone; the last batch is what is left."""
    batches = Batches(10, 4, seed=3)
    first, second = batches.epoch(0), batches.epoch(1)
    assert [len(b) for b in first] == [4, 4, 2] and len(batches) == 3
    for epoch in (first, second):
        assert sorted(i for b in epoch for i in b) == list(range(10))
    assert first != second and first != Batches(10, 4, seed=4).epoch(0) and first == Batches(10, 4, seed=3).epoch(0)


# --- the reference ------------------------------------------------------------------------------------------------------


def with_lora(seed: int = 0, targets: Any = "all-linear", **config: object) -> nn.Module:
    """A tiny model with an adapter that has already learned something."""
    model = get_peft_model(tiny.model(**config), LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    return model


@pytest.mark.parametrize("objective", [DPO(), KTO(), Sorted()], ids=lambda o: o.name())
@pytest.mark.parametrize("mode", MODES)
def test_switched_off_adapter_is_the_frozen_copy(objective: Objective, mode: Mode, tmp_path: Path) -> None:
    model, examples = with_lora(), data(objective)
    copied = engine(model, objective, examples, tmp_path, mode=mode, budget=120, reference=frozen(tiny.model(), mode))
    wanted = step(copied)
    switched = engine(model, objective, examples, tmp_path, mode=mode, budget=120)
    switched.reference = AdapterOff(switched.scorer, "a test")
    assert_same(step(switched), wanted)
    assert all("lora" in name for name in wanted[1])
    # the adapter is on again, and it is not nothing
    policy, off = switched.scorer.score_all(examples)[0], switched.reference.logps(examples)
    assert (policy - off).abs().max() > 0.1


def test_adapter_on_the_head_too(tmp_path: Path) -> None:
    """A head that is no plain linear layer takes another path through the vocabulary."""
    model, examples = with_lora(targets=["q_proj", "lm_head"], tie_word_embeddings=False), data(DPO())
    flat = copy.deepcopy(model)
    chosen, rejected, *_ = logps_of_pairs(flat, examples)
    with torch.no_grad():
        ref_chosen, ref_rejected, *_ = logps_of_pairs(other_model(), examples)
    loss = -logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()
    loss.backward()
    for mode in MODES:
        assert_same(
            step(engine(model, DPO(), examples, tmp_path, mode=mode, budget=120)), (loss.item(), gradients(flat))
        )


def test_a_copy_is_not_the_policy(tmp_path: Path) -> None:
    """The copy keeps its numbers while the policy moves; the policy still scores itself."""
    model, examples = tiny.model(), data(DPO())
    trainer = engine(model, DPO(), examples, tmp_path, reference=None, max_steps=2)
    trainer.reference = FrozenCopy(model, trainer.scorer, torch.float64, "a test")
    before = trainer.reference.logps(examples)
    assert torch.equal(before, trainer.scorer.score_all(examples)[0])
    trainer.train()
    assert torch.equal(trainer.reference.logps(examples), before)
    assert (trainer.scorer.score_all(examples)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("objective", [DPO(), KTO(), Sorted()], ids=lambda o: o.name())
@pytest.mark.parametrize("steps", [{"num_train_epochs": 2}, {"max_steps": 5}], ids=["epochs", "steps"])
def test_cache_on_disk_is_the_live_reference(objective: Objective, steps: dict[str, int], tmp_path: Path) -> None:
    """Training over two epochs, the mismatched completions of every batch included."""
    examples, held_out = data(objective, 7), data(objective, 3, seed=9)
    options: dict[str, Any] = {"batch_size": 3, "budget": 60, "held_out": held_out, **steps}
    live = engine(tiny.model(), objective, examples, tmp_path / "live", **options)
    assert live.reference is not None
    cached = Cached(LogpCache(tmp_path / "cache"), "a test")
    added = live.fill_cache(cached, live.reference, steps.get("num_train_epochs", 1), steps.get("max_steps", -1))
    assert added == len(cached.cache) and cached.fill(examples, live.reference) == 0
    live.train()
    wanted = live.evaluate()

    again = Cached(LogpCache(tmp_path / "cache"), "a test")  # another process reads what was written
    assert len(again.cache) == added
    trainer = engine(tiny.model(), objective, examples, tmp_path / "cached", reference=again, **options)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(live), rel=1e-10)
    assert trainer.evaluate() == pytest.approx(wanted, rel=1e-9)
    assert worst(weights(trainer.model), weights(live.model)) < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tight", [False, True])
def test_rows_with_one_prompt_are_read_once(mode: Mode, tight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand in the list, and no more tokens at once than the budget."""
    pairs, model = data(DPO(), 6), tiny.model()
    rows = [replace(e, completions=e.completions[k : k + 1]) for k in (1, 0) for e in pairs]
    longest = max(cost(e, mode) for e in rows)  # the other answer to its prompt has no room beside it
    install(model, torch.float64, mode)
    scorer, fed = Scorer(model, mode, longest if tight else WHOLE), list[int]()
    wanted = torch.cat([scorer.score_all([e])[0] for e in rows])
    one = scorer.score
    monkeypatch.setattr(scorer, "score", lambda part: (fed.append(sum(cost(e, mode) for e in part)), one(part))[1])
    found, lengths = scorer.score_all(rows)
    assert worst({"": found}, {"": wanted}) < 1e-12
    assert lengths.tolist() == [len(e.completions[0]) for e in rows]
    if tight:
        assert len(fed) > 3 and max(fed) == longest
    else:
        assert fed == [sum(cost(e, mode) for e in pairs)]


def test_a_cache_is_filled_two_budgets_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference in a step takes one, as the pass that learns does: its numbers are the same to the last bit."""
    examples, fed = [data(DPO(), 1)[0]] * 5, list[int]()
    examples = [replace(e, prompt=(*e.prompt, 5 + k)) for k, e in enumerate(examples)]
    live, cached = frozen(tiny.model(), "shared"), Cached(LogpCache(tmp_path), "a test")
    live.scorer.budget = cost(examples[0], "shared")
    one = live.scorer.score
    monkeypatch.setattr(live.scorer, "score", lambda part: (fed.append(len(part)), one(part))[1])
    cached.fill(examples, live)
    assert fed == [2, 2, 1]
    found = live.logps(examples)
    assert fed[3:] == [1] * 5 and (found - cached.logps(examples)).abs().max() < 1e-12


def test_the_reference_reads_own_and_mismatched_answers_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, asked = data(KTO(), 3), list[int]()
    reference = frozen(other_model(), "shared")
    score = reference.scorer.score
    monkeypatch.setattr(
        reference.scorer, "score", lambda e: (asked.append(sum(cost(x, "shared") for x in e)), score(e))[1]
    )
    step(engine(tiny.model(), KTO(), examples, tmp_path, reference=reference))
    every = [*examples, *mismatch(examples)]
    assert len(every) == 6 and len({e.prompt for e in every}) == 3
    assert asked == [sum(cost(e, "shared") for e in every) - sum(len(e.prompt) for e in examples)]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_policy_reads_a_prompt_once_for_own_and_mismatched_answers(
    recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the batch is one microbatch; gradients as where it is not, and where activations are computed again."""
    examples, reference = data(KTO(), 3), frozen(other_model(), "shared")  # no prompt twice
    pairs, fed, left, made = mismatch(examples), list[int](), list[Any](), layout.Kept
    own, others = (sum(cost(e, "shared") for e in rows) for rows in (examples, pairs))
    once = len(OPENING) * (len(examples) - 1)  # what all begin with is not read again
    answers = sum(len(c) for e in pairs for c in e.completions)
    monkeypatch.setattr(score, "Kept", lambda: left.append(made()) or left[-1])

    def learned(budget: int) -> tuple[float, dict[str, Tensor]]:
        model = tiny.model()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.get_input_embeddings().register_forward_hook(lambda _m, given, _o: fed.append(given[0].numel()))  # type: ignore[operator]
        return step(engine(model, KTO(), examples, tmp_path, reference=reference, budget=budget))

    wanted = learned(own + answers - 1)
    assert not left and sum(fed) == own + others - 2 * once
    fed.clear()
    assert_same(learned(own + answers), wanted)
    assert fed == [own - once, answers] and answers < others - once
    assert [(k.closed, k.layers) for k in left] == [(True, {})]  # nothing stays in memory


def test_what_was_scored_at_sampling_is_not_scored_again(tmp_path: Path) -> None:
    """KTO's own answers may carry the reference's log-probs; the mismatched ones never do."""
    examples, reference = data(KTO(), 4), frozen(other_model(), "shared")
    wanted = step(engine(tiny.model(), KTO(), examples, tmp_path, reference=reference))
    for those in (range(4), (1, 2)):
        known = [
            replace(e, columns={"reference": reference.logps([e])}) if i in those else e for i, e in enumerate(examples)
        ]
        assert_same(step(engine(tiny.model(), KTO(), known, tmp_path, reference=reference)), wanted)


def test_cache_refuses_what_it_does_not_hold(tmp_path: Path) -> None:
    examples = data(DPO(), 4)
    live = frozen(other_model(), "shared")
    cached = Cached(LogpCache(tmp_path), "a test")
    cached.fill(examples[:3], live)
    assert torch.equal(cached.logps(examples[:3]), live.logps(examples[:3]))
    with pytest.raises(CacheError, match="lacks 2 of 8 completions asked for"):
        cached.logps(examples)
    # one token of a prompt is another: a miss, not a stale number
    other = replace(examples[0], prompt=(*examples[0].prompt[:-1], examples[0].prompt[-1] - 1))
    with pytest.raises(CacheError, match="lacks 2 of 2"):
        cached.logps([other])
    # and the boundary is part of the key: (ab, c) is not (a, bc)
    prompt, (c, _) = examples[0].prompt, examples[0].completions
    moved = replace(examples[0], prompt=prompt[:-1], completions=((prompt[-1], *c),))
    with pytest.raises(CacheError, match="lacks 1 of 1"):
        cached.logps([moved])


def test_cache_notices_another_model_and_a_damaged_file(tmp_path: Path) -> None:
    examples = data(DPO(), 4)
    cached = Cached(LogpCache(tmp_path), "a test")
    cached.fill(examples, frozen(other_model(), "shared"))
    assert "4 rows scored afresh differ by at most" in cached.spot_check(
        examples, frozen(other_model(), "padded"), 1e-9, seed=0
    )
    with pytest.raises(CacheError, match=r"is off by .* nats on one of 4 rows scored afresh \(allowed 1e-09\)"):
        cached.spot_check(examples, frozen(tiny.model(), "shared"), 1e-9, seed=0)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged .*Delete it: its rows will be scored again"):
        LogpCache(tmp_path)


def test_kto_with_nothing_to_mismatch(tmp_path: Path) -> None:
    """A batch of one, and a batch that asks the same prompt throughout: z0 is 0, nothing crashes."""
    examples = data(KTO(), 3)
    same = [Example(examples[0].prompt, e.completions, e.record) for e in examples]
    for batch in (same, same[:1]):
        trainer = engine(tiny.model(), KTO(), batch, tmp_path)
        assert step(trainer)[0] > 0 and trainer.tally.means()["kl"] == 0
        assert len(trainer.held_out_rows(batch)) == len(batch)


# --- coupled objectives, and those with memory ------------------------------------------------------------------------------


def test_coupled_loss_is_that_of_the_uncut_batch(tmp_path: Path) -> None:
    """The sorted loss written down flat, over all 16 pairs at once."""
    model, examples = tiny.model(), data(Sorted())
    flat = copy.deepcopy(model)
    chosen, rejected, *_ = logps_of_pairs(flat, examples)
    with torch.no_grad():
        ref_chosen, ref_rejected, *_ = logps_of_pairs(other_model(), examples)
    gap = (chosen - ref_chosen).sort().values - (rejected - ref_rejected).sort().values
    loss = -logsigmoid(0.1 * gap).mean()
    loss.backward()
    wanted = (loss.item(), gradients(flat))
    assert_same(step(engine(model, Sorted(), examples, tmp_path, budget=1)), wanted)
    # row by row it would be another loss
    apart = -logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()
    assert abs(apart.item() - loss.item()) > 1e-3


def flat_shifted(model: nn.Module, delta: float, examples: list[Example]) -> tuple[float, dict[str, Tensor], float]:
    """(loss, gradients, delta after the batch) of :class:`Shifted`, flat."""
    model.zero_grad()
    with torch.no_grad():
        ref_chosen, ref_rejected, *_ = logps_of_pairs(other_model(), examples)
    chosen, rejected, *_ = logps_of_pairs(model, examples)
    up, down = 0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)
    delta = 0.8 * delta + 0.2 * torch.cat([up, down]).mean().item()
    loss = (-logsigmoid(up - delta) - logsigmoid(delta - down)).mean()
    loss.backward()
    return loss.item(), gradients(model), delta


@pytest.mark.parametrize("budget", [1, 120, WHOLE])
def test_memory_sees_the_whole_batch_once_per_step(budget: int, tmp_path: Path) -> None:
    model, examples = tiny.model(), data(Shifted())
    trainer, delta = engine(model, Shifted(), examples, tmp_path, budget=budget), 0.0
    flat = copy.deepcopy(tiny.model())
    for batch in (examples[:9], examples[9:]):
        loss, slopes, delta = flat_shifted(flat, delta, batch)
        assert_same(step(trainer, batch), (loss, slopes))
        assert (
            trainer.memory["delta"].item() == pytest.approx(delta, rel=1e-12)
            and not trainer.memory["delta"].requires_grad
        )


def test_memory_is_frozen_in_evaluation_and_used_there(tmp_path: Path) -> None:
    model, examples = tiny.model(), data(Shifted(), 8)
    trainer = engine(model, Shifted(), examples[:5], tmp_path, held_out=examples[5:])
    before = trainer.evaluate()["eval/loss"]  # nothing is remembered yet
    step(trainer)
    remembered = trainer.memory["delta"].item()
    assert abs(remembered) > 1e-3 and trainer.evaluate()["eval/loss"] != before
    trainer.held_out_rows(examples)
    assert trainer.memory["delta"].item() == remembered


@pytest.mark.parametrize("stop", [2, 3, 5], ids=["inside an epoch", "between epochs", "at the end"])
def test_resume_continues_to_the_last_bit_with_its_memory(stop: int, tmp_path: Path) -> None:
    """Five steps, three per epoch: in one go, and again from the checkpoint after ``stop`` steps."""
    whole = _saving(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoints" / f"checkpoint-{stop}"
    assert (checkpoint / MEMORY_FILE).is_file() and last_checkpoint(checkpoint.parent).name == "checkpoint-5"
    resumed = _saving(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 5 and resumed.tokens_seen == whole.tokens_seen
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.memory["delta"], whole.memory["delta"])
    assert worst(weights(resumed.model), weights(whole.model)) == 0


def _saving(folder: Path) -> Update:
    return engine(
        tiny.model(), Shifted(), data(Shifted(), 7), folder, batch_size=3, budget=60, max_steps=5,
        save_strategy="steps", save_steps=1, lr_scheduler_type="linear",
    )  # fmt: skip
