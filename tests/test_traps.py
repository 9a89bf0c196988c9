"""Traps that peers have and trimtab has not (docs/traps.md), where no other test shows it; and that page itself.

Numbers are those of the specification: 33 and F list the traps of peers, the others are its sections.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import trimtab
from tests import tiny
from tests.engine import WHOLE, assert_same, engine, frozen, gradients, step
from tests.objectives.by_hand import completions, exactly, thumbs
from tests.test_every_objective import variants
from tests.test_layouts import FALLS_BACK, SHARED, model_of
from tests.twins import thumbs as flat_thumbs
from tests.twins.pairs import distributions, logps_of_pairs
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Message, Thumb
from trimtab.logprobs.extras import rival
from trimtab.logprobs.layout import Mode
from trimtab.logprobs.reference import FrozenCopy, mismatch
from trimtab.logprobs.scored import Pairs, Rollouts, Thumbs
from trimtab.objectives import methods
from trimtab.objectives.base import Objective
from trimtab.objectives.check import _batch, _gradient
from trimtab.objectives.cringe import CRINGE
from trimtab.objectives.dpop import DPOP
from trimtab.objectives.ipo import IPO
from trimtab.objectives.kto import KTO
from trimtab.objectives.ln_dpo import LNDPO
from trimtab.objectives.offline_ppo import OfflinePPO
from trimtab.objectives.orpo import ORPO
from trimtab.objectives.pro import PRO
from trimtab.objectives.rrhf import RRHF
from trimtab.objectives.sft import SFT
from trimtab.objectives.simpo import SimPO
from trimtab.objectives.tdpo2 import TDPO2
from trimtab.objectives.todo import TODO
from trimtab.tokens.batch import Example
from trimtab.update.measure import measure
from trimtab.update.weights import no_dropout

ROOT, TESTS = Path(trimtab.__file__).parents[1], Path(__file__).parent
OFFLINE = {name: cls for name, cls in methods().items() if cls.feedback is not Rollouts and not cls.partner}
MODES: tuple[Mode, ...] = ("shared", "packed", "padded")


# --- options and names (33.1, 33.2, 33.7, 33.14 to 33.17, 33.19; 8, 11) -----------------------------------------------------


@pytest.mark.parametrize(
    ("method", "option", "owner"),
    [
        ("dpo", "label_smoothing", "cdpo"),  # TRL from 0.29 takes it and does nothing
        ("ipo", "label_smoothing", "cdpo"),
        ("simpo", "nll_weight", "cpo"),  # ms-swift's SimPO has it at 1
        ("dpo", "f_divergence", "f_dpo"),  # TRL pushes its scores into hinge, ipo, nca and sppo
        ("nca", "f_divergence", "f_dpo"),
        ("apo_down", "f_divergence", "f_dpo"),
        ("ipo", "beta", "dpo"),
    ],
)
def test_an_option_is_refused_where_the_formula_has_no_place_for_it(method: str, option: str, owner: str) -> None:
    with pytest.raises(
        ConfigError, match=rf'"{option}" has no effect for method {method}; it belongs to .*\b{owner}\b'
    ):
        resolve({"data": "x.jsonl", "method": method, option: "0.1"})


# what these change is not in the loss of one batch of random numbers
ELSEWHERE = {
    "cringe rivals": "test_traps.py::test_a_rival_is_never_the_token_itself",
    "pairwise_cringe rivals": "test_traps.py::test_a_rival_is_never_the_token_itself",
    "cringe detach_rival": "objectives/test_cringe.py::test_a_detached_rival_has_no_gradient",
    "pairwise_cringe detach_rival": "objectives/test_cringe.py::test_a_detached_rival_has_no_gradient",
    "k_wise_reward average": "objectives/test_k_wise_reward.py::test_tied_pairs_are_dropped_and_not_counted",
    "process_reward supervise": "objectives/test_process_reward.py::test_outcome_supervision_counts_the_last_step_in_training_only",  # noqa: E501
    "kto balance": "objectives/test_kto.py::test_weights_from_the_class_counts",
    "apo_zero_unpaired balance": "objectives/test_kto.py::test_weights_from_the_class_counts",
}
SOFT = {"temperature": 0.5}  # the default of 1e-4 makes the best answer certain, whatever the scores


def seen_of(o: Objective) -> tuple[Any, ...]:
    """Everything that a hyperparameter can change: gradient, loss, denominator, memory after two batches."""
    slope, _, view = _gradient(o)
    memory = o.remember(_batch(o, scale=3.0)[0], o.remember(view, {}))
    kept = {k: v.item() for k, v in memory.items()}
    return slope.tolist(), o.loss(view).tolist(), o.size(view).tolist(), kept


@pytest.mark.parametrize("name", OFFLINE)
def test_every_option_does_something(name: str) -> None:
    cls = OFFLINE[name]
    base = cls(**SOFT) if name in ("info_nca", "nca_list") else cls()
    before, idle = seen_of(base), set()
    for other in list(variants(cls))[1:]:  # the first are the defaults
        (field,) = (f.name for f in dataclasses.fields(cls) if getattr(other, f.name) != f.default)
        if seen_of(dataclasses.replace(base, **{field: getattr(other, field)})) == before:
            idle.add(f"{name} {field}")
    assert idle == {k for k in ELSEWHERE if k.split()[0] == name}


def test_every_name_is_a_loss_of_its_own() -> None:
    """ms-swift ran sigmoid for ipo and hinge, TDPO's command for TDPO2 trains TDPO1, ALMA's CPO is ARPO, beta-DPO's default
    is DPO. At one beta no two methods agree, but for GPO, whose default function is DPO's."""
    found: dict[str, list[str]] = {}
    for name, cls in OFFLINE.items():
        o = cls(**{f.name: 0.1 for f in dataclasses.fields(cls) if f.name in ("beta", "tau")})
        losses = [f"{x:.9g}" for x in o.loss(_batch(o)[0]).tolist()]
        found.setdefault(f"{cls.feedback.__name__} {losses}", []).append(name)
    assert [names for names in found.values() if len(names) > 1] == [["dpo", "gpo"]]
    assert not {"aot_pair", "bco_pair", "hinge", "sigmoid"} & methods().keys()  # names that have changed their meaning


