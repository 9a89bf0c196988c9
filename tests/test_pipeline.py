"""Stages: split easy to hard, start where the stage before ended, merge, label; judges and files by the names of stages; the
shipped pipelines from beginning to end. What is done is not done again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from tests.command import done, trimtab
from tests.judges.server import Reply, serving
from tests.judges.test_endpoint import shown
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab import pipeline, run
from trimtab.feedback.read import read, write
from trimtab.feedback.records import Comparison, Prompt, Score
from trimtab.judges.prompt import PROMPTS
from trimtab.models import load_model
from trimtab.pipeline import SHIPPED, run_pipeline

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHORT = {"max_steps": 2, "batch_size": 4, "precision": "float32", "samples": 0, "learning_rate": 0.01, "holdout": 0.4}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny_folder(tmp_path / "tiny")
    feedback_file(tmp_path / "prefs.jsonl", "comparison", 12)
    feedback_file(tmp_path / "demos.jsonl", "demonstration", 12)
    return tmp_path


def plan(*stages: dict[str, Any], **more: Any) -> Path:
    file = Path("plan.yaml")
    file.write_text(yaml.safe_dump({"output": "out", "model": "./tiny", **SHORT, **more, "stages": list(stages)}))
    return file


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in load_model(folder).named_parameters()}


def card(name: str) -> dict[str, Any]:
    return json.loads(Path("out", name, "run.json").read_text())  # type: ignore[no-any-return]


def test_sdpo() -> None:
    """Two parts, easy first; the second stage starts from the first one's model, which is its reference: margin 0."""
    file = plan(
        {"name": "parts", "do": "split", "data": "prefs.jsonl", "parts": 2},
        {"name": "easy", "method": "dpo", "data": "parts/1", "finetune": "full"},
        {"name": "hard", "method": "dpo", "data": "parts/2", "finetune": "full"},
    )
    told = done("pipeline", file)
    found = json.loads(Path("out/parts/split.json").read_text())
    assert found["accuracy"][0] >= found["accuracy"][1] and found["told"] in " ".join(told.split())
    rows = [r.chosen for k in (1, 2) for r in read(f"out/parts/{k}.jsonl").records]  # type: ignore[attr-defined]
    assert sorted(rows) == sorted(r.chosen for r in read("prefs.jsonl").records)  # type: ignore[attr-defined]
    easy, hard = card("easy"), card("hard")
    assert hard["config"]["model"] == "out/easy"
    assert easy["fingerprints"]["model"] != hard["fingerprints"]["model"]
    assert hard["evaluation"]["before"]["rewards/margins"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert easy["evaluation"]["after"]["rewards/margins"]["value"] != pytest.approx(0.0, abs=1e-5)
    again = done("pipeline", file)
    assert again.count("done before") == 3


def test_paft() -> None:
    """SFT with L1 and DPO from the same start, merged: the sum of both changes."""
    lora = {"finetune": "lora", "l1": 0.5}
    done(
        "pipeline",
        plan(
            {"name": "sft", "method": "sft", "data": "demos.jsonl", **lora},
            {"name": "dpo", "method": "dpo", "data": "prefs.jsonl", "from": "start", "finetune": "full"},
            {"name": "both", "do": "merge", "from": "start", "models": ["sft", "dpo"], "how": "task_arithmetic"},
        ),
    )
    assert card("dpo")["config"]["model"] == "./tiny"
    start, sft, dpo, both = (weights(f) for f in ("tiny", "out/sft", "out/dpo", "out/both"))
    for n in start:
        assert torch.allclose(both[n], sft[n] + dpo[n] - start[n], atol=1e-6)
    assert any(not torch.equal(sft[n], start[n]) for n in start)


def test_an_unfinished_stage_stops_the_rest_and_is_named() -> None:
    failed = trimtab("pipeline", plan({"name": "a", "method": "dpo", "data": "nothing.jsonl"}))
    assert "nothing.jsonl" in failed.error


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"method": "dpo"}], "stage 1 needs a name of its own"),
        ([{"name": "a", "do": "dance"}], 'stage "a" says do: dance; expected one of train, split, merge'),
        ([{"name": "a", "from": "b", "method": "sft", "data": "demos.jsonl"}], 'from is "b". Known: start'),
        (
            [{"name": "a", "do": "split", "data": "demos.jsonl"}],
            "split needs comparisons, at least 2; found 12 rows of another",
        ),
        ([{"name": "a", "do": "split", "data": "prefs.jsonl", "by": "luck"}], 'split into 2 parts by "luck"'),
    ],
)
def test_what_is_refused(stages: list[dict[str, Any]], message: str) -> None:
    assert message in trimtab("pipeline", plan(*stages)).error


