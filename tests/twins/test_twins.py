"""The engine equals the flat scripts: loss and gradient of every parameter, every method, layout and token budget."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engine import (
    WHOLE,
    assert_same,
    engine,
    frozen,
    gradients,
    lengths,
    losses,
    other_model,
    step,
    weights,
    worst,
)
from tests.twins import pairs, rewards, rollouts, thumbs
from trimtab.feedback.records import Comparison, Demonstration, Message, Prompt, Ranking, Score, Solution, Thumb
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.scored import Completions, Rankings
from trimtab.objectives import methods
from trimtab.objectives.base import Objective, option
from trimtab.objectives.check import check_objective
from trimtab.tokens.batch import Example

MODES: tuple[Mode, ...] = get_args(Mode)
BUDGETS = (1, 60, WHOLE)  # every example alone, a few together, all at once


@dataclass(frozen=True)
class PlackettLuce(Objective):
    """L = -sum_k log(exp r_k / sum_{j >= k} exp r_j),   r = beta log pi/pi_ref,   completions in the order of their ranks"""

    beta: float = option(0.1, "scale", above=0)
    feedback, needs = Rankings, frozenset({"reference"})
    paper = "arXiv:2305.18290, appendix A.3"

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def loss(self, batch: Rankings) -> Tensor:
        by_rank = torch.stack([p[r.argsort()] for p, r in zip(self._rows(self.reward(batch.y), batch), self._rows(batch.rank, batch), strict=True)])  # fmt: skip  # noqa: E501
        return (by_rank.flip(1).logcumsumexp(1).flip(1) - by_rank).sum(1)

    @staticmethod
    def _rows(values: Tensor, batch: Rankings) -> list[Tensor]:
        return [values[batch.prompt == i] for i in range(len(batch))]


def plackett_luce(policy: Any, reference: Any, examples: Sequence[Example], beta: float) -> Tensor:
    """The twin: one prompt at a time, one place at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        reward = beta * thumbs.log_ratios(policy, reference, [(e.prompt, c) for c in e.completions])
        left = sorted(range(len(e.completions)), key=lambda k: e.record.ranks[k])  # type: ignore[attr-defined]
        while left:
            total = total - (reward[left[0]] - torch.log(reward[left].exp().sum()))
            left.pop(0)
    return total / len(examples)


def rrhf(policy: Any, examples: Sequence[Example]) -> Tensor:
    """A hinge on mean log-probs of every pair in the wrong order, and the likelihood of the best."""
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        logps, mask = pairs.token_logps(policy, [(e.prompt, c) for c in e.completions])
        mean, rank = logps.sum(1) / mask.sum(1), e.record.ranks  # type: ignore[attr-defined]
        for i, j in itertools.permutations(range(len(rank)), 2):
            if rank[i] < rank[j]:
                total = total + torch.relu(mean[j] - mean[i])
        total = total - logps.sum(1)[rank.index(1)]
    return total / len(examples)


@dataclass
class Case:
    """A method with options, its data and its twin."""

    objective: Objective
    examples: list[Example]
    twin: Callable[[Any, Any, Sequence[Example]], Tensor]


def of_pairs(method: str, **options: float) -> Case:
    examples = tiny.examples(Comparison, 6, seed=5, ties=method == "todo")
    if method in ("tdpo2", "wpo", "aot"):
        return Case(methods()[method](**options), examples, lambda p, r, e: getattr(pairs, method)(p, r, e, **options))
    return Case(methods()[method](**options), examples, lambda p, r, e: pairs.loss(method, p, r, e, **options))


def thumbs_examples() -> list[Example]:
    examples = tiny.examples(Thumb, 7, seed=1)
    # the third row answers the prompt of the second: its mismatch must skip it
    examples[2] = Example(examples[1].prompt, examples[2].completions, examples[2].record)
    return examples


def of_thumbs(**options: float) -> Case:
    examples = thumbs_examples()
    return Case(methods()["kto"](**options), examples, lambda p, r, e: thumbs.kto(p, r, e, **options))


def of_demonstrations(normalise: str) -> Case:
    return Case(methods()["sft"](normalise=normalise), tiny.examples(Demonstration, 6, seed=1), lambda p, _, e: thumbs.sft(p, e, normalise))  # fmt: skip  # noqa: E501


def groups() -> list[Example]:
    examples = tiny.examples(Ranking, 3, k=8, seed=2)
    said = (Message("user", "?"),)
    ranks = [(3, 1, 2, 8, 7, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8), (8, 7, 6, 5, 4, 3, 2, 1)]
    records = [Ranking(said, tuple("abcdefgh"), r) for r in ranks]
    return [Example(e.prompt, e.completions, r) for e, r in zip(examples, records, strict=True)]


