"""One process = two = four (gloo, launched as users do): losses, metrics, weights and memory, for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine import worst
from tests.reliability import every_method
from tests.reliability.every_method import Found, assert_same_run, read
from tests.reliability.launch import HERE, launch, run, with_torchrun
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.config import resolve
from trimtab.run import train

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    launch(2, "every_method.py", str(folder), cwd=folder)
    return read(folder, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("four")
    code, told = run([*with_torchrun(4), str(HERE / "every_method.py"), str(folder), "few"], folder)
    assert code == 0, told[-4000:]
    return read(folder, 4)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return every_method.run(tmp_path_factory.mktemp("one"), every_method.cases())


@pytest.fixture(scope="module")
def one_few(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return every_method.run(tmp_path_factory.mktemp("few"), every_method.few())


@pytest.mark.parametrize("name", [name for name, *_ in every_method.cases()])
def test_one_process_is_two(name: str, one: Found, two: list[Found]) -> None:
    assert_same_run(one[name], [found[name] for found in two])


@pytest.mark.parametrize("name", [name for name, *_ in every_method.few()])
def test_one_process_is_four(name: str, one_few: Found, four: list[Found]) -> None:
    """The last batch has one row: three of the four processes have none."""
    assert_same_run(one_few[name], [found[name] for found in four])


OPTIONS = {
    "data": "thumbs.jsonl", "method": "kto", "model": "./model", "precision": "float64", "finetune": "full",
    "batch_size": 4, "max_steps": 4, "samples": 0, "save_every": 2, "learning_rate": 0.01, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize("output", [None, "here"])
def test_command_line_with_processes_that_start_at_different_times(
    output: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take one run folder, and it holds what one process would have written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "other home"))  # the two fill their reference cache themselves
    tiny_folder(tmp_path / "model")
    feedback_file(tmp_path / "thumbs.jsonl", "thumb", 11)
    alone = train(resolve({**OPTIONS, "output": "alone"}))
    flags = [w for k, v in OPTIONS.items() if k != "data" for w in (f"--{k}", str(v))]
    launch(2, "late.py", "train", "thumbs.jsonl", *flags, *(["--output", output] if output else []), cwd=tmp_path)
    if output is None:
        assert [p.name for p in (tmp_path / "runs").iterdir()] == ["kto-thumbs-1"]
    folder = tmp_path / (output or "runs/kto-thumbs-1")
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    state = {p.name for p in (folder / "checkpoints" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} < state
    ours, wanted = (load_file(f / "model.safetensors") for f in (folder, alone))
    assert worst(ours, wanted) < 1e-9


ROUNDS = {
    "data": "prompts.jsonl", "judge": "rule:judge.py:odd", "model": "./model", "precision": "float64",
    "batch_size": 2, "rounds": 2, "prompts_per_round": 5, "answers": 3, "samples": 0, "sample_tokens": 6, "learning_rate": 0.01,
    "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("rloo", {"finetune": "full"}),
        ("ppo", {"passes": 2, "ptx_data": "demos.jsonl"}),
        ("dpo", {"pairs": "all", "finetune": "full"}),
        ("remax", {}),
        (
            "rso",
            {
                "pairs": "tournament", "answers": 5, "keep_answers": 3, "keep_beta": 0.2, "samples": 3, "holdout": 0.3,
                "watch_every": 1, "test_judge": "rule:judge.py:even",
            },
        ),
    ],
)  # fmt: skip
def test_rounds_of_two_processes_are_those_of_one(
    method: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each samples its share of 5 prompts: the same answers, judgements, records and updates, and the judges are asked once."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    feedback_file(tmp_path / "prompts.jsonl", "prompt", 11)
    feedback_file(tmp_path / "demos.jsonl", "demonstration", 5)
    Path("judge.py").write_text(
        "def odd(prompt, answer):\n"
        "    with open('asked', 'a') as f:\n        f.write('x')\n"
        "    return sum(map(ord, answer)) % 11 / 10\n"
        "def even(prompt, answer):\n"
        "    return 1 - odd(prompt, answer) ** 2\n"
    )
    options = {**ROUNDS, "method": method, **more}
    alone = train(resolve({**options, "output": "alone"}))
    asked = len(Path("asked").read_text())
    Path("asked").unlink()
    flags = [w for k, v in options.items() if k != "data" for w in (f"--{k}", str(v))]
    launch(2, "late.py", "train", "prompts.jsonl", *flags, "--output", "both", cwd=tmp_path)
    assert len(Path("asked").read_text()) == asked
    for number in ("0001", "0002"):
        ours, wanted = (folder / "rounds" / number for folder in (Path("both"), alone))
        assert {p.name for p in ours.iterdir()} == {p.name for p in wanted.iterdir()}
        assert (ours / "records.jsonl").read_bytes() == (wanted / "records.jsonl").read_bytes()
        assert (ours / "judgements.jsonl").read_bytes() == (wanted / "judgements.jsonl").read_bytes()
        if "keep_answers" in more:
            assert json.loads((ours / "round.json").read_text())["kept/reward"] > 0
    if "test_judge" in more:
        for look in ("rounds/0001/watch.json", "rounds/0002/watch.json", "rounds/watch.json"):
            seen, known = (json.loads((folder / look).read_text()) for folder in (Path("both"), alone))
            assert seen.pop("kl") == pytest.approx(known.pop("kl"), rel=1e-6, abs=1e-9) and seen == known
    name = "model.safetensors"
    # What all prompts begin with adds up its gradient over the rows of a process, and the norms of transformers' Llama round
    # it to float32. With norms in float64 every method's weights agree to 1e-9 (every_method.py).
    assert worst(load_file(f"both/{name}"), load_file(alone / name)) < 1e-6
    assert worst(load_file(alone / name), load_file(f"model/{name}")) > 1e-4  # something was learned