def test_not_a_plan(tmp_path: Path) -> None:
    Path("x.yaml").write_text("stages: []\n")
    assert "expected `output: FOLDER` and `stages:`" in trimtab("pipeline", "x.yaml").error


# --- names of stages ----------------------------------------------------------------------------------------------------

RL = {"method": "rloo", "finetune": "full", "precision": "float32", "learning_rate": 0.01, "samples": 0, "threads": 1}
RL |= {"rounds": 1, "prompts_per_round": 3, "answers": 2, "batch_size": 2, "sample_tokens": 5}
RULE = "def brief(prompt, answer):\n    return -float(len(answer))\n"


def small(*stages: dict[str, Any]) -> Path:
    """A plan without common options: those of a file of comparisons have no effect where answers are sampled."""
    file = Path("plan.yaml")
    file.write_text(yaml.safe_dump({"output": "out", "model": "./tiny", "stages": list(stages)}))
    return file


def told(name: str) -> dict[str, Any]:
    return json.loads(Path("out", name, "stage.json").read_text())  # type: ignore[no-any-return]


def test_a_judge_is_the_stage_of_that_name() -> None:
    """A reward model, the implicit reward of two stages, and a language model; each stage starts where it should."""
    file = small(
        {"name": "sft", "method": "sft", "data": "demos.jsonl", **SHORT},
        {"name": "reward", "method": "reward_model", "data": "prefs.jsonl", "finetune": "full", **SHORT},
        {"name": "rl", "data": "prefs.jsonl", "judge": "model:reward", "from": "sft", **RL},
        {"name": "more", "data": ["prefs.jsonl", "demos.jsonl"], "judge": "model:sft,start", **RL},
    )
    said = done("pipeline", file)
    assert card("reward")["config"]["model"] == card("rl")["config"]["model"] == "out/sft"
    assert card("rl")["config"]["judge"] == "model:out/reward"
    assert card("more")["config"]["judge"] == "model:out/sft,./tiny" and card("more")["config"]["model"] == "out/rl"
    joined = read("out/more.data.jsonl").records  # pairs and demonstrations: their prompts are what is read
    assert all(isinstance(r, Prompt) for r in joined) and len(joined) == 24
    assert "12 of prefs.jsonl and 12 of demos.jsonl" in " ".join(said.split())
    before = Path("out/rl/run.json").stat().st_mtime_ns
    assert done("pipeline", file).count("done before") == 4 and Path("out/rl/run.json").stat().st_mtime_ns == before


def test_a_language_judge_is_described_in_the_stage() -> None:
    """The description lies beside the stage's folder with the stage's name replaced, the user's files found from there."""
    Path("own.yaml").write_text((PROMPTS / "one_to_ten.yaml").read_text().replace("[1, 10]", "[1, 9]"))
    judge = {"model": "sft", "prompt": "own.yaml", "stop_after": 1.0}
    done(
        "pipeline",
        small(
            {"name": "sft", "method": "sft", "data": "demos.jsonl", **SHORT},
            {"name": "labels", "do": "label", "data": "prefs.jsonl", "judge": judge, "limit": 3},
        ),
    )
    written = yaml.safe_load(Path("out/labels.judge.yaml").read_text())
    assert written == {"model": "out/sft", "prompt": "../own.yaml", "stop_after": 1.0}
    assert all(isinstance(r, Score) and -1 <= r.score <= 1 for r in read("out/labels/records.jsonl").records)