def with_strength() -> list[Example]:
    examples = tiny.examples(Comparison, 6, seed=5)
    return [replace(e, record=replace(e.record, strength=0.1 * i)) for i, e in enumerate(examples)]  # type: ignore[call-arg]


def tied() -> list[Example]:
    """Lists in which some answers share a place."""
    shared = ((3, 1, 1, 8, 7, 3, 5, 6), (1, 2, 2, 2, 5, 6, 7, 8), (1, 1, 1, 1, 1, 1, 1, 2))
    return [replace(e, record=replace(e.record, ranks=r)) for e, r in zip(groups(), shared, strict=True)]  # type: ignore[call-arg]


def of_rollouts(method: str, **options: float) -> Case:
    objective = methods()[method](**options)
    examples = tiny.sampled(objective, tiny.examples(Prompt, 4, k=3, seed=2))
    return Case(objective, examples, lambda p, _, e: getattr(rollouts, method)(p, e, **options))


CASES = {
    "dpo": of_pairs("dpo", beta=0.05),
    "cdpo": of_pairs("cdpo", beta=0.05, label_smoothing=0.2),
    "robust_dpo": of_pairs("robust_dpo", beta=0.05, flip_rate=0.2),
    "simpo": of_pairs("simpo", beta=2.5, gamma_beta_ratio=0.3),
    "todo": of_pairs("todo", beta=0.05, alpha=0.4),
    "kto": of_thumbs(beta=0.05, desirable_weight=1.5, undesirable_weight=0.8),
    "tdpo2": of_pairs("tdpo2", beta=0.05, alpha=0.4),
    "wpo": of_pairs("wpo", beta=0.05),
    "cringe": Case(methods()["cringe"](alpha=0.7), thumbs_examples(), lambda p, _, e: thumbs.cringe(p, e, 0.7)),
    "offline_ppo": Case(
        methods()["offline_ppo"](clip=0.2, value_weight=0.3, kl_weight=0.1),
        thumbs_examples(),
        lambda p, r, e: thumbs.offline_ppo(p, r, e, 0.2, 0.3, 0.1),
    ),
    "dro": Case(methods()["dro"](tau=0.3), tiny.examples(Score, 6, seed=2), lambda p, r, e: thumbs.dro(p, r, e, 0.3)),
    "aot": of_pairs("aot", beta=0.05),
    "pairwise_cringe": Case(
        methods()["pairwise_cringe"](margin=1.0, temperature=3.0),
        tiny.examples(Comparison, 6, seed=5),
        lambda p, _, e: pairs.pairwise_cringe(p, e, 1.0, 3.0),
    ),
    "mpo": Case(
        methods()["mpo"](parts="1.0 * dpo(beta=0.05) + 0.4 * bco(beta=0.05)"),
        tiny.examples(Comparison, 6, seed=5),
        lambda p, r, e: pairs.dpo_and_bco(p, r, e, 0.05, 0.4),
    ),
    "bco": Case(methods()["bco"](beta=0.05), thumbs_examples(), lambda p, r, e: thumbs.bco(p, r, e, 0.05)),
    "apo_zero_unpaired": Case(
        methods()["apo_zero_unpaired"](beta=0.05), thumbs_examples(), lambda p, r, e: thumbs.apo_zero(p, r, e, 0.05)
    ),
    "csft": Case(methods()["csft"](), thumbs_examples(), lambda p, _, e: thumbs.sft(p, e, "token")),
    "rrhf": Case(methods()["rrhf"](), tiny.examples(Ranking, 4, k=3, seed=2), lambda p, _, e: rrhf(p, e)),
    "sft token": of_demonstrations("token"),
    "sft sequence_sum": of_demonstrations("sequence_sum"),
    "sft sequence_mean": of_demonstrations("sequence_mean"),
    "groups of 8": Case(PlackettLuce(beta=0.03), groups(), lambda p, r, e: plackett_luce(p, r, e, 0.03)),
    "reward_model": Case(
        methods()["reward_model"](strength="margin", label_smoothing=0.1, centring=0.05),
        with_strength(),
        lambda p, _, e: rewards.bradley_terry(p, e, 0.1, 0.05),
    ),
    "reward_model_ties": Case(
        methods()["reward_model_ties"](tie_probability=0.4),
        tiny.examples(Comparison, 6, seed=5, ties=True),
        lambda p, _, e: rewards.with_ties(p, e, 0.4),
    ),
    "k_wise_reward": Case(methods()["k_wise_reward"](), tied(), lambda p, _, e: rewards.k_wise(p, e)),
    "score_model": Case(
        methods()["score_model"](score_mean=0.5, score_std=2.0),
        tiny.examples(Score, 6, seed=2),
        lambda p, _, e: rewards.regression(p, e, 0.5, 2.0),
    ),
    "rloo": of_rollouts("rloo", beta=0.3, clip=0.4),
    "dapo": of_rollouts("dapo", clip_low=0.3, clip_high=0.5),
    "remax": of_rollouts("remax", beta=0.3, clip=0.4),
    "ppo": of_rollouts("ppo", clip=0.4, value_clip=0.3, value_weight=0.2),
    "process_reward": Case(
        methods()["process_reward"](), tiny.examples(Solution, 6, seed=0), lambda p, _, e: rewards.process(p, e)
    ),
}