@pytest.mark.parametrize("name", OFFLINE)
def test_a_recipe_trains_what_it_says(name: str) -> None:
    recipe = str(ROOT / "trimtab" / "recipes" / f"{name}.yaml")
    for config in (resolve({"data": "x.jsonl", "method": name}), resolve({"data": "x.jsonl"}, recipe)):
        assert type(config.objective()) is OFFLINE[name]
    assert resolve({"data": "x.jsonl", "method": name}).objective() == OFFLINE[name]()


def test_the_width_of_the_tie_band_has_one_default() -> None:
    """TODO's repository has three: -0.5 in its configurations, -0.2 in its parser, -0.7 in its class."""
    recipe = resolve({"data": "x.jsonl"}, str(ROOT / "trimtab" / "recipes" / "todo.yaml"))
    assert recipe.objective().alpha == resolve({"data": "x.jsonl", "method": "todo"}).objective().alpha == TODO().alpha  # type: ignore[attr-defined]


def test_no_peer_is_needed() -> None:
    """What a peer moves or removes (SimPO, CPO and ORPO to trl.experimental, RunningMoments altogether) breaks nothing."""
    peers = {"trl", "swift", "llamafactory", "openrlhf", "verl", "open_instruct", "liger_kernel", "unsloth"}
    imported = set()
    for file in (ROOT / "trimtab").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import():
                    imported |= {a.name.partition(".")[0] for a in node.names}
                case ast.ImportFrom(module=str(module)):
                    imported.add(module.partition(".")[0])
    assert "torch" in imported and not imported & peers
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not {re.split(r"\W", n)[0] for n in needed} & peers