def test_labels_feed_the_next_stage() -> None:
    """A rule judges the file's own pairs and what the model says; agreement is that of `trimtab judge`."""
    Path("judge.py").write_text(RULE)
    judge = "rule:judge.py:brief"
    said = done(
        "pipeline",
        small(
            {"name": "labels", "do": "label", "data": "prefs.jsonl", "judge": judge},
            {"name": "scores", "do": "label", "data": "labels", "judge": judge, "answers": 3, "limit": 4,
             "writer": {"max_tokens": 6}},
            {"name": "score-model", "method": "score_model", "data": "labels/records", "finetune": "full", **SHORT},
        ),
    )  # fmt: skip
    pairs: list[Any] = read("prefs.jsonl").records
    right = sum((len(p.chosen) < len(p.rejected)) + 0.5 * (len(p.chosen) == len(p.rejected)) for p in pairs) / 12
    found = told("labels")
    assert found["agreement"]["value"] == pytest.approx(right) and found["agreement"]["compared"] == 12
    assert f"agreement with 12 comparisons of the file, ties of the judge counted half: {right:.3f}" in said
    assert done("judge", "prefs.jsonl", "--judge", judge, "--out", "x.jsonl") and (
        read("x.jsonl").records == read("out/labels/records.jsonl").records
    )
    scores: list[Any] = read("out/scores/records.jsonl").records
    assert len({r.prompt for r in scores}) < 5 < len(scores) <= 12 and told("scores")["agreement"] is None
    assert all(r.score == -len(r.completion) for r in scores)
    assert yaml.safe_load(Path("out/scores.writer.yaml").read_text()) == {
        "temperature": 1.0, "model": "./tiny", "max_tokens": 6
    }  # fmt: skip
    assert card("score-model")["data"]["records"] == len(read("x.jsonl").records)


def test_pairs_of_the_models_own_answers_are_judged_in_both_orders() -> None:
    """3 answers are 3 pairs; position bias is told; ties are dropped where that is wanted."""

    def first(body: dict[str, Any], n: int) -> Reply:
        a, b = shown(body).values()
        biased = len(a) >= len(b) if n % 3 else True
        return Reply("A" if biased else "B")

    with serving(first) as server:
        judge = {"url": server.url, "model": "judge", "parallel": 1}
        done(
            "pipeline",
            small({"name": "pairs", "do": "label", "data": "demos.jsonl", "judge": judge, "answers": 3, "limit": 3,
                   "ties": "drop", "writer": {"max_tokens": 8}}),
        )  # fmt: skip
        assert len(server.requests) == 2 * 9
    found = told("pairs")
    made: list[Any] = read("out/pairs/records.jsonl").records
    assert found["judge"]["asked"] == 9 and 0 < found["judge"]["position"]["bias"] < 1
    ties = found["judge"]["outcome"]["ties"]
    assert 0 < ties == 9 - len(made) and not any(r.tie for r in made) and found["agreement"] is None
    assert all(isinstance(r, Comparison) and len(r.chosen) >= len(r.rejected) for r in made)


