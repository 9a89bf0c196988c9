"""Each rule fires on the curve it was written for, with its numbers, and on no healthy one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.report.alarms import Alarm, find_alarms
from trimtab.report.folder import Points, RunFolder

Formula = Callable[[float], float]


def run(
    card: dict[str, Any] | None = None, samples: list[dict[str, Any]] | None = None, **curves: Formula
) -> RunFolder:
    points: Points = {}
    for name, formula in curves.items():
        key = name.replace("__", "/")
        count = 10 if key.startswith("eval/") else 100
        points[key] = [(i * 100 / count, formula(i / count)) for i in range(1, count + 1)]
    return RunFolder(Path("run"), card or {}, points, samples or [])


def alarm(found: list[Alarm], words: str) -> Alarm:
    matching = [a for a in found if words in a.title]
    assert len(matching) == 1, [a.title for a in found]
    assert matching[0].meaning
    assert matching[0].remedy
    return matching[0]


def noisy(formula: Formula, size: float, seed: int = 0) -> Formula:
    generator = random.Random(seed)
    return lambda t: formula(t) + generator.gauss(0, size)


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_noisy_run_raises_nothing(seed: int) -> None:
    found = find_alarms(
        run(
            {"reference": "frozen copy", "data": {"rows": 1000, "records": 990, "dropped": {"empty": 10}}},
            loss=noisy(lambda t: 0.693 - 0.3 * t, 0.05, seed),
            eval__loss=lambda t: 0.693 - 0.2 * t,
            rewards__chosen=noisy(lambda t: -0.2 * t, 0.1, seed),
            rewards__accuracies=noisy(lambda t: 0.5 + 0.25 * t, 0.05, seed),
            eval__rewards__accuracies=lambda t: 0.5 + 0.15 * t,
            rewards__margins=noisy(lambda t: t, 0.2, seed),
            logps__chosen=noisy(lambda t: -120 - 2 * t, 15, seed),
            grad_norm=noisy(lambda t: 3 - t, 0.3, seed),
            learning_rate=lambda t: 1e-5 * (1 - t),
            kl=noisy(lambda t: 5 * t, 0.2, seed),
            length=noisy(lambda t: 80, 10, seed),
        )
    )
    assert found == []


def test_nan_names_the_first_step_and_its_chart() -> None:
    found = alarm(find_alarms(run(loss=lambda t: math.nan if t > 0.5 else 1 - t, kl=lambda t: t)), "NaN")
    assert found.grave
    assert found.chart == "loss"
    assert "First in loss at step 51" in found.evidence


def test_nothing_moves() -> None:
    found = alarm(find_alarms(run(loss=noisy(lambda t: 0.6931, 1e-5), learning_rate=lambda t: 0.0)), "Nothing moves")
    assert found.grave
    assert "ln 2" in found.evidence
    assert "learning rate was 0" in found.evidence


def test_a_loss_of_zero() -> None:
    assert alarm(find_alarms(run(loss=lambda t: 0.0)), "exactly 0").grave


def test_a_loss_that_rises_or_only_rattles() -> None:
    assert not alarm(find_alarms(run(loss=noisy(lambda t: 0.7, 0.05))), "No clear fall").grave
    assert alarm(find_alarms(run(loss=noisy(lambda t: 0.7 + t, 0.05))), "rose")
    # Held-out rows are the same each time: if their loss falls, noise in training is only noise.
    assert find_alarms(run(loss=noisy(lambda t: 0.7, 0.05), eval__loss=lambda t: 0.7 - 0.1 * t)) == []
    measured = {"evaluation": {"before": {"loss": 0.7}, "after": {"loss": 0.65}}}
    assert find_alarms(run(measured, loss=noisy(lambda t: 0.7, 0.05))) == []


@pytest.mark.parametrize(("fall", "grave"), [(8, False), (40, True)])
def test_likelihood_displacement(fall: float, grave: bool) -> None:
    curves = {"eval__logps__chosen": lambda t: -100 - fall * t, "eval__logps__rejected": lambda t: -100 - 50 * t}
    found = alarm(find_alarms(run(**curves)), "less likely")
    assert found.grave is grave
    assert found.chart == "logps"
    assert f"fell by {0.9 * fall:.3g} nats" in found.evidence
    assert "DPOP" in found.remedy


def test_displacement_is_not_read_out_of_batch_noise() -> None:
    assert find_alarms(run(logps__chosen=noisy(lambda t: -100 - 6 * t, 40))) == []
    assert alarm(find_alarms(run(logps__chosen=noisy(lambda t: -100 - 60 * t, 40))), "less likely")


def test_displacement_is_measured_on_the_same_rows_where_there_are_any() -> None:
    """Other batches have other answers: their log-prob falls by 30 nats where the held-out rows' own fell by 3."""
    training = {"logps__chosen": lambda t: -75 - 30 * t}
    assert alarm(find_alarms(run(**training)), "less likely").grave
    held_out = {"evaluation": {"before": {"logps/chosen": -119}, "after": {"logps/chosen": -122}}}
    assert find_alarms(run(held_out, **training)) == []


