"""Rounds through the command's own run: what each kind of method gets, what is kept, what is found again after kill -9."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.judges.server import Reply, serving
from tests.judges.test_endpoint import SHOWN
from tests.objectives.by_hand import credited, gradient, rollouts
from tests.tiny_folder import feedback_file, workplace
from trimtab.config import resolve
from trimtab.errors import CheckFailed, ConfigError, DataError
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Demonstration, Ranking, Score, Thumb
from trimtab.judges.base import Failure, Scores
from trimtab.logprobs.score import Scorer, install
from trimtab.logprobs.scored import Rollouts
from trimtab.models import end_tokens
from trimtab.objectives import methods, objective_class
from trimtab.objectives.check import _batch
from trimtab.objectives.kto import KTO
from trimtab.online.kept import Drawn, Kept
from trimtab.online.rounds import Plan, Rounds
from trimtab.online.sample import Answer
from trimtab.prepare import prepare_prompts
from trimtab.run import train
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template
from trimtab.update.trainer import Update

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROOT = Path(__file__).parents[2]
JUDGE = '''
def vowels(prompt, answer):
    """Share of vowels, in tenths; never twice the same noise."""
    return round(sum(c in "aeiouAEIOU" for c in answer) / max(len(answer), 1), 1)

def alike(prompt, answer):
    return 1.0

def letters(prompt, answer):
    """Hardly ever alike."""
    return sum(map(ord, answer)) % 97 / 97

def moody(prompt, answer):
    """Fails on one answer in four, by its content."""
    if len(answer) % 4 == 0:
        raise ValueError("not today")
    return float(len(answer) % 5)
'''


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    workplace(tmp_path, monkeypatch)
    feedback_file(tmp_path / "comparison.jsonl", "comparison", 20)
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def options(name: str, **more: Any) -> dict[str, Any]:
    return {
        "data": "comparison.jsonl",
        "method": name,
        "judge": "rule:judge.py:vowels",
        "model": "./model",
        "finetune": "full",
        "precision": "float32",
        "rounds": 2,
        "prompts_per_round": 4,
        "answers": 3,
        "batch_size": 2,
        "learning_rate": 0.003,
        "samples": 2,
        "sample_tokens": 6,
        "threads": 1,
        **more,
    }


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def steps(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r]


@pytest.mark.parametrize(
    ("method", "expected"),
    [("rloo", 4), ("dpo", 4), ("todo", 4), ("kto", 12), ("sft", 4), ("plackett_luce", 4), ("dro", 12)],
)
def test_every_kind_of_method_learns_from_rounds(method: str, expected: int) -> None:
    """4 prompts with 3 answers: as many rollouts, pairs of best and worst, rankings, best answers; or 12 thumbs, scores."""
    folder = train(resolve(options(method, output="run", judge="rule:judge.py:letters")))
    logged = steps(folder)
    assert card(folder)["status"] == "finished" and len(logged) == 2 * expected // 2
    assert {"reward", "completions/mean_length", "frac_reward_zero_std"} <= logged[0].keys()
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in logged)
    for number in ("0001", "0002"):
        reading = read(str(folder / "rounds" / number / "records.jsonl"))
        assert len(reading.records) == 12 and all(isinstance(r, Score) for r in reading.records)
    assert "reward_gain" in card(folder)["samples"]  # the judge is a rule: the held-out reward is known


def test_the_first_round_is_on_policy() -> None:
    """RLOO, one pass: the ratio is 1 in every first step of a round, so the loss is minus the mean advantage, 0; no KL yet."""
    first, *_ = steps(train(resolve(options("rloo", output="run", batch_size=4, rounds=1))))
    assert first["loss"] == pytest.approx(0, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["sampler_gap"] < 1e-4


def test_passes_leave_the_policy_behind() -> None:
    """In the second pass the policy has moved from the one that sampled: the loss is not 0 any more, the data is the same."""
    logged = steps(train(resolve(options("rloo", output="run", batch_size=4, rounds=1, passes=3))))
    assert len(logged) == 3 and abs(logged[0]["loss"]) < 1e-6 < abs(
        logged[2]["loss"]
    )  # the rate of the first step is 0
    assert logged[0]["reward"] == logged[2]["reward"]


def test_all_rounds_are_kept() -> None:
    """12 thumbs a round: the second round's step learns from 24, the third's from 36."""
    seen: list[int] = []
    learn = Update.training_step

    def count(self: Update, model: Any, inputs: Any, n: Any = None) -> Any:
        seen.append(len(inputs))
        return learn(self, model, inputs, n)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Update, "training_step", count)
        more = {"judge": "rule:judge.py:letters", "rounds": 3, "keep_rounds": "all", "batch_size": 12}
        train(resolve(options("kto", output="run", **more)))
    assert seen == [12, 24, 36]


def test_the_first_round_is_looked_at_as_a_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    """One-sided thumbs stop the run; what is odd is said once and kept, also by the run that is resumed."""
    with pytest.raises(DataError, match=r"round 1: all 12 thumbs point up; kto needs both .* \(score_threshold"):
        train(resolve(options("kto", output="alike", judge="rule:judge.py:alike")))
    values = options("kto", output="run", judge="rule:judge.py:letters", undesirable_weight=3.0, save_every=1)
    folder = train(resolve(values), console=Console())
    (note,) = [n for n in card(folder)["data"]["notes"] if n.startswith("round 1: ")]
    assert note.startswith("round 1: lambda_D n_D / (lambda_U n_U) = 0.") and "12" not in note
    said = "".join(capsys.readouterr().out.split())
    assert said.count("".join(note.split())) == 1
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    train(resolve({**values, "resume": True}))
    assert [n for n in card(folder)["data"]["notes"] if n.startswith("round 1: ")] == [note]


@pytest.mark.parametrize("method", ["plackett_luce", "rrhf"])
def test_lists_with_ties_are_left_out_where_they_have_no_probability(method: str) -> None:
    values = {"rounds": 1, "prompts_per_round": 12, "batch_size": 12}
    folder = train(resolve(options(method, output="run", **values)))
    kinds = {1: 0, 2: 0, 3: 0}  # prompts by how many different scores the three answers have
    for said in Kept(folder / "rounds" / "0001").judged().values():
        kinds[len(set(said.scores))] += 1  # type: ignore[union-attr]
    assert kinds[2] and kinds[3]
    left_out = kinds[1] + (kinds[2] if method == "plackett_luce" else 0)
    assert steps(folder)[0]["lists/left_out"] == left_out
    examples = json.loads((folder / "rounds/0001/round.json").read_text())
    assert examples["lists/left_out"] == left_out


def test_weights_follow_from_the_labels_of_each_round() -> None:
    """KTO's balance: paper. n_D = up, n_U = 12 - up of this round: with w = 5/4 n_U/n_D, lambda_D = max(w, 1), lambda_U =
    max(1/w, 1). The weights that a run is resumed with are those of its round."""
    more = {"balance": "paper", "score_threshold": 0.6, "judge": "rule:judge.py:letters", "rounds": 3, "save_every": 7}
    values = options("kto", output="run", learning_rate=0.05, **more)
    used: dict[int, KTO] = {}
    learn = Update.training_step

    def note(self: Update, model: Any, inputs: Any, n: Any = None) -> Any:
        used[self.batches.current] = self.objective  # type: ignore[assignment]
        return learn(self, model, inputs, n)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Update, "training_step", note)
        folder = train(resolve(values))
        counts = []
        for number in range(3):
            records = read(str(folder / f"rounds/{number + 1:04d}/records.jsonl")).records
            up = sum(r.score >= 0.6 for r in records if isinstance(r, Score))
            weight = 5 / 4 * (12 - up) / up
            wanted = (max(weight, 1), max(1 / weight, 1))
            assert (used[number].desirable_weight, used[number].undesirable_weight) == pytest.approx(wanted)
            logged = steps(folder)[6 * number]
            told = {k: v for k, v in logged.items() if k.startswith("settled/")}
            names = ("settled/desirable_weight", "settled/undesirable_weight")
            assert told == pytest.approx({n: w for n, w in zip(names, wanted, strict=True) if w != 1})
            counts.append(up)
        assert len(set(counts)) > 1 and 0 not in counts and 12 not in counts
        before, after = used.copy(), (folder / "model.safetensors").read_bytes()
        used.clear()
        shutil.rmtree(folder / "checkpoints" / "checkpoint-18")
        train(resolve({**values, "resume": True}))  # from step 14 of 18, in the third round
    assert used == {2: before[2]} and (folder / "model.safetensors").read_bytes() == after


def test_failures_are_counted_and_never_losses() -> None:
    folder = train(resolve(options("dpo", output="run", judge="rule:judge.py:moody", rounds=3)))
    failed = 0
    for number in (1, 2, 3):
        kept = Kept(folder / "rounds" / f"{number:04d}")
        judged = [s for j in kept.judged().values() if isinstance(j, Scores) for s in j.scores]
        bad = [s for s in judged if isinstance(s, Failure)]
        failed += len(bad)
        assert all(f.reason == "the rule raised ValueError" for f in bad)
        records = read(str(kept.records)).records
        assert len(records) == len(judged) - len(bad)
        told = json.loads((kept.folder / "round.json").read_text())
        assert told["judge/failed"] == len(bad) == sum(told["judge"]["failed"].values())
    assert failed > 0


def test_a_round_that_teaches_nothing_says_so() -> None:
    with pytest.raises(DataError, match="round 1: nothing can be learned from the answers to 4 prompts"):
        train(resolve(options("dpo", output="run", judge="rule:judge.py:alike")))


def test_sampler_and_engine_that_differ_stop_the_run() -> None:
    with pytest.raises(CheckFailed, match="sampler and engine differ by .* nats a token"):
        train(resolve(options("rloo", output="run", largest_gap=1e-12)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"judge": None}, "rloo learns from answers that the policy samples: say who judges them"),
        ({"sample_temperature": 0.7}, "the engine computes it at temperature 1"),
        ({"epochs": 2}, 'The option "epochs" has no effect here: the answers are sampled'),
        ({"reference": "cache"}, "reference: cache holds answers of a file"),
        ({"overlong_penalty": 0.5}, 'The option "overlong_penalty" has no effect here: overlong_buffer is 0'),
        ({"overlong_buffer": 7}, "overlong_buffer is 7 and an answer has 6 tokens at most"),
        ({"pairs": "all"}, 'The option "pairs" has no effect here: rloo does not learn from pairs'),
        ({"method": "dpo", "correct_sampling": 2.0}, "dpo learns from records, not from rollouts"),
        ({"method": "reward_model"}, "reward_model trains a reward model, which answers nothing"),
    ],
)
def test_refused(more: dict[str, Any], message: str) -> None:
    values = {k: v for k, v in options("rloo", **more).items() if v is not None}
    if more.get("judge", "") is None:
        values = {k: v for k, v in values.items() if k not in ("rounds", "prompts_per_round", "answers")}
    if more.get("method") == "reward_model":
        values = {k: v for k, v in values.items() if k not in ("samples", "sample_tokens")}
    with pytest.raises(ConfigError, match=message):
        resolve(values)


def test_options_of_rounds_need_a_judge() -> None:
    with pytest.raises(ConfigError, match='The option "answers" has no effect here: nothing is sampled'):
        resolve({"data": "comparison.jsonl", "answers": 2})


# --- the plan, by hand ----------------------------------------------------------------------------------------------------


def test_steps_of_a_round() -> None:
    plan = Plan(prompts=10, answers=4, passes=2, batch_size=8, longest=20, seed=0)
    kinds = (Ranking, Demonstration, Comparison, Thumb, Score)
    assert [plan.examples(k) for k in kinds] == [10, 10, 10, 40, 40]
    assert [plan.steps(k) for k in kinds] == [4, 4, 4, 10, 10]
    every = Plan(prompts=10, answers=4, passes=1, batch_size=8, longest=20, seed=0, pairs="all")
    assert every.examples(Comparison) == 60 and every.steps(Comparison) == 8


def test_penalties() -> None:
    """20 tokens at most, buffer 5 with factor 2: 15 tokens cost 0, 18 cost 2 * 3/5, 20 cost 2; not ending costs 1 more."""
    plan = Plan(1, 1, 1, 1, longest=20, seed=0, end_penalty=1.0, overlong=(5, 2.0), length_penalty=0.1)
    rounds = Rounds.__new__(Rounds)
    rounds.plan = plan
    answer = lambda n, ended: Answer((1,) * n, ended, (0.0,) * n)  # noqa: E731
    drawn = Drawn(0, (answer(15, True), answer(18, True), answer(20, True), answer(20, False)))
    judged = Scores((1.0, 1.0, 1.0, Failure("gone")))
    assert rounds._shaped(drawn, judged) == Scores(
        (pytest.approx(1 - 1.5), pytest.approx(1 - 1.8 - 1.2), pytest.approx(1 - 2 - 2), Failure("gone"))
    )
    assert rounds._penalty(drawn.answers[3]) == pytest.approx(2 + 2 + 1)


@pytest.mark.parametrize(
    ("method", "weights"),
    [("grpo", [1.2, 1.5, 0.5, 0.8, 1.6]), *((m, [1.6, 1.6, 0.8, 0.8, 0.8]) for m in ("rloo", "gspo", "nash_md"))],
)
def test_the_weight_against_another_sampler(method: str, weights: list[float]) -> None:
    """Ratios engine/sampler 1.2, 1.5 and 0.5, 0.8, 2; cap 1.6. By token: 2 is cut. By answer: 1.2 * 1.5 = 1.8 is cut, and
    0.5 * 0.8 * 2 = 0.8, for all tokens. What a method on answers makes of it is its own loss times the answer's weight.
    """
    rounds = Rounds.__new__(Rounds)
    rounds.plan = Plan(1, 2, 1, 1, longest=3, seed=0, largest_gap=1.0, correct_gap=1.6)
    objective, rounds.figures = objective_class(method)(), {}
    rounds.learner = SimpleNamespace(objective=objective)
    gap = torch.tensor([1.2, 1.5, 0.5, 0.8, 2.0], dtype=torch.float64).log()
    behaviour, scores = [[[-0.5, -1.0], [-2.0, -0.25, -0.75]]], [[1.0, 0.0]]
    batch = credited(objective, rollouts(behaviour, scores, behaviour))
    columns = dict(batch.columns)
    rounds._compare(gap, columns, batch.y)
    assert rounds.figures["sampler_gap"] == pytest.approx(gap.abs().mean().item())
    assert columns["advantage"].tolist() == pytest.approx((batch.advantage * torch.tensor(weights)).tolist())
    one, other = (gradient(objective, b, b.y)[0] for b in (batch, replace(batch, columns=columns)))
    assert other == pytest.approx((torch.tensor(one) * torch.tensor(weights)).tolist())  # on-policy: A is a factor


@pytest.mark.parametrize("name", [n for n, c in methods().items() if c.feedback is Rollouts])
def test_methods_say_whose_ratio_they_take(name: str) -> None:
    """The slope by one token depends on another token of its answer where the ratio is the whole answer's, and only there."""
    objective = objective_class(name)()
    batch = _batch(objective, everything=True)[0]
    at = int(batch.y.length.argmax())
    first, second, *_ = (batch.y.owner == at).nonzero().flatten().tolist()

    def slope(logps: torch.Tensor) -> float:
        view = replace(batch, y=batch.y.with_policy(logps.requires_grad_()))
        (found,) = torch.autograd.grad(objective.loss(view).sum(), view.y._token_logps)
        return float(found[first])

    later = batch.behaviour.clone()
    later[second] += 1e-4  # inside every clip
    assert (slope(later) != slope(batch.behaviour.clone())) == objective.by_answer