def test_an_interrupted_stage_stops_the_pipeline_and_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(config: Any, **_: Any) -> Path:
        seen.append((config.output, config.resume))
        folder = Path(config.output)
        (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        status = "finished" if config.resume else "interrupted"
        (folder / "run.json").write_text(json.dumps({"status": status}))
        return folder

    monkeypatch.setattr(run, "train", train)
    file = small(
        {"name": "a", "method": "sft", "data": "demos.jsonl"}, {"name": "b", "method": "sft", "data": "demos.jsonl"}
    )
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(file, "", Console(quiet=True))
        if len(seen) == 3:
            break
    assert seen == [("out/a", False), ("out/a", True), ("out/b", False)]
    other = small({"name": "c", "do": "label", "data": "prefs.jsonl", "judge": "model:out/b"})
    assert 'judge names "out/b", a run that is not finished' in trimtab("pipeline", other).error


SFT, PAIRS = {"name": "sft", "method": "sft", "data": "demos.jsonl"}, {"do": "label", "data": "prefs.jsonl"}
A, REVISE = {"name": "a", **PAIRS, "judge": "rule:j.py:f"}, {"name": "a", "do": "revise", "data": "demos.jsonl"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [SFT, {"name": "a", **PAIRS, "judge": "model:stf,start"}],
            'stage "a": judge names "stf", which is no stage and no folder. Did you mean "sft"? Known: start, sft',
        ),
        ([{"name": "a", **PAIRS, "judge": "model:sft"}, SFT], 'judge names "sft", which is not done at that point'),
        ([A, {"name": "b", **PAIRS, "judge": "model:a"}], 'judge names "a", a stage that makes no model'),
        (
            [{**A, "judge": {"model": "start", "sample": 3}}],
            'the option "sample" has no effect on a language model in this process (url is not given). Did you mean "samples"?',
        ),
        (
            [{**A, "judge": {"model": "start", "prompt": "aditive"}}],
            'no judge prompt "aditive". Did you mean "additive"?',
        ),
        ([{**A, "judge": {"prompt": "additive"}}], "expected a name, or a mapping with model and its options"),
        ([{"name": "a", **PAIRS}], 'stage "a": do: label needs judge.'),
        ([{**A, "tie_bend": 1}], 'the option "tie_bend" has no effect on do: label. Did you mean "tie_band"?'),
        ([{**A, "writer": {"max_tokens": 3}}], "writer has no effect without answers"),
        ([{**A, "data": "b/1"}, {**A, "name": "b"}], 'data is "b/1", which is not done at that point'),
        (
            [SFT, {"name": "a", "method": "dpo", "data": "prefz.jsonl"}],
            'stage "a": data is "prefz.jsonl": no such file, and no stage before it has that name.',
        ),
        ([SFT, {**SFT, "name": "a", "bata": 1}], 'stage "a": There is no option "bata".'),
        ([{**SFT, "model": "./tiny"}], 'stage "sft": model has no effect; from: NAME says which model it starts from.'),
        ([{**REVISE, "revision": 2}], 'has no effect on do: revise. Did you mean "revisions"?'),
        (
            [{**REVISE, "writer": {"url": "http://x/v1"}}],
            "writer is {'url': 'http://x/v1'}; expected a name, or a mapping with model",
        ),
        ([{**REVISE, "do": "instruct"}], "do: instruct needs count."),
        ([{"name": "a", "do": "merge", "models": ["start"], "how_": "ties"}], "has no effect on do: merge"),
    ],
)
def test_what_is_refused_before_any_stage_begins(stages: list[dict[str, Any]], message: str) -> None:
    error = trimtab("pipeline", small(*stages)).error
    assert message in error and not Path("out").exists()


def test_files_of_several_kinds_are_not_joined() -> None:
    error = trimtab("pipeline", small({**SFT, "data": ["demos.jsonl", "prefs.jsonl"]})).error
    assert "prefs.jsonl holds comparison records and demos.jsonl demonstration records, which cannot be joined" in error


# --- the shipped pipelines ------------------------------------------------------------------------------------------------

NAMES = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
BRING = {
    "demonstration": ("demos", "ift", "eft", "helpful"),
    "comparison": ("labelled", "helpful_pairs", "pairs", "test_pairs"),
    "ranking": ("rankings",),
    "prompt": ("prompts", "red_team"),
}


