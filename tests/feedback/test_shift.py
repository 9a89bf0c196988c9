"""Matching the prompts of bad answers to those of good ones: known ratios are found, nothing is found where there is none."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from tests import tiny
from tests.objectives.by_hand import close, completions
from tests.tiny_folder import tiny_folder
from trimtab import run
from trimtab.config import resolve
from trimtab.errors import ConfigError, DataError, FeedbackKindError
from trimtab.feedback.records import Comparison, Message, Record, Thumb
from trimtab.feedback.shift import Shift, balanced, calibrated, cross_fitted, embedder, prompt_shift, prompt_text, tfidf
from trimtab.logprobs.hidden import mean_hidden
from trimtab.logprobs.score import install
from trimtab.logprobs.scored import EXTRAS, Thumbs
from trimtab.objectives import methods
from trimtab.objectives.base import Objective

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def thumb(text: str, good: bool) -> Thumb:
    return Thumb((Message("user", text),), "answer", good)


def numbers(texts: list[str]) -> Any:
    """An embedding: the text is the number."""
    return np.array([[float(t)] for t in texts])


def two_bells(n_good: int, n_bad: int, apart: float = 1.0, seed: int = 0) -> tuple[list[Thumb], Any]:
    """Prompts that are numbers: N(apart/2, 1) with good answers, N(-apart/2, 1) with bad ones, so
    log p(x|good)/p(x|bad) = apart * x. Returns the thumbs and that."""
    rng = np.random.default_rng(seed)
    good = np.arange(n_good + n_bad) < n_good
    x = rng.normal(np.where(good, apart / 2, -apart / 2), 1.0)
    return [thumb(repr(float(v)), bool(g)) for v, g in zip(x, good, strict=True)], apart * x


def topics(
    n_good: int, n_bad: int, share_good: float, share_bad: float, seed: int = 0
) -> tuple[list[Thumb], list[str]]:
    """Prompts of six words about cooking or about trains; a share of each kind is about cooking."""
    rng = np.random.default_rng(seed)
    words = {"cooking": [f"dish{i}" for i in range(30)], "trains": [f"rail{i}" for i in range(30)]}
    records, about = [], []
    for i in range(n_good + n_bad):
        cooking = (i % 100) / 100 < (share_good if i < n_good else share_bad)
        about.append("cooking" if cooking else "trains")
        records.append(thumb(f"{i} {' '.join(rng.choice(words[about[-1]], 6))}", i < n_good))
    return records, about


# --- the ratio -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_good", "n_bad"), [(300, 3000), (3000, 300), (1000, 1000)])
def test_a_known_ratio_is_found_whatever_the_balance(n_good: int, n_bad: int) -> None:
    records, truth = two_bells(n_good, n_bad)
    shift = prompt_shift(records, embed=numbers)
    weight, good = np.array(shift.weights), np.arange(len(records)) < n_good
    assert (weight[good] == 1).all()
    error = np.log(weight[~good]) - np.clip(truth[~good], math.log(0.5), math.log(10))
    assert abs(error.mean()) < 0.08 and np.abs(error).mean() < 0.12
    # as well as the true ratio does: 0.760 = Phi(1/sqrt 2) and 0.691 = Phi(1/2), but for the sample
    assert shift.auc_before == pytest.approx(roc_auc_score(good, truth), abs=0.01) == pytest.approx(0.76, abs=0.05)
    right = (truth > 0) == good
    assert shift.accuracy == pytest.approx((right[good].mean() + right[~good].mean()) / 2, abs=0.02)
    assert shift.auc_after < 0.58


def test_wide_bounds_match_wholly_and_weigh_1_on_average() -> None:
    records, _ = two_bells(1500, 1500, apart=0.7)
    shift = prompt_shift(records, embed=numbers, low=0.01, high=100)
    # a little below: what is even in all rows is uneven one way in a part and the other way in the rest
    assert shift.auc_after == pytest.approx(0.5, abs=0.06)
    assert shift.mean_weight == pytest.approx(1, abs=0.06) and shift.clipped == 0


def test_only_balanced_weights_give_the_ratio_without_the_prior() -> None:
    """Without them the odds hold n_good/n_bad = 0.1."""
    records, truth = two_bells(300, 3000)
    good, x = np.arange(3300) < 300, numbers([prompt_text(r.prompt) for r in records])
    errors = []
    for weight in (balanced(good), np.ones(3300)):
        score = cross_fitted(x, good, weight, np.arange(3300), seed=0)
        errors.append((calibrated(score, good, weight)(score) - truth).mean())
    assert abs(errors[0]) < 0.08 and errors[1] == pytest.approx(math.log(0.1), abs=0.1)


def test_calibration_mends_scores_that_are_too_sure() -> None:
    """Scores three times too large, and shifted: the line through them has slope 1/3 again."""
    records, truth = two_bells(2000, 2000)
    good = np.array([r.desirable for r in records])
    found = calibrated(3 * truth + 5, good, balanced(good))(3 * truth + 5)
    assert np.polyfit(truth, found, 1) == pytest.approx([1, 0], abs=0.1)
    against = calibrated(-truth, good, balanced(good))
    assert (against(truth) == 0).all()  # worse than chance says nothing, not the opposite


def test_words_find_topics() -> None:
    """Good answers: 80 of 100 prompts about cooking; bad ones: 20 of 100. Ratio 4 for cooking, 1/4 (held at 1/2) for trains."""
    records, about = topics(200, 1000, 0.8, 0.2)
    shift = prompt_shift(records)
    bad = [(w, a) for w, a, r in zip(shift.weights, about, records, strict=True) if not r.desirable]
    cooking, trains = (np.array([w for w, a in bad if a == topic]) for topic in ("cooking", "trains"))
    assert 3 < np.median(cooking) < 5.5 and np.median(trains) == 0.5
    assert shift.auc_before == pytest.approx(0.8, abs=0.05) and shift.auc_after < 0.65 and 0.6 < shift.clipped < 0.85


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_shift_gives_weights_near_1(seed: int) -> None:
    shift = prompt_shift(topics(300, 900, 0.5, 0.5, seed)[0], seed=seed)
    weight = np.array(shift.weights)
    assert weight.std() < 0.15 and 0.6 < weight.min() <= weight.max() < 1.6 and abs(weight.mean() - 1) < 0.02
    assert shift.auc_before == pytest.approx(0.5, abs=0.08) and shift.clipped == 0


def test_both_kinds_on_every_prompt_give_weights_of_1() -> None:
    """Pairs as thumbs: a prompt must not be judged by a classifier that saw it with the other label."""
    records = [thumb(f"question {i} about thing{i % 7}", good) for i in range(60) for good in (True, False)]
    assert prompt_shift(records).weights == pytest.approx([1] * 120, abs=0.1)


def test_each_row_is_weighed_by_a_classifier_that_has_not_seen_it() -> None:
    """Prompts without anything in common: whoever has seen them tells them apart, whoever has not cannot."""
    records = [thumb(f"word{i} other{i} third{i}", i % 2 == 0) for i in range(200) for _ in range(3)]
    shift = prompt_shift(records)
    assert shift.auc_before == pytest.approx(0.5, abs=0.1) and np.allclose(shift.weights, 1, atol=0.2)


def test_held_out_rows_are_weighed_but_not_learned_from() -> None:
    records, truth = two_bells(1000, 1000)
    others, more = two_bells(100, 100, seed=9)
    shift = prompt_shift(records, others, numbers)
    flipped = [replace(r, desirable=not r.desirable) for r in others]
    assert prompt_shift(records, flipped, numbers).weights == shift.weights
    assert shift.others[:100] == (1,) * 100
    error = np.log(shift.others[100:]) - np.clip(more[100:], math.log(0.5), math.log(10))
    assert np.abs(error).mean() < 0.15


def test_bounds_are_kept_and_counted() -> None:
    records, truth = two_bells(500, 1500, apart=3.0)
    shift = prompt_shift(records, embed=numbers, low=0.8, high=2.0)
    bad = np.array(shift.weights)[500:]
    assert bad.min() == pytest.approx(0.8) and bad.max() == pytest.approx(2.0)
    outside = (truth[500:] < math.log(0.8)) | (truth[500:] > math.log(2))
    assert shift.clipped == pytest.approx(outside.mean(), abs=0.03)
    assert shift.mean_weight == pytest.approx(bad.mean())


def test_the_seed_decides_the_parts_and_nothing_else() -> None:
    records, _ = two_bells(100, 100)
    a, b, c = (prompt_shift(records, embed=numbers, seed=s) for s in (0, 0, 1))
    assert a == b and a.weights != c.weights


def test_what_the_card_and_the_user_are_told() -> None:
    shift = Shift((1.0, 2.0), (), 0.81234, 0.5, 0.7, 2.0, 0.125)
    assert shift.to_json() == {
        "auc_before": 0.8123,
        "auc_after": 0.5,
        "accuracy": 0.7,
        "mean_weight": 2.0,
        "clipped": 0.125,
    }
    assert "AUC 0.812 before matching, 0.500 after" in str(shift) and "mean 2.00, 12% clipped" in str(shift)


# --- what a prompt looks like ------------------------------------------------------------------------------------------


def test_words_of_scripts_without_spaces() -> None:
    assert tfidf(["今天天气好", "明天天气坏"]).multiply(tfidf(["今天天气好", "明天天气坏"])[::-1]).sum() > 0
    assert tfidf(["how are you", "who are they"]).shape[0] == 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_units_of_the_embedding_do_not_matter(scale: float) -> None:
    records, _ = two_bells(200, 200)
    plain = prompt_shift(records, embed=numbers)
    scaled = prompt_shift(
        records, embed=lambda texts: np.hstack([scale * numbers(texts), np.full((len(texts), 1), 7.0)])
    )
    assert scaled.weights == pytest.approx(plain.weights, rel=0.02)


def test_a_sentence_transformers_model_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        def __init__(self, name: str) -> None:
            if name == "none/such":
                raise OSError("none/such is not a model\nsecond line")

        def encode(self, texts: list[str]) -> Any:
            return numbers(texts)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Stand))
    records, _ = two_bells(50, 50)
    assert prompt_shift(records, embed=embedder("some/model")) == prompt_shift(records, embed=numbers)
    with pytest.raises(
        ConfigError, match=r"^match_prompts: none/such could not be loaded .*is not a model\)\. Name another"
    ):
        embedder("none/such")


@pytest.mark.parametrize("mode", ["padded", "shared"])
def test_mean_hidden_states(mode: Any) -> None:
    """One prompt at a time, without padding, from transformers' own forward pass."""
    model = tiny.model()
    prompts = [e.prompt for e in tiny.examples(Thumb, 7)]
    with torch.no_grad():
        wanted = [model.model(torch.tensor([p])).last_hidden_state[0].mean(0).float() for p in prompts]
    install(model, torch.float64, mode)
    for budget in (1, 20, 1000):
        assert close(mean_hidden(model, prompts, budget), torch.stack(wanted), 1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], records: Sequence[Record], **more: Any) -> str:
    with pytest.raises(error) as caught:
        prompt_shift(records, **more)
    return str(caught.value)