def test_prompts_come_in_turn() -> None:
    """Every prompt once in each lap, whatever the rounds' size; another seed, another order."""
    rounds = Rounds.__new__(Rounds)
    rounds.prompts, seen = [None] * 10, []  # type: ignore[list-item]
    rounds.plan = Plan(prompts=4, answers=1, passes=1, batch_size=1, longest=1, seed=3)
    for number in range(5):
        order = rounds._order(number)
        seen += [next(order) for _ in range(4)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_a_line_that_was_cut_short_is_no_line(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "0001")
    kept.add_drawn([Drawn(3, (Answer((1, 2), True, (-0.25, -1 / 3)),))])
    kept.add_judged({3: Scores((1 / 3, Failure("gone", "why")))})
    for name in ("samples", "judgements"):
        with (tmp_path / "0001" / f"{name}.jsonl").open("a") as f:
            f.write('{"place": 4, "answ')
    assert kept.drawn() == {3: Drawn(3, (Answer((1, 2), True, (-0.25, -1 / 3)),))}  # every bit of every number
    assert kept.judged() == {3: Scores((1 / 3, Failure("gone", "why")))}
    kept.add_judged({5: Scores((2.0,))})
    assert set(kept.judged()) == {3, 5}


# --- kill -9 --------------------------------------------------------------------------------------------------------------


def kill(values: dict[str, Any], moment: str, at: int) -> None:
    flags = [w for k, v in values.items() if k != "data" for w in (f"--{k}", str(v))]
    script = ROOT / "tests" / "reliability" / "killed.py"
    command = [sys.executable, str(script), moment, str(at), "train", values["data"], *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr[-3000:]


@pytest.mark.parametrize("method", ["rloo", "dpo"])
@pytest.mark.parametrize("moment", ["sampling", "judging", "learning"])
def test_killed_and_resumed_is_uninterrupted(method: str, moment: str) -> None:
    """Killed in the third round, with a checkpoint of the second: what was sampled and judged stands, weights are the same."""
    values = options(method, rounds=4, prompts_per_round=18, answers=8, save_every=3, batch_size=9, holdout=0.1)
    whole = train(resolve({**values, "output": "whole"}))
    kill({**values, "output": "killed"}, moment, 5 if moment == "learning" else 3)
    there = {f: f.read_bytes() for f in sorted(Path("killed/rounds").rglob("*.jsonl"))}
    assert any("0003" in str(f) for f in there)
    calls = Path("calls.txt")
    counted = "with open('calls.txt', 'a') as f:\n        f.write('x')\n    return round("
    Path("judge.py").write_text(JUDGE.replace("return round(", counted, 1))
    resumed = train(resolve({**values, "output": "killed", "resume": True}))
    for file, content in there.items():
        assert file.read_bytes().startswith(content)  # nothing was sampled or judged twice
    lines = lambda folder, name: sum(len(f.read_text().splitlines()) for f in folder.glob(f"rounds/*/{name}.jsonl"))  # noqa: E731
    assert lines(whole, "samples") == lines(resumed, "samples") == lines(resumed, "judgements") == 4 * 18
    judged_before = sum(c.count(b"\n") * 8 for f, c in there.items() if f.name == "judgements.jsonl")
    probes = 2 * 2 + 2  # samples before and after, and what was sampled before is asked about again
    assert 0 < len(calls.read_text()) <= 4 * 18 * 8 - judged_before + 2 * probes
    for name in ("records.jsonl", "samples.jsonl", "judgements.jsonl"):
        for a in sorted(whole.glob(f"rounds/*/{name}")):
            assert a.read_bytes() == (resumed / a.relative_to(whole)).read_bytes()
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    same = lambda rows: [{k: v for k, v in r.items() if k not in ("peak_memory_gb", "tokens_per_second")} for r in rows]  # noqa: E731
    for mine, other in zip(same(steps(whole)), same(steps(resumed)), strict=True):
        assert mine == other


# --- a partner -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finetune", "mix"), [("full", 1), ("lora", 1), ("lora", 0.5)])
def test_one_answer_more_from_the_reference(finetune: str, mix: float) -> None:
    """XPO's pairs: one answer of the policy, one of the start model, which is the target. After training they differ."""
    more = {"answers": 1, "partner_mix": mix, "finetune": finetune, "learning_rate": 0.05, "rounds": 3}
    folder = train(resolve(options("xpo" if mix == 1 else "dpo", output="run", **more)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    install(model, torch.float32, "padded")
    prompts = prepare(folder)
    drawn = list(Kept(folder / "rounds" / "0003").drawn().values())
    assert len(drawn) == 4 and all(len(d.answers) == 2 for d in drawn)
    rows = [Example(prompts[d.place], tuple(a.ids for a in d.answers), Demonstration((), "")) for d in drawn]
    logps, lengths = Scorer(model, "padded", 4096).score_all(rows)
    start = [part.sum().item() for part in logps.split(lengths.tolist())]
    told = [sum(a.logps) for d in drawn for a in d.answers]
    apart = [abs(a - b) for a, b in zip(start, told, strict=True)]
    assert tokenizer.eos_token_id is not None
    if mix == 1:
        assert max(apart[1::2]) < 1e-3  # the partner is the start model still
    else:
        assert max(apart[1::2]) > 1e-2  # between the two
    assert max(apart[0::2]) > 1e-2  # and the policy is not


def prepare(folder: Path) -> dict[int, tuple[int, ...]]:
    """Place -> prompt ids of a run's prompts."""
    config = resolve({}, str(folder / "config.yaml"))
    template = Template(AutoTokenizer.from_pretrained("model"), eos_ids=end_tokens("./model"))
    return {i: e.prompt for i, e in enumerate(prepare_prompts(config, config.objective(), template).train)}


def test_the_mixture_is_what_the_others_are_to_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nash-MD: each answer against the partner's, which is no example itself; scores are probabilities."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(prefers) as server:
        Path("judge.yaml").write_text(f"url: {server.url}\nmodel: m\nprompt: pairwise\n")
        more = {"answers": 2, "partner_mix": 0.5, "judge": "language:judge.yaml"}
        folder = train(resolve(options("nash_md", output="run", **more)))
    kept = Kept(folder / "rounds" / "0001")
    assert all(len(d.answers) == 3 for d in kept.drawn().values())
    assert len(server.requests) <= 2 * 2 * 4 * 2  # rounds, orders, prompts, own answers
    for judgement in kept.judged().values():
        assert isinstance(judgement, Scores)
        *own, partner = judgement.scores
        assert all(isinstance(p, float) and 0 <= p <= 1 for p in own)
        assert partner == pytest.approx(1 - sum(own) / 2)  # type: ignore[arg-type]
    assert len(read(str(kept.records)).records) <= 8


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("xpo", {}, "xpo learns from pairs of the policy's answer and the reference's"),
        ("xpo", {"partner_mix": 0.5}, "set judge, partner_mix: 1 and answers: 1"),
        ("simpo", {"partner_mix": 1}, "partner_mix samples from the reference, and simpo has none"),
        ("nash_md", {"partner_mix": 0.5}, "the judge gives each answer a number"),
    ],
)
def test_a_partner_that_cannot_be(method: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(resolve(options(method, output="run", **more)))


# --- a judge of pairs ------------------------------------------------------------------------------------------------------


def prefers(body: dict[str, Any], _: int) -> Reply:
    """More vowels is better; A, where it is shown first, gets 0.2 for its place."""
    answers = dict(SHOWN.findall(body["messages"][0]["content"]))
    worth = [sum(c in "aeiou" for c in answers[f"ANSWER {label}"]) for label in "AB"]
    p = 0.6 if worth[0] == worth[1] else 0.9 if worth[0] > worth[1] else 0.3
    return Reply("A" if p > 0.5 else "B", [("A" if p > 0.5 else "B", {"A": p, "B": 1 - p})])


@pytest.mark.parametrize(("method", "answers"), [("dpo", 2), ("todo", 2), ("kto", 3), ("rloo", 2)])
def test_a_language_model_judges_pairs(method: str, answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers to a method on pairs are asked about as a pair, in both orders; others each against each."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(prefers) as server:
        Path("judge.yaml").write_text(f"url: {server.url}\nmodel: m\nprompt: pairwise\n")
        folder = train(resolve(options(method, output="run", answers=answers, judge="language:judge.yaml")))
    asked = 2 * 2 * 4 * answers * (answers - 1) // 2
    assert len(server.requests) <= asked  # both orders, two rounds; answers that read alike are asked about once
    records = read(str(folder / "rounds/0001/records.jsonl")).records
    told = json.loads((folder / "rounds/0001/round.json").read_text())
    if method in ("dpo", "todo"):
        assert records and all(isinstance(r, Comparison) and 0.5 <= r.strength <= 1 for r in records)  # type: ignore[operator]
        assert told["judge/first_place"] > 0.5 and "reward" not in told
    else:
        assert records and all(isinstance(r, Score) and 0 <= r.score <= 1 for r in records)
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in steps(folder))


@pytest.mark.parametrize("strength", ["probability", "reward_difference"])
@pytest.mark.parametrize("judge", ["rule:judge.py:letters", "language:judge.yaml"])
def test_sppo_of_more_than_two_answers_has_no_strengths(judge: str, strength: str) -> None:
    """P(y_w beats the policy) and P(y_l beats it) are 1 together of two answers alone; their difference is not enough."""
    Path("judge.yaml").write_text("url: http://127.0.0.1:1/v1\nmodel: m\nprompt: pairwise\n")
    with pytest.raises(ConfigError, match=f"sppo has strength: {strength} .* Of 3 answers .* Set answers: 2"):
        train(resolve(options("sppo", output="run", judge=judge, strength=strength)))


@pytest.mark.parametrize("more", [{"answers": 2, "strength": "reward_difference"}, {"answers": 3}])
def test_sppo_of_scores(more: dict[str, Any]) -> None:
    """Of two answers P_w = sigma(s_w - s_l) and P_l = 1 - P_w, with hard labels P_w = 1: at policy = reference the first loss
    is the mean of (P_w - 1/2)^2 / beta^2."""
    values = {"judge": "rule:judge.py:letters", "beta": 0.5, "batch_size": 4, **more}
    folder = train(resolve(options("sppo", output="run", **values)))
    wins: list[float] = []
    for _, row in groupby(read(str(folder / "rounds/0001/records.jsonl")).records, key=lambda r: r.prompt):
        scores = sorted(r.score for r in row if isinstance(r, Score))
        wins.append(1 / (1 + math.exp(scores[0] - scores[-1])) if "strength" in more else 1.0)
    assert steps(folder)[0]["loss"] == pytest.approx(sum(4 * (p - 0.5) ** 2 for p in wins) / len(wins), rel=1e-4)


def test_a_judge_of_pairs_takes_no_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("judge.yaml").write_text("url: http://127.0.0.1:1/v1\nmodel: m\nprompt: pairwise\n")
    with pytest.raises(ConfigError, match="a judge of pairs gives no scores that a penalty could be subtracted from"):
        train(resolve(options("dpo", output="run", answers=2, judge="language:judge.yaml", end_penalty=1.0)))
