"""Stages: split easy to hard, start where the stage before ended, merge; what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.command import done, trimtab
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.feedback.read import read
from trimtab.models import load_model

SHORT = {"max_steps": 2, "batch_size": 4, "precision": "float32", "samples": 0, "learning_rate": 0.01, "holdout": 0.4}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
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