def test_displacement_from_rewards_needs_a_reference() -> None:
    falling = {"rewards__chosen": lambda t: -3 * t}
    assert alarm(find_alarms(run({"reference": "frozen copy"}, **falling)), "under the reference")
    assert find_alarms(run({"reference": None}, **falling)) == []


def test_saturated_accuracy_with_exploding_margins() -> None:
    found = find_alarms(run(rewards__accuracies=lambda t: min(1, 0.5 + 2 * t), rewards__margins=lambda t: 20 * t * t))
    assert "margin grew" in alarm(found, "saturated").evidence
    level = find_alarms(run(rewards__accuracies=lambda t: min(1, 0.5 + 2 * t), rewards__margins=lambda t: min(t, 0.4)))
    assert level == []


def test_held_out_loss_turning_upwards_names_the_step() -> None:
    found = find_alarms(run(loss=lambda t: 1 - t, eval__loss=lambda t: 0.6 + (t - 0.4) ** 2))
    assert "step 40" in alarm(found, "turned upwards").evidence


def test_training_far_ahead_of_held_out() -> None:
    found = find_alarms(run(rewards__accuracies=lambda t: 0.5 + 0.4 * t, eval__rewards__accuracies=lambda t: 0.55))
    assert "0.55 on the held-out rows" in alarm(found, "far ahead").evidence


def test_swapped_labels() -> None:
    card = {"evaluation": {"after": {"rewards/accuracies": {"value": 0.3, "low": 0.25, "high": 0.36, "n": 200}}}}
    assert alarm(find_alarms(run(card)), "worse than by a coin").grave


def test_growing_answers() -> None:
    before = {"value": 40, "low": 38, "high": 42, "n": 60}
    longer = {"samples": {"length_before": before, "length_after": {"value": 80, "low": 75, "high": 85, "n": 60}}}
    assert "from 40 to 80 tokens, 2 times as long" in alarm(find_alarms(run(longer)), "grew longer").evidence
    shorter = {"samples": {"length_before": before, "length_after": {"value": 10, "low": 8, "high": 12, "n": 60}}}
    assert alarm(find_alarms(run(shorter)), "shorter")
    unsure = {"samples": {"length_before": before, "length_after": {"value": 60, "low": 20, "high": 100, "n": 3}}}
    assert find_alarms(run(unsure)) == []
    assert alarm(find_alarms(run(length__samples=noisy(lambda t: 60 + 60 * t, 5))), "grow")
    # The length of the data in a batch is not the model's doing.
    assert find_alarms(run(length__chosen=lambda t: 60 + 60 * t)) == []


def test_gradients() -> None:
    spike = alarm(find_alarms(run(grad_norm=lambda t: 500.0 if t == 0.3 else 1.0)), "spike")
    assert "500 at step 30, 500 times the median 1" in spike.evidence
    assert alarm(find_alarms(run(grad_norm=lambda t: 0.0)), "No gradient").grave


def test_distance() -> None:
    assert alarm(find_alarms(run({"samples": {"kl": {"value": 50, "low": 45, "high": 55, "n": 60}}})), "Far")
    assert alarm(find_alarms(run(kl=lambda t: 80 * t)), "Far")
    assert alarm(find_alarms(run({"samples": {"kl": {"value": -2, "low": -3, "high": -1, "n": 60}}})), "Negative")
    assert find_alarms(run({"samples": {"kl": {"value": -0.1, "low": -0.5, "high": 0.3, "n": 60}}})) == []


def test_collapsed_and_empty_samples() -> None:
    same = [{"prompt": str(i), "before": f"b{i}", "after": "Great question!"} for i in range(10)]
    assert "10 of 10 answers are the same text" in alarm(find_alarms(run(samples=same)), "One answer").evidence
    empty = [{"prompt": str(i), "before": f"b{i}", "after": " " if i < 3 else f"a{i}"} for i in range(10)]
    assert alarm(find_alarms(run(samples=empty)), "Empty").grave
    fine = [{"prompt": str(i), "before": "yes", "after": "yes" if i % 2 else "no"} for i in range(10)]
    assert find_alarms(run(samples=fine)) == []


def test_data_that_was_cut_or_dropped() -> None:
    tokens = {"truncated_rows": 120, "eos_lost": {"chosen": 30, "rejected": 10}}
    card = {"data": {"rows": 1000, "records": 700, "dropped": {"empty": 300}, "tokens": tokens}}
    found = find_alarms(run(card))
    assert "120 rows exceeded the length limit. 40 answers lost" in alarm(found, "cut").evidence
    assert "300 rows of 1,000 were dropped" in alarm(found, "not used").evidence
    assert alarm(found, "cut").grave


def test_failed_checks_come_first_and_fallbacks_last() -> None:
    card = {"checks": [{"name": "x", "ok": False}, {"name": "y", "ok": True}], "engine": {"fallback": "no kernel here"}}
    assert [a.title for a in find_alarms(run(card))] == ["Check failed: x", "The engine used its fallback"]
