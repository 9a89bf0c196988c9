"""Trials end to end on a budget of nothing, and the tables that are made of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.compare.command import check_promises, compare, parse_arms, told
from trimtab.compare.measures import Shift, agreement, likelihoods, three_way, ties
from trimtab.compare.promises import PROMISES, Arm, Promise, judge
from trimtab.compare.results import Results
from trimtab.compare.runner import RATES, TUNING_SEEDS, run_all
from trimtab.compare.stats import gain
from trimtab.compare.table import promises_table
from trimtab.compare.trial import Budget, Trial, draw_pool, run
from trimtab.errors import ConfigError
from trimtab.feedback.records import Comparison, Demonstration, Ranking, Score, Thumb
from trimtab.judges.base import Question
from trimtab.objectives import methods
from trimtab.update.trainer import Update
from trimtab.world import model as world_model
from trimtab.world.asked import AskedJudge
from trimtab.world.judge import Judge
from trimtab.world.named import world

TINY = Budget(prompts=12, answers=4, steps=2, answers_per_step=8, held_out=6, held_out_answers=2)
TRIAL = Trial("plain", Judge(), "dpo", 1e-3, 0, budget=TINY)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path_factory.getbasetemp() / "trimtab-home"))


def test_same_budget_whatever_the_feedback() -> None:
    found = [Budget().batch_size(kind) for kind in (Comparison, Demonstration, Thumb, Score, Ranking)]
    assert found == [16, 16, 32, 32, 8]


@pytest.mark.parametrize("method", ["dpo", "kto", "sft", "simpo", "todo"])
def test_a_trial_trains_and_measures(method: str) -> None:
    found = run(replace(TRIAL, method=method, judge=Judge(tie_rate=0.3)))
    assert all(len(v) == 6 and np.isfinite(v).all() for v in found["prompts"].values())
    assert {"chosen_shift", "rejected_shift", "train_margin", "accuracy"} <= set(found["measures"])
    assert any(found["measures"][k] != 0 for k in ("chosen_shift", "rejected_shift"))
    start = found["terms"]
    total = sum(before for before, _ in start.values())
    assert total == pytest.approx(np.mean(found["prompts"]["utility_start"]))


def test_prompts_are_matched_and_references_move(tmp_path: Path) -> None:
    shifted = replace(TRIAL, method="bco", judge=Judge(prompt_shift=0.5), budget=replace(TINY, prompts=40))
    assert run(shifted)["prompts"]["kl"] != run(replace(shifted, options={"match_prompts": "tfidf"}))["prompts"]["kl"]
    trial = replace(TRIAL, budget=replace(TINY, steps=3))  # the rate of the first step is 0
    still, moved = run(trial), run(replace(trial, options={"reference_every": 1}))
    assert moved["prompts"]["kl"] != still["prompts"]["kl"]
    assert {**run(trial), "seconds": 0} == {**still, "seconds": 0}  # the shared reference did not move


def test_two_stages_and_two_beside_each_other() -> None:
    """Small steps add up: after SFT the change is the sum of both, merged it is their mean."""
    trial = replace(TRIAL, learning_rate=1e-6, budget=replace(TINY, steps=3))
    alone, after, merged = (run(replace(trial, options=o)) for o in ({}, {"after": "sft"}, {"merged_with": "sft"}))
    sft = run(replace(trial, method="sft"))
    first, second, both, mean = (r["measures"]["train_chosen_shift"] for r in (alone, sft, after, merged))
    assert both == pytest.approx(first + second, rel=0.1)
    assert mean == pytest.approx((first + second) / 2, rel=0.1)


@pytest.mark.parametrize(
    ("method", "options"), [("dpo", {"pairs": "all"}), ("rloo", {}), ("ppo", {"passes": 2}), ("kto", {})]
)
def test_rounds_use_up_the_budget(method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt once, its answers judged once, the optimiser's steps; what is judged is what the policy writes."""
    asked: list[Question] = []
    felt = AskedJudge.judgements
    monkeypatch.setattr(AskedJudge, "judgements", lambda self, qs: (asked.extend(qs), felt(self, qs))[1])
    steps: list[int] = []
    train = Update.train
    monkeypatch.setattr(Update, "train", lambda self: (train(self), steps.append(self.state.global_step))[0])
    budget = replace(TINY, steps=6)
    found = run(replace(TRIAL, method=method, options={"rounds": 3, **options}, budget=budget))
    assert steps == [6] and len(asked) == 12
    assert len({q.prompt[-1].content for q in asked}) == 12 and all(1 <= len(q.completions) <= 4 for q in asked)
    assert np.isfinite(found["prompts"]["kl"]).all() and np.std(found["prompts"]["kl"]) > 0
    start = {a for _, row in draw_pool(replace(TRIAL, budget=budget)).train for a in row}
    late = [a for q in asked[8:] for a in q.completions]
    assert len([a for a in late if a not in start]) > len(late) / 2


def test_rounds_that_do_not_fit_the_budget_or_the_world_are_refused() -> None:
    assert "divides both" in run(replace(TRIAL, options={"rounds": 5}))["failed"]
    told = run(replace(TRIAL, options={"rounds": 2}, judge=Judge(flip=0.2)))["failed"]
    assert "flip=0.2" in told and "temperature" in told