def bring() -> None:
    """The user's files, as the heads of the shipped files describe them."""
    for kind, files in BRING.items():
        for i, file in enumerate(files):
            feedback_file(Path(f"{file}.jsonl"), kind, 12, seed=i)
    pairs = [replace(r, strength=1.0) for r in read("helpful_pairs.jsonl").records]  # type: ignore[call-arg]
    write(pairs, "helpful_pairs.jsonl")


def model_behind(body: dict[str, Any], n: int) -> Reply:
    """Judges by length, in the form that is asked for; criticises, revises and writes prompts; all of it by what it is shown."""
    text = body["messages"][-1]["content"]
    answers = list(shown({"messages": body["messages"][:1]}).values())
    worth = [len(a) % 7 for a in answers]
    if "Score: <total points>" in text:
        return Reply(f"It will do. Score: {worth[0] % 6}")
    if text.endswith("Rating from 1 to 10:"):
        digits = {str(k): 0.05 for k in range(1, 11)}
        digits[str(1 + worth[0])] += 0.5
        return Reply(str(1 + worth[0]), [(str(1 + worth[0]), digits)])
    for options in ("12", "AB"):
        if len(answers) == 2 and f"{options[0]} or" in text.replace(", ", " "):
            p = 0.5 + (worth[0] - worth[1]) / 20
            among = dict(zip(options, (p, 1 - p), strict=True))
            word = max(among, key=among.__getitem__)
            return Reply(word, [(word, among)])
    return Reply(f"word{n} other{n} more{n}")


def shrunk(name: str, url: str) -> Path:
    """The shipped file with a tiny model, few steps, and the server wherever a language model judges or writes; the order of
    stages, what each reads, starts from and is judged by, and every option of a method stay."""
    plan = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    plan |= {"model": "./tiny", "output": "out"}
    for stage in plan["stages"]:
        for key in ("judge", "writer"):
            if isinstance(stage.get(key), dict) and not (key == "writer" and stage.get("answers")):
                stage[key] = {**stage[key], "url": url, "model": f"served {stage[key].get('model', '')}", "parallel": 2}
            elif key in stage and stage.get("answers") and key == "writer":
                stage[key] = {**stage[key], "max_tokens": 6}
        match stage.get("do", "train"):
            case "train" if "judge" in stage:
                stage |= {k: v for k, v in RL.items() if k not in ("method", "answers")}
                assert stage["answers"] in (1, 2, 4)
                if "test_judge" in stage:
                    stage |= {"samples": 3, "holdout": 0.4, "watch_every": 1}
            case "train":
                stage.pop("epochs", None)
                stage |= {**SHORT, "finetune": "full", "threads": 1}
            case "instruct":
                stage |= {"count": 5}
            case "revise" | "label":
                stage |= {"limit": 6}
            case other:
                raise AssertionError(other)
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return file


def test_the_shipped_ones() -> None:
    assert NAMES == ["constitutional", "hh_online", "instructgpt", "rlaif_direct", "rlaif_distilled", "self_rewarding"]
    error = trimtab("pipeline", "instructgtp.yaml").error
    assert 'Did you mean "self_rewarding"?' in trimtab("pipeline", "self-rewarding").error
    assert "or one that is shipped: constitutional, hh_online, instructgpt" in error
    # by its name, the file as it is: all that it lacks is the user's data
    assert 'stage "reward": data is "rankings.jsonl": no such file' in trimtab("pipeline", "instructgpt").error


@pytest.mark.parametrize("name", NAMES)
def test_each_is_checked_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the user's files there, every stage of the file as shipped resolves; the first one is begun."""
    bring()

    class Begun(Exception):
        pass

    def begin(*_: Any, **__: Any) -> None:
        raise Begun

    monkeypatch.setattr(run, "train", begin)
    monkeypatch.setattr(pipeline, "language_judge", begin)
    with pytest.raises(Begun):
        run_pipeline(Path(name), "", Console(quiet=True))