# --- which tokens count (33.21; 1, 8, 15, 18; F.2) --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_orpo_counts_the_answer_and_nothing_else(mode: Mode, tmp_path: Path) -> None:
    """Its authors' mask takes in a position after the answer, loses the end token where it is the padding too, and puts the
    prompt into the likelihood. Here with end tokens (2) in prompts and padding's id (0) in answers, against a flat script.
    """
    said = (Message("user", "?"),)
    examples = [
        Example((5, 2, 6, 0), ((7, 0, 8, 2), (9, 2)), Comparison(said, "a", "b")),
        Example((0, 2), ((2,), (4, 5, 6, 7, 2)), Comparison(said, "a", "b")),
    ]
    model = tiny.model()
    flat = copy.deepcopy(model)
    chosen, rejected, n_chosen, n_rejected = logps_of_pairs(flat, examples)
    a, b = chosen / n_chosen, rejected / n_rejected
    log_odds_ratio = a - torch.log(1 - a.exp()) - b + torch.log(1 - b.exp())
    loss = -chosen.sum() / n_chosen.sum() - 0.3 * logsigmoid(log_odds_ratio).mean()
    loss.backward()
    found = step(engine(model, ORPO(odds_weight=0.3), examples, tmp_path, mode=mode))
    assert_same(found, (loss.item(), gradients(flat)))
    assert n_chosen.tolist() == [4, 1] and n_rejected.tolist() == [2, 5]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (SimPO(beta=2.0), -1.0),
        (LNDPO(beta=5.0), 0.5),
        (IPO(tau=0.1), 0.01),
        (RRHF(), -0.5),
        (PRO(), -0.5),
        (SFT("sequence_mean"), -0.5),
        (ORPO(), -0.5 - math.log(1 - math.exp(-0.5))),
    ],
    ids=lambda o: o.name() if isinstance(o, Objective) else "",
)
def test_a_certain_token_is_part_of_the_length(objective: Objective, expected: float) -> None:
    """HALOs divides by the tokens whose log-prob (or log-ratio) is not 0. Log-probs -1 and 0, log-ratios 0.2 and 0."""
    assert objective.reward(completions([[-1.0, 0.0]], [[-1.2, 0.0]])).item() == exactly(expected)


# --- policy and reference on one path (0.2; 3, 6, 12; F.1) -------------------------------------------------------------------


def with_dropout(kind: str) -> Any:
    """A model whose configuration asks for dropout of 1/2 everywhere."""
    config = model_of(kind).config
    rates = [k for k, v in vars(config).items() if "drop" in k and isinstance(v, float | int)]
    for name in rates:
        setattr(config, name, 0.5)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", [*SHARED, *(k for k in FALLS_BACK if k != "mamba")])  # which has none