def test_control_tokens() -> None:
    found = run(replace(TRIAL, method="csft"))
    assert np.isfinite(found["measures"]["good_minus_bad"])
    assert np.isfinite(found["prompts"]["kl"]).all()


def test_a_policy_may_write_a_control_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start model has no such token until it is given one."""
    new = len(world_model.template().tokenizer)

    def written(model: Any, prompts: list[Any], per_prompt: int, seed: int) -> Any:
        return [[(new, 5, world_model.template().tokenizer.eos_token_id)] * per_prompt for _ in prompts]

    run(TRIAL)  # makes the pool
    monkeypatch.setattr(world_model, "answers", written)
    found = run(replace(TRIAL, method="csft"))
    assert np.isfinite(found["prompts"]["kl"]).all()


def test_a_trial_is_repeatable_and_its_start_is_shared() -> None:
    first, again, other = run(TRIAL), run(TRIAL), run(replace(TRIAL, method="simpo"))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["prompts"]["utility_start"] == other["prompts"]["utility_start"]
    assert first["prompts"]["utility"] != other["prompts"]["utility"]


def test_nothing_learned_is_nothing_changed() -> None:
    """A rate of (almost) 0: same answers under the same noise, no KL, no shift."""
    found = run(replace(TRIAL, learning_rate=1e-30))
    assert found["prompts"]["utility"] == found["prompts"]["utility_start"]
    assert found["prompts"]["words"] == found["prompts"]["words_start"]
    assert max(map(abs, found["prompts"]["kl"])) < 1e-3
    assert abs(found["measures"]["train_margin"]) < 1e-3


def test_a_run_that_diverges_is_a_result() -> None:
    found = run(replace(TRIAL, learning_rate=1e30, budget=replace(TINY, steps=4)))
    assert "failed" in found and gain(found) == -np.inf


SHIFT = Shift(np.array([1.0, -1.0, 0.1, 3.0]), np.array([0.0, 1.0, 0.0, -1.0]), np.array([False, False, True, False]))


def test_measures_by_hand() -> None:
    """Margins 1, -2, 4 of wins and 0.1 of the tie."""
    found = likelihoods(SHIFT, SHIFT)
    assert found["chosen_shift"] == pytest.approx(1) and found["rejected_shift"] == pytest.approx(0)
    assert found["train_margin"] == pytest.approx(1)
    assert agreement(SHIFT, SHIFT)["accuracy"] == pytest.approx(2 / 3)
    assert three_way(SHIFT, 0.5) == pytest.approx(3 / 4)
    assert three_way(SHIFT, 5.0) == pytest.approx(1 / 4)
    assert ties(SHIFT, SHIFT) == pytest.approx({"tie_auc": 1.0, "three_way": 0.75})


def test_tie_auc_by_hand() -> None:
    """|margins| of ties 1 and 3, of wins 2 and 2: of four couples two are in order, two are not."""
    mixed = Shift(np.array([1.0, 3.0, 2.0, 2.0]), np.zeros(4), np.array([True, True, False, False]))
    assert ties(mixed, mixed)["tie_auc"] == pytest.approx(0.5)
    assert ties(replace(mixed, tie=np.zeros(4, dtype=bool)), mixed) == {}


def result(words: float, rng: np.random.Generator) -> dict[str, Any]:
    return {"prompts": {"words": list(rng.normal(words, 0.1, 50))}, "measures": {}}


@pytest.mark.parametrize(
    ("ours", "beyond", "says"),
    [
        (10, 0, "holds"),
        (14, 0, "does not hold"),
        (12, 0, "not shown"),
        (12, -1, "holds"),
        (10, 3, "does not hold"),
    ],  # fmt: skip
)
def test_verdicts(ours: float, beyond: float, says: str) -> None:
    """Fewer words are better; theirs are 12."""
    rng = np.random.default_rng(1)
    promise = Promise("is brief", "plain", "words", "lower", Arm("a"), Arm("b"), beyond=beyond)
    found = judge(promise, [result(ours, rng) for _ in range(5)], [result(12, rng) for _ in range(5)])
    assert found.says == says
    assert found.difference.value == pytest.approx(ours - 12, abs=0.1)
    assert says in promises_table([found])


def test_promises_name_worlds_and_measures_that_are_there() -> None:
    known = {
        "utility",
        "words",
        "kl",
        "chosen_shift",
        "rejected_shift",
        "train_chosen_shift",
        "train_margin",
        "tie_auc",
        "good_minus_bad",
    }
    for promise in PROMISES:
        assert world(promise.world) and promise.measure in known
        for arm in promise.arms:
            if arm.method in methods():
                promise.trial(arm, 1e-4, 0).objective()


def test_arms_from_text() -> None:
    assert parse_arms("dpo,cdpo:label_smoothing=0.2") == [Arm("dpo"), Arm("cdpo", {"label_smoothing": 0.2})]
    assert parse_arms("bco:match_prompts=tfidf") == [Arm("bco", {"match_prompts": "tfidf"})]
    assert parse_arms("dpo:rounds=8:pairs=all") == [Arm("dpo", {"rounds": 8, "pairs": "all"})]
    assert parse_arms("ppo:rounds=32:passes=2:clip=0.1") == [Arm("ppo", {"rounds": 32, "passes": 2, "clip": 0.1})]
    given = {"pairs", "thumbs", "demonstrations", "rankings", "scores"}
    fit = [
        n
        for n, c in methods().items()
        if not {"score"} & c.needs and not c.partner and c.feedback.__name__.lower() in given
    ]
    assert [a.method for a in parse_arms("all")] == fit and "rloo" not in fit
    for wrong in (
        "dqo",
        "dpo:beta",
        "dpo:beta=-1",
        "dpo:epochs=2",
        "dpo:flop=1",
        "dpo:match_prompts=tfidf",
        "rloo",
        "dpo:rounds=0",
        "dpo:passes=2",
        "nothing:rounds=2",
        "xpo:rounds=2",
        "reward_model:rounds=2",
        "reward_model",
    ):
        with pytest.raises(ConfigError):
            parse_arms(wrong)


def fake(trial: Trial) -> dict[str, Any]:
    """A result without training: better at the middle rate, and better for simpo."""
    rng = np.random.default_rng(trial.seed)
    good = 0.5 * (trial.learning_rate == RATES[1]) + 0.5 * (trial.method == "simpo")
    names = {"utility_start": 0.0, "utility": good, "words": 10 - good, "kl": 1.0}
    rows = {name: rng.normal(mean, 0.1, 6).tolist() for name, mean in names.items()}
    return {"prompts": rows, "measures": {}, "seconds": 1.0}


def test_the_command_makes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.compare.runner.run", fake)
    lines: list[str] = []
    more: dict[str, Any] = {"output": tmp_path, "workers": 1, "tell": lines.append}
    arms = parse_arms("dpo,simpo")
    table = compare("plain", arms, 3, budget=TINY, **more)
    first, second = (line for line in table.splitlines() if line.startswith(("| dpo", "| simpo")))
    assert first.startswith(f"| simpo | pairs | {RATES[1]:g} | 1.0") and second.startswith(
        f"| dpo | pairs | {RATES[1]:g} | 0."
    )
    assert "minus dpo" in table and "Student's t over 3 seeds" in table
    ran = len(list(tmp_path.iterdir()))
    assert len(lines) == ran == 2 * (len(RATES) * len(TUNING_SEEDS) + 3)
    assert compare("plain", arms, 3, budget=TINY, **more) == table
    assert len(lines) == ran == len(list(tmp_path.iterdir()))
    promise = Promise("is brief", "plain", "words", "lower", Arm("simpo"), Arm("dpo"), budget=TINY)
    absent = Promise("is better", "plain", "words", "lower", Arm("nonesuch"), Arm("dpo"), budget=TINY)
    verdicts = check_promises(3, promises=[promise, absent], **more)
    table = told([promise, absent], verdicts)
    assert "simpo is brief (against dpo)" in table and "| holds |" in table and "Not there yet: nonesuch." in table
    both = compare("plain", arms, 3, budget=TINY, verdicts=verdicts, **more).splitlines()
    assert both[0].endswith("| seconds | promised: verdict |") and both[0].count("|") == both[1].count("|")
    assert [line.split("|")[-2].strip() for line in both if line.startswith(("| simpo", "| dpo"))] == [
        "is brief: holds",
        "",
    ]
    assert len(list(tmp_path.iterdir())) == ran  # the same trials
    with pytest.raises(ConfigError, match="at least 2"):
        compare("plain", arms, 1, budget=TINY, **more)


def test_failed_runs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(trial: Trial) -> dict[str, Any]:
        return {"failed": "the loss is nan", "seconds": 1.0} if trial.method == "simpo" else fake(trial)

    monkeypatch.setattr("trimtab.compare.runner.run", half)
    more: dict[str, Any] = {"output": tmp_path, "workers": 1, "tell": lambda _: None}
    assert "2 runs failed: the loss is nan" in compare("plain", parse_arms("dpo,simpo"), 2, budget=TINY, **more)
    promise = Promise("is brief", "plain", "words", "lower", Arm("simpo"), Arm("dpo"), budget=TINY)
    assert "failed: the loss is nan" in told([promise], check_promises(2, promises=[promise], **more))


def test_two_workers_find_what_one_finds(tmp_path: Path) -> None:
    trials = [TRIAL, replace(TRIAL, method="simpo")]
    found = run_all(trials, Results(tmp_path), "", workers=2, tell=lambda _: None)
    assert [{**r, "seconds": 0} for r in found] == [{**run(t), "seconds": 0} for t in trials]


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """kill -9 of a sweep leaves nobody computing."""
    script = (
        "import os, multiprocessing, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from trimtab.compare.runner import quiet\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), quiet)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    file = tmp_path / "sweep.py"
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as sweep:
        assert sweep.stdout is not None
        worker = int(sweep.stdout.readline())
        sweep.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker goes on")