def test_bad_input() -> None:
    good, bad = ([thumb(f"{i}.{int(g)}", g) for i in range(20)] for g in (True, False))
    pair = Comparison((Message("user", "x"),), "a", "b")
    assert "this is a comparison." in refused(FeedbackKindError, [*good, *bad, pair])
    assert refused(DataError, good).startswith("0 different prompts have a thumb down: too few")
    assert refused(DataError, [*good, *bad[:9]]).startswith("9 different prompts have a thumb down: too few")
    assert refused(DataError, [*good[:1] * 30, *bad]).startswith("1 different prompts have a thumb up: too few")
    for low, high in ((0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)):
        assert "expected 0 < low < high" in refused(ConfigError, [*good, *bad], low=low, high=high)
    wrong: list[Callable[[list[str]], Any]] = [lambda t: np.zeros((3, 2)), lambda t: np.zeros(len(t)), lambda t: np.full((len(t), 1), np.nan)]  # fmt: skip  # noqa: E501
    for embed in wrong:
        assert "expected 40 rows of finite numbers" in refused(DataError, [*good, *bad], embed=embed)
    silent = [thumb("?" * (i + 1), i % 2 == 0) for i in range(40)]
    assert refused(DataError, silent).startswith("the prompts have no words to tell them apart by")