def test_dropout_is_off(kind: str) -> None:
    """Else the policy that learns and the reference are two models at step 0."""
    model, ids = with_dropout(kind), torch.tensor([[5, 6, 7, 8, 9, 10]])
    no_dropout(model)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(model.train()(input_ids=ids, use_cache=False).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_log_ratios_are_0_at_the_start(mode: Mode, dtype: torch.dtype, tmp_path: Path) -> None:
    """In the pass that learns, of a model that would drop half of everything. DPOP multiplies what is below 0 by 50; sums
    of bfloat16 numbers would be far from 0, so log-probs are float32 at least."""
    model = with_dropout("gpt2").to(torch.promote_types(dtype, torch.float32))
    no_dropout(model)
    examples = tiny.examples(Comparison, 6, seed=3)
    trainer = engine(model, DPOP(), examples, tmp_path, mode=mode, budget=40, dtype=dtype, reference=frozen(model))
    trainer.reference = FrozenCopy(model, trainer.scorer, dtype, "a test")
    loss, _ = step(trainer)
    told = trainer.tally.means()
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert told["rewards/chosen"] == told["rewards/rejected"] == told["rewards/accuracies"] == 0
    assert trainer.scored(examples).logp.dtype == torch.promote_types(dtype, torch.float32)


def test_probabilities_of_the_reference_that_underflow(tmp_path: Path) -> None:
    """TDPO's authors take softmax().log(): 0 times minus infinity."""
    model, other = tiny.model(torch.float32), tiny.model(torch.float32, seed=1)
    other.get_input_embeddings().weight.data *= 30  # the head too
    examples = tiny.examples(Comparison, 4, seed=2)
    with torch.no_grad():
        p = distributions(other, [(e.prompt, c) for e in examples for c in e.completions])[0].softmax(-1)
    assert (p == 0).any() and (p * p.log()).isnan().any()
    reference = frozen(other, "shared", torch.float32)
    trainer = engine(model, TDPO2(), examples, tmp_path, dtype=torch.float32, reference=reference)
    loss, slopes = step(trainer)
    assert math.isfinite(loss) and all(g.isfinite().all() and g.any() for g in slopes.values())
    assert trainer.tally.means()["kl/chosen"] > 0


# --- thumbs: what is mismatched, batches of one kind, the precision of z0 (A.1, A.2, A.5; F.4) -------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_no_answer_is_matched_with_its_own_prompt(n: int) -> None:
    """Reversed order (TRL once) leaves the middle one matched, microbatches of 1 (HALOs) every one. And the answers are the
    batch's own, each once (LLaMA-Factory draws them from elsewhere)."""
    batch = tiny.examples(Thumb, n)
    found = mismatch(batch)
    assert [m.prompt for m in found] == [e.prompt for e in batch]
    assert all(m.completions != e.completions for m, e in zip(found, batch, strict=True))
    assert sorted(m.completions for m in found) == sorted(e.completions for e in batch)


def test_two_answers_to_one_prompt_are_not_matched_across() -> None:
    """In a file of pairs they are neighbours: the answer of the next row would belong to this prompt."""
    rows = tiny.examples(Thumb, 6)
    batch = [Example(rows[i - i % 2].prompt, e.completions, e.record) for i, e in enumerate(rows)]
    own = {(e.prompt, e.completions) for e in batch}
    assert len(mismatch(batch)) == 6 and not own & {(m.prompt, m.completions) for m in mismatch(batch)}


def row_of(prompt: int, answer: int, up: bool) -> Example:
    """A thumb of these many tokens."""
    ids = [3 + i % 90 for i in range(prompt + answer)]
    return Example(tuple(ids[:prompt]), ((*ids[prompt + 1 :], 2),), Thumb((Message("user", "?"),), "a", desirable=up))


def test_mismatched_rows_are_no_longer_than_the_data(tmp_path: Path) -> None:
    """x_i with y_j may be longer than any row: GPT-2 has no position for what exceeds its context (128 here)."""
    model = model_of("gpt2")
    examples, reference = [row_of(100, 20, True), row_of(20, 100, False)], frozen(model, "shared", torch.float32)
    assert step(engine(model, KTO(), examples, tmp_path, reference=reference, dtype=torch.float32))[0] > 0


def test_the_reference_point_has_the_precision_of_the_run() -> None:
    """HALOs puts it through torch.Tensor([...]), which rounds to float32."""
    z0 = KTO().baseline(thumbs([0.5], [True], [0.1, 0.3]))
    assert z0.dtype == torch.float64 and z0.item() == exactly(0.2)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("name", [name for name, cls in OFFLINE.items() if cls.feedback is Thumbs])
def test_a_batch_of_one_kind(name: str, up: bool, tmp_path: Path) -> None:
    """A mean over the rows that are not there is NaN; sums and counts are not."""
    objective = OFFLINE[name]()
    batch = [
        dataclasses.replace(e, record=dataclasses.replace(e.record, desirable=up))  # type: ignore[call-arg]
        for e in tiny.examples(Thumb, 4)
    ]
    for budget in (1, WHOLE):
        trainer = engine(tiny.model_for(objective), objective, batch, tmp_path, budget=budget)
        loss, slopes = step(trainer)
        told = trainer.tally.means()
        assert math.isfinite(loss) and all(g.isfinite().all() for g in slopes.values())
        assert all(map(math.isfinite, told.values())) and f"rewards/{'rejected' if up else 'chosen'}" not in told


def test_one_token_in_all_is_whitened(tmp_path: Path) -> None:
    batch = [Example((5, 6), ((2,),), Thumb((Message("user", "?"),), "a", desirable=True))]
    loss, slopes = step(engine(tiny.model_for(OfflinePPO()), OfflinePPO(), batch, tmp_path))
    assert math.isfinite(loss) and all(g.isfinite().all() for g in slopes.values())


@pytest.mark.parametrize("ids", [(0, 0, 0), (1, 1, 1), (0, 1, 2)])
def test_contrast_whatever_the_token_ids_are(ids: tuple[int, ...], tmp_path: Path) -> None:
    """ParlAI drops the contrast on bad answers where the padding's id is 1, on good ones where it is 0."""
    said = (Message("user", "?"),)
    batch = [Example((5, 6), (ids,), Thumb(said, "a", desirable=False))]
    model = tiny.model()
    flat = copy.deepcopy(model)
    loss = flat_thumbs.cringe(flat, batch, 0.7)
    loss.backward()
    found = step(engine(model, CRINGE(alpha=0.7), batch, tmp_path))
    assert_same(found, (loss.item(), gradients(flat)))
    assert found[0] > 1e-3


@pytest.mark.parametrize("name", ["cringe", "pairwise_cringe"])
def test_a_rival_is_never_the_token_itself(name: str, tmp_path: Path) -> None:
    """Not even where it is drawn from the whole vocabulary; from more than that nothing is drawn."""
    logp, target = torch.randn(4, 6).log_softmax(-1), torch.tensor([0, 5, 2, 2])
    drawn = torch.stack([rival(logp, target, 5 * torch.randn(4, 6)) for _ in range(200)])
    assert not (drawn == target).any() and all(len(row.unique()) == 5 for row in drawn.T)
    cls = OFFLINE[name]
    examples = tiny.examples(cls.feedback.record, 4)
    found = [step(engine(tiny.model(), cls(rivals=k), examples, tmp_path))[0] for k in (1, 20, tiny.VOCAB)]  # type: ignore[call-arg]
    assert len(set(found)) == 3 and all(map(math.isfinite, found))
    with pytest.raises(RuntimeError, match="out of range"):  # of topk, in torch's words
        step(engine(tiny.model(), cls(rivals=tiny.VOCAB + 1), examples, tmp_path))  # type: ignore[call-arg]


# --- what is logged (19, A.1; F.8, F.9) ----------------------------------------------------------------------------------


def policy_methods(view: type) -> Iterator[Any]:
    for name, cls in OFFLINE.items():
        if cls.feedback is view and "score" not in cls.needs:
            yield pytest.param(cls(), id=name)


@pytest.mark.parametrize("objective", policy_methods(Pairs))
def test_names_that_users_search_for(objective: Objective) -> None:
    batch, _, _ = _batch(objective)
    told = measure(objective, batch)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= told.keys()
    assert {"logps/chosen", "logps/rejected"} <= told.keys()
    assert torch.equal(told["rewards/margins"], told["rewards/chosen"] - told["rewards/rejected"])


@pytest.mark.parametrize("name", ["dpo", "kto", "bco", "bce", "dpop", "tdpo1", "tdpo2", "wpo", "aot", "dno", "nca"])
def test_rewards_are_beta_times_the_log_ratio(name: str) -> None:
    """HALOs logs KTO's without beta, the authors of TDPO with the KL, turbo-alignment DPOP's with the penalty."""
    cls = OFFLINE[name]
    objective = cls(beta=0.3)  # type: ignore[call-arg]
    batch, y, _ = _batch(objective)
    told, rho = measure(objective, batch), 0.3 * y.log_ratio
    if cls.feedback is Pairs:
        clear = ~batch.tie
        up, down = rho[0::2][clear], rho[1::2][clear]
    else:
        up, down = rho[batch.desirable], rho[~batch.desirable]
        assert name != "kto" or told["kl"].item() == pytest.approx(KTO().baseline(batch).item())
    assert torch.allclose(told["rewards/chosen"], up) and torch.allclose(told["rewards/rejected"], down)


@pytest.mark.parametrize("tie", [True, False])
def test_ties_and_wins_that_are_not_there_are_not_averaged(tie: bool, tmp_path: Path) -> None:
    """TODO's code divides by the number of ties in the batch."""
    batch = [
        dataclasses.replace(e, record=dataclasses.replace(e.record, tie=tie))  # type: ignore[call-arg]
        for e in tiny.examples(Comparison, 4)
    ]
    trainer = engine(tiny.model(), TODO(), batch, tmp_path)
    loss, _ = step(trainer)
    told = trainer.tally.means()
    assert math.isfinite(loss) and all(map(math.isfinite, told.values()))
    assert ("accuracies/tie" in told) == tie and ("rewards/chosen" in told) != tie


def test_scores_that_are_no_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [1.5, math.nan, None, math.inf, True, 0]
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "completion": f"a{i}", "score": s}) + "\n" for i, s in enumerate(rows)))  # fmt: skip  # noqa: E501
    reading = read(file)
    assert [r.score for r in reading.records] == [1.5, 0] and sum(reading.dropped.values()) == 4  # type: ignore[attr-defined]
    assert any("not a finite number" in reason and n == 2 for reason, n in reading.dropped.items())