def plain(case: Case, model: Any) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of the flat script."""
    policy = copy.deepcopy(model)
    value = case.twin(policy, other_model(), case.examples)
    value.backward()
    return value.item(), gradients(policy)


def test_no_family_lacks_a_twin() -> None:
    """What a method learns from and what it needs decide how the engine serves it; one twin per such family."""

    def family(o: Objective) -> tuple[Any, ...]:
        return o.feedback, o.needs, o.ties, o.coupled, o.has_memory()

    served = {family(c.objective) for c in CASES.values()}
    assert [name for name, cls in methods().items() if family(cls()) not in served] == []


def test_the_data_is_what_it_should_be() -> None:
    assert check_objective(PlackettLuce())
    for case in CASES.values():
        assert 1 in lengths(case.examples) and len(lengths(case.examples)) > 3
        assert len({len(e.prompt) for e in case.examples}) > 2
    todo = [e.record.tie for e in CASES["todo"].examples]  # type: ignore[attr-defined]
    assert {*todo} == {True, False}
    kto = [e.record.desirable for e in CASES["kto"].examples]  # type: ignore[attr-defined]
    assert {*kto} == {True, False}


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_twin(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = tiny.model_for(case.objective)
    wanted = plain(case, model)
    for mode in MODES:
        trainer = engine(model, case.objective, case.examples, tmp_path, mode=mode)
        for budget in BUDGETS:
            trainer.scorer.budget = budget
            assert_same(step(trainer), wanted)


def test_a_prompt_of_one_token_and_a_batch_of_one(tmp_path: Path) -> None:
    for name in ("dpo", "kto", "sft token"):
        case, model = CASES[name], tiny.model()
        first = case.examples[0]
        one = Case(case.objective, [Example((5,), first.completions, first.record)], case.twin)
        wanted = plain(one, model)
        for mode in MODES:
            assert_same(step(engine(model, one.objective, one.examples, tmp_path, mode=mode)), wanted)


@pytest.mark.parametrize("name", ["dpo", "kto", "sft token"])
def test_five_steps_of_training_equal_the_script(name: str, tmp_path: Path) -> None:
    """Data order, optimiser, denominators of uneven batches: two epochs of batches of 3, the last ones smaller."""
    case, model = CASES[name], tiny.model()
    policy = copy.deepcopy(model)
    trainer = engine(model, case.objective, case.examples, tmp_path, budget=60, batch_size=4, max_steps=4)
    batches = [[case.examples[i] for i in b] for epoch in range(2) for b in trainer.batches.epoch(epoch)]
    assert [len(b) for b in batches] in ([4, 2] * 2, [4, 3] * 2)
    options = vars(case.objective)
    match name:
        case "dpo":
            wanted = pairs.train(name, policy, other_model(), batches, 1e-2, **options)
        case "kto":
            assert options.pop("balance") == "none"  # the weights are as given
            wanted = thumbs.train(policy, batches, 1e-2, reference=other_model(), **options)
        case _:
            wanted = thumbs.train(policy, batches, 1e-2, **options)
    trainer.train()
    assert losses(trainer) == pytest.approx(wanted, rel=1e-9)
    assert worst(weights(model), weights(policy)) < 1e-8


def test_reference_is_not_the_policy() -> None:
    """Else every equality above would hold for a reference that is ignored."""
    case = CASES["dpo"]
    rows = [(e.prompt, c) for e in case.examples for c in e.completions]
    policy, other = (pairs.token_logps(m, rows)[0].sum(1) for m in (tiny.model(), other_model()))
    assert (policy - other).abs().min() > 1e-3
    ours = frozen(other_model(), "shared").logps(case.examples)
    assert torch.allclose(ours.sum(), other.sum(), rtol=1e-12)
