"""Results do not change: same trial same file, another trial another file, an edited file is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab.compare import results as results_module
from trimtab.compare.results import Results, conditions, key, sources
from trimtab.compare.runner import RATES, TUNING_SEEDS, best, run_all, tune
from trimtab.compare.trial import Budget, Trial
from trimtab.errors import DataError
from trimtab.world.judge import Judge

TRIAL = Trial("plain", Judge(), "dpo", 1e-4, 0)
FOUND: dict[str, Any] = {"prompts": {"utility": [1.0], "utility_start": [0.5], "kl": [0.1]}, "seconds": 1.0}


def test_key_says_everything() -> None:
    others = [
        replace(TRIAL, seed=1),
        replace(TRIAL, learning_rate=2e-4),
        replace(TRIAL, method="cdpo"),
        replace(TRIAL, options={"beta": 0.2}),
        replace(TRIAL, judge=Judge(flip=0.1)),
        replace(TRIAL, budget=Budget(steps=33)),
    ]
    assert len({key(t) for t in [TRIAL, *others]}) == 7
    assert key(replace(TRIAL)) == key(TRIAL) == key(replace(TRIAL, world="another name"))
    assert {"trial", "trimtab", "sources", "model", "versions", "processor"} == set(conditions(TRIAL))
    assert "torch" in conditions(TRIAL)["versions"]


def test_sources_are_those_that_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in the engine or in the method's own file is another result; one in another method's file is not."""
    before = {m: sources("trimtab.compare.trial", f"trimtab.objectives.{m}") for m in ("dpo", "cdpo", "simpo")}
    sources.cache_clear()
    plain = Path.read_bytes

    def changed(names: set[str]) -> dict[str, str]:
        read = lambda self: plain(self) + (b"# changed\n" if self.name in names else b"")  # noqa: E731
        with monkeypatch.context() as m:
            m.setattr(Path, "read_bytes", read)
            after = {k: sources("trimtab.compare.trial", f"trimtab.objectives.{k}") for k in before}
        sources.cache_clear()
        return after

    assert changed(set()) == before
    assert all(changed({"score.py"})[k] != v for k, v in before.items())
    only = changed({"simpo.py"})
    assert only["simpo"] != before["simpo"] and only["dpo"] == before["dpo"]
    assert changed({"cli.py", "table.py", "promises.py"}) == before


def test_a_result_is_written_once(tmp_path: Path) -> None:
    store = Results(tmp_path)
    assert store.get(TRIAL) is None
    assert store.put(TRIAL, FOUND, "a command") == FOUND == store.get(TRIAL)
    assert store.put(TRIAL, {**FOUND, "seconds": 2.0}, "another") == FOUND  # the first one stands
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o222 == 0
    body = json.loads(file.read_text())
    assert body["command"] == "a command" and body["conditions"] == json.loads(json.dumps(conditions(TRIAL)))


@pytest.mark.parametrize("path", [("result", "seconds"), ("conditions", "trimtab"), ("sha",)])
def test_an_edited_file_is_refused(tmp_path: Path, path: tuple[str, ...]) -> None:
    store = Results(tmp_path)
    store.put(TRIAL, FOUND, "")
    (file,) = tmp_path.iterdir()
    body = inner = json.loads(file.read_text())
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = "3"
    file.chmod(0o644)
    file.write_text(json.dumps(body))
    with pytest.raises(DataError, match="changed after it was written"):
        store.get(TRIAL)


def test_sources_that_change_while_trials_run_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key(TRIAL)
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: plain(self) + b"\n")
    with pytest.raises(DataError, match="sources of trimtab changed"):
        Results(tmp_path).put(TRIAL, FOUND, "")


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def fake(trial: Trial) -> dict[str, Any]:
        ran.append(trial.seed)
        return FOUND

    monkeypatch.setattr("trimtab.compare.runner.run", fake)
    trials = [replace(TRIAL, seed=s) for s in (2, 0, 1)]
    store = Results(tmp_path)
    run_all(trials[:2], store, "", workers=1, tell=lambda _: None)
    assert run_all(trials, store, "", workers=1, tell=lambda _: None) == [FOUND] * 3
    assert ran == [2, 0, 1]


def test_every_method_is_tuned_on_the_same_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    def fake(trial: Trial) -> dict[str, Any]:
        seen.append((trial.method, trial.learning_rate, trial.seed))
        if trial.method == "cdpo" and trial.learning_rate == RATES[-1]:
            return {"failed": "the loss is nan", "seconds": 1.0}
        worth = {"dpo": RATES[1], "cdpo": RATES[-1]}[trial.method] == trial.learning_rate
        return {"prompts": {"utility": [float(worth)], "utility_start": [0.0], "kl": [0.0]}, "seconds": 1.0}

    monkeypatch.setattr("trimtab.compare.runner.run", fake)
    tuned = tune([TRIAL, replace(TRIAL, method="cdpo")], Results(tmp_path), "", workers=1, tell=lambda _: None)
    assert sorted(seen) == sorted((m, r, s) for m in ("dpo", "cdpo") for r in RATES for s in TUNING_SEEDS)
    assert [best(t) for t in tuned] == [RATES[1], RATES[0]]
    assert tuned[1][RATES[-1]] == float("-inf")


def test_results_module_names_nothing_of_the_machine() -> None:
    text = json.dumps(conditions(TRIAL))
    assert str(Path.home()) not in text and str(Path(results_module.__file__).parent) not in text
