"""Merging: each way against its definition by hand, on vectors; the command on saved models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_folder import tiny_folder
from trimtab.errors import ConfigError
from trimtab.merge import _combine, merge, slerp
from trimtab.models import load_model

START = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
A, B = torch.tensor([0.5, -0.1, 0.2, 0.0, 0.4]), torch.tensor([0.3, 0.6, -0.1, 0.2, -0.7])


@pytest.mark.parametrize(
    ("how", "weights", "density", "expected"),
    [
        ("linear", [1.0, 3.0], 1.0, [0.35, 0.425, -0.025, 0.15, -0.425]),
        ("task_arithmetic", [1.0, 0.5], 1.0, [0.65, 0.2, 0.15, 0.1, 0.05]),
        # kept of A: 0.5, 0.4, of B: 0.6, -0.7; signs of the sums +, +, (0: +), (0: +), -; means over those that agree
        ("ties", [1.0, 1.0], 0.4, [0.5, 0.6, 0.0, 0.0, -0.7]),
        # nothing is trimmed: +: (0.5 + 0.3)/2, +: 0.6, +: 0.2, +: 0.2, -: -0.7; half weights change nothing
        ("ties", [0.5, 0.5], 1.0, [0.4, 0.6, 0.2, 0.2, -0.7]),
    ],
)
def test_by_hand(how: str, weights: list[float], density: float, expected: list[float]) -> None:
    found = _combine(how, torch.tensor(weights), density)(START, [A, B])  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", ["dare_ties", "dare_linear"])
def test_dare_drops_and_rescales(how: str) -> None:
    """One task vector of ones, half of it kept: about half are 2, the others 0; the mean is kept."""
    torch.manual_seed(0)
    ones = torch.ones(10_000)
    found = _combine(how, torch.tensor([1.0, 1.0]), 0.5)(ones, [ones, torch.zeros(10_000)])  # type: ignore[arg-type]
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert found.mean().item() == pytest.approx(1.0, abs=0.05)


def test_slerp_goes_along_the_circle() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    half = slerp(a, b, 0.5)
    assert half.tolist() == pytest.approx([2**0.5, 2**0.5]) and half.norm().item() == pytest.approx(2.0)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    assert slerp(a, 2 * a, 0.5).tolist() == [3.0, 0.0]


@pytest.fixture
def three(tmp_path: Path) -> tuple[str, list[str]]:
    """A start and two models that lie 0.1 and 0.3 above it in every weight."""
    start = tiny_folder(tmp_path / "start")
    names = []
    for k, by in enumerate((0.1, 0.3)):
        model = load_model(start)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(by)
        model.save_pretrained(tmp_path / str(k))
        from trimtab.models import load_tokenizer

        load_tokenizer(start).save_pretrained(tmp_path / str(k))
        names.append(str(tmp_path / str(k)))
    return str(start), names


def test_models_are_merged_and_saved(three: tuple[str, list[str]], tmp_path: Path) -> None:
    start, models = three
    told = merge(start, models, tmp_path / "out", how="task_arithmetic", weights=[1.0, 1.0], scale=0.5)
    assert told.startswith(f"{tmp_path / 'out'}: task_arithmetic of")
    before, after = dict(load_model(start).named_parameters()), dict(load_model(tmp_path / "out").named_parameters())
    assert all(torch.allclose(after[n], before[n] + 0.2, atol=1e-6) for n in before)


def test_what_is_refused(three: tuple[str, list[str]], tmp_path: Path) -> None:
    start, models = three
    out = tmp_path / "out"
    for problem, kwargs in {
        "slerp merges two models; 3 named": {"models": [*models, start], "how": "slerp"},
        "expected one number, 0 or more, for each of 2 models": {"weights": [1.0]},
        "density 0.5 has no effect for linear": {"how": "linear", "density": 0.5},
        'how is "mean"; expected one of linear': {"how": "mean"},
    }.items():
        with pytest.raises(ConfigError, match=problem):
            merge(start, **{"models": models, "out": out, **kwargs})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="holds something already"):
        merge(start, models, tmp_path)