# --- which methods weigh, and a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [c for c in methods().values() if c.feedback is Thumbs], ids=lambda c: c.name())
def test_declared_weights_are_used_weights(cls: type[Objective]) -> None:
    """And only bad rows are weighed."""
    y, up = (
        completions([[-0.5, -1.0], [-2.0], [-0.3]], [[-0.7, -1.3], [-1.5], [-0.1]]),
        torch.tensor([True, False, True]),
    )
    y._extras.update({name: torch.full((4,), -2.0, dtype=torch.float64) for name in EXTRAS.keys() & cls().needs})
    plain = Thumbs(y, up, completions([[0.2]], [[0.0]]))
    losses = [
        cls().loss(replace(plain, weight=torch.tensor(w))) for w in ([1.0, 1.0, 1.0], [1.0, 3.0, 1.0], [5.0, 1.0, 7.0])
    ]
    assert close(losses[0], losses[2]) and close(losses[0], losses[1]) != cls.weighs


def write(path: Path, records: Sequence[Thumb]) -> Path:
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    return path


@pytest.mark.parametrize("how", ["tfidf", "policy"])
def test_a_run_weighs_tells_and_can_be_repeated(how: str, tmp_path: Path) -> None:
    from rich.console import Console

    model, data = tiny_folder(tmp_path / "model"), write(tmp_path / "thumbs.jsonl", topics(60, 60, 0.9, 0.1)[0])
    more = {"max_steps": 2, "batch_size": 8, "samples": 0, "threads": 1, "output": str(tmp_path / "run")}
    config = resolve({"data": str(data), "model": str(model), "method": "bco", "match_prompts": how, **more})
    console = Console(record=True, file=io.StringIO(), width=300)
    folder = run.train(config, console=console)
    card = json.loads((folder / "run.json").read_text())
    found = card["data"]["prompt_shift"]
    assert found["auc_after"] < found["auc_before"] - 0.1 and found["clipped"] > 0
    (note,) = (n for n in card["data"]["notes"] if "before matching" in n)
    assert note in " ".join(console.export_text().split())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"delta", "density_weight", "bound/error"} <= rows[-1].keys()
    assert all(row["density_weight"] != 1 for row in rows if "loss" in row)
    assert (
        card["config"]["match_prompts"] == how == yaml.safe_load((folder / "config.yaml").read_text())["match_prompts"]
    )


def test_only_methods_that_weigh_take_the_option() -> None:
    for values in ({"method": "kto"}, {"method": "dpo"}):
        with pytest.raises(
            ConfigError, match=r'^The option "match_prompts" has no effect here: \w+ does not weigh rows\.'
        ):
            resolve({"data": "x", "match_prompts": "tfidf", **values})
    with pytest.raises(
        ConfigError, match=r'^The option "min_density_ratio" has no effect here: match_prompts is none\.'
    ):
        resolve({"data": "x", "method": "bco", "min_density_ratio": 0.1})
    with pytest.raises(ConfigError, match=r"^min_density_ratio 3 is not below max_density_ratio 2\."):
        resolve(
            {"data": "x", "method": "bco", "match_prompts": "tfidf", "min_density_ratio": 3, "max_density_ratio": 2}
        )


def test_a_name_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.config.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r'^match_prompts is "tfdif"\. Did you mean "tfidf"\? .*pip install sentence-trans'
    ):
        resolve({"data": "x", "method": "bco", "match_prompts": "tfdif"})
    with pytest.raises(ConfigError, match=r"^match_prompts: tfidf needs a package .*: pip install scikit-learn\."):
        resolve({"data": "x", "method": "bco", "match_prompts": "tfidf"})