def answered_by_a_person(file: Path) -> int:
    """Every second one that is open is answered by its length; returns how many are left."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    waiting = [row for row in rows if not row["answer"]]
    for row in waiting[: -(-len(waiting) // 2)]:
        row["answer"] = "A > B" if len(row["A"]) > len(row["B"]) else "B > A"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(waiting) // 2


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_from_beginning_to_end(name: str) -> None:
    bring()
    with serving(model_behind) as server:
        file = shrunk(name, server.url)
        if name == "hh_online":  # the pipeline stops for people as often as it must
            assert "6 of 6 questions wait for a person's answer (compare-1.jsonl)" in trimtab("pipeline", file).error
            while answered_by_a_person(Path("compare-1.jsonl")):
                assert "wait for a person's answer" in trimtab("pipeline", file).error
        done("pipeline", file)
        asked = len(server.requests)
        served = {r["model"] for r in server.requests}
        again = done("pipeline", file)
        assert len(server.requests) == asked, "what is finished asks nobody"
    stages = yaml.safe_load(file.read_text())["stages"]
    assert again.count("done before") == len(stages)
    start = {s["name"]: s.get("from") for s in stages}
    match name:
        case "hh_online":
            pairs = read("out/preference-2.data.jsonl").records
            assert len(pairs) == 12 + 6
            assert [card(f"policy-{k}")["config"]["judge"] for k in (1, 2)] == [
                f"model:out/preference-{k}" for k in (1, 2)
            ]
            for run_name in ("policy-1", "policy-2", "preference-2"):
                assert card(run_name)["config"]["model"] == "./tiny"
            assert card("policy-2")["config"]["test_judge"] == "model:out/test-preference"
            assert len(card("policy-2")["watch"]["looks"]) >= 2
        case "instructgpt":
            assert not asked and card("ppo")["config"]["model"] == "out/sft" and start["reward"] is None
            assert (
                card("ppo")["config"]["judge"] == "model:out/reward" and card("reward")["config"]["model"] == "out/sft"
            )
        case "rlaif_direct":
            assert (
                card("rl")["config"]["judge"] == "language:out/rl.judge.yaml"
                and card("rl")["config"]["model"] == "out/sft"
            )
            rewards = read("out/rl/rounds/0001/records.jsonl").records
            assert all(isinstance(r, Score) and -2 <= r.score <= 1 for r in rewards), "end_penalty is 1"
        case "rlaif_distilled":
            made: list[Any] = read("out/labels/records.jsonl").records
            assert all(isinstance(r, Comparison) and 0.5 < r.strength < 1 for r in made), "soft labels"
            assert told("alignment")["agreement"]["compared"] == 6 and told("labels")["agreement"] is None
            assert card("reward")["config"]["strength"] == "probability"
            assert card("rl")["config"]["judge"] == "model:out/reward"
        case "constitutional":
            assert len(read("out/revisions/records.jsonl").records) == 6 * 4
            assert len(read("out/sl.data.jsonl").records) == 6 * 4 + 12
            pairs: list[Any] = read("out/preference.data.jsonl").records
            assert any(r.strength == 1 for r in pairs) and any(0.5 < r.strength < 1 for r in pairs)
            assert len(read("out/rl.data.jsonl").records) == 24 and card("rl")["config"]["model"] == "out/sl"
        case "self_rewarding":
            assert served == {"served m1", "served m2", "served m3", "served "}
            assert card("m2")["config"]["model"] == "out/m1" and card("m3")["config"]["model"] == "out/m2"
            assert len(read("out/m1.data.jsonl").records) == 24
            new = [{r.prompt for r in read(f"out/prompts-{k}/records.jsonl").records} for k in (1, 2)]
            assert len(new[0]) == len(new[1]) == 5
            assert all(told(f"agreement-{k}")["agreement"]["compared"] == 6 for k in (1, 2, 3))
            known = {r.prompt for r in read("out/m3/rounds/0001/records.jsonl").records}
            assert known <= new[1], "M3 learns from the new prompts"