# --- the page -------------------------------------------------------------------------------------------------------------

# the traps of the two lists, by a word that their rows must hold
SECTION_33 = [
    "label_smoothing", "alpha", "bco_pair", "aot_pair", "IPO", "hinge", "experimental", "0.29", "SimPO", "WPO", "SLiC",
    "NaN", "CSFT", "theta", "ARPO", "TDPO1", "EXO", "OpenRLHF", "LogExpLoss", "PRO", "ORPO",
]  # fmt: skip
SECTION_F = [
    "float32", "end token", "cut", "baseline", "mean", "evaluation", "sampler", "number", "rewards/chosen",
]  # fmt: skip
LATER = "## To be shown with the online methods"


@cache
def page() -> tuple[dict[str, list[str]], str]:
    """Rows of the tables, number -> (trap, where, what trimtab does, tests); and what is left for later."""
    text, _, later = (ROOT / "docs" / "traps.md").read_text().partition(LATER)
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if line.startswith("|") and (number := re.match(r"(\d+|[A-F])(\.\d+)*[a-z]? ", cells[0])):
            assert len(cells) == 4, line
            assert number[0].strip() not in rows, f"{number[0]}twice"
            rows[number[0].strip()] = cells
    return rows, later


def names_in(file: Path) -> set[str]:
    return {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}


def test_both_lists_of_traps_are_on_the_page() -> None:
    rows, later = page()
    numbered = {f"33.{i}": word for i, word in enumerate(SECTION_33, 1)} | {f"F.{i}": w for i, w in enumerate(SECTION_F, 1)}  # fmt: skip  # noqa: E501
    for number, word in numbered.items():
        told = " ".join(rows.get(number, [])) or "".join(
            re.findall(rf"^- {re.escape(number)} .*(?:\n  .*)*", later, re.M)
        )
        assert word in told, f"{number} {word}"
    assert len(SECTION_33) == 21 and [n for n in rows if n.startswith("33.")] == list(numbered)[:21]


def test_every_test_named_on_the_page_is_there() -> None:
    rows, _ = page()
    named = [(number, test) for number, cells in rows.items() for test in re.findall(r"`([^`]+)`", cells[3])]
    assert {number for number, _ in named} == rows.keys(), "a trap without a test"
    for number, test in [*named, *ELSEWHERE.items()]:
        file, _, name = test.partition("::")
        assert (TESTS / file).is_file() and name in names_in(TESTS / file), f"{number}: there is no {test}"


def test_every_test_of_this_file_is_on_the_page() -> None:
    named = " ".join(cells[3] for cells in page()[0].values())
    ours = names_in(Path(__file__))
    about_the_page = {"test_both_lists_of_traps_are_on_the_page", "test_every_test_named_on_the_page_is_there", "test_every_test_of_this_file_is_on_the_page"}  # fmt: skip  # noqa: E501
    assert {n for n in ours if n.startswith("test_")} - about_the_page == set(
        re.findall(r"test_traps\.py::(\w+)", named)
    )
