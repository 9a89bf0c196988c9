"""Process reward model: golden values, which token is read, outcome supervision, soft labels, steps on real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.objectives.by_hand import close, exactly, score_gradient, scored, softplus
from tests.tiny_folder import tokenizer
from trimtab.errors import ConfigError
from trimtab.feedback.records import Message, Solution
from trimtab.logprobs.scored import Solutions
from trimtab.objectives.process_reward import ProcessReward
from trimtab.tokens.template import Template, tokenize


def solutions(
    numbers: Sequence[Sequence[float]],
    ends: Sequence[Sequence[int]],
    labels: Sequence[Sequence[float]],
    dtype: torch.dtype = torch.float64,
) -> Solutions:
    y = scored(numbers, dtype)
    starts = [sum(len(n) for n in numbers[:i]) for i in range(len(numbers))]
    at = torch.tensor([s + e for s, row in zip(starts, ends, strict=True) for e in row])
    row = torch.tensor([i for i, e in enumerate(ends) for _ in e])
    return Solutions(y, at, row, torch.tensor([v for r in labels for v in r], dtype=dtype))


def two() -> Solutions:
    """Steps end at tokens 1 and 3 (right, then wrong) and at token 0 (right in half of the attempts)."""
    return solutions([[9.0, 0.7, 9.0, -0.4], [0.2]], [[1, 3], [0]], [[1.0, 0.0], [0.5]])


def test_golden() -> None:
    """log(1 + e^-0.7) + log(1 + e^-0.4) = 0.916201301285411 and [log(1 + e^-0.2) + log(1 + e^0.2)]/2 = 0.698138869381592,
    of 2 and 1 steps;  slopes sigma(0.7) - 1 = -0.331812227831834, sigma(-0.4) = 0.401312339887548,
    sigma(0.2) - 0.5 = 0.0498339973124779; 0 at every token that ends no step
    """
    batch, method = two(), ProcessReward()
    assert method.loss(batch).tolist() == exactly([0.916201301285411, 0.698138869381592])
    assert method.size(batch).tolist() == [2, 1]
    assert score_gradient(method, batch, batch.y) == [
        exactly([0.0, -0.331812227831834, 0.0, 0.401312339887548, 0.0498339973124779])
    ]


def test_outcome_supervision_counts_the_last_step_in_training_only() -> None:
    last = ProcessReward(supervise="last")
    assert last.loss(two()).tolist() == exactly([softplus(-0.4), (softplus(-0.2) + softplus(0.2)) / 2])
    assert last.size(two()).tolist() == [1, 1]
    held_out = replace(two(), learning=False)
    assert close(last.loss(held_out), ProcessReward().loss(held_out)) and last.size(held_out).tolist() == [2, 1]


def test_a_step_does_not_see_the_next_one() -> None:
    batch = two()
    other = solutions([[-9.0, 0.7, 5.0, 8.0], [0.2]], [[1, 3], [0]], [[1.0, 0.0], [0.5]])
    (slope,), (moved,) = (score_gradient(ProcessReward(), b, b.y) for b in (batch, other))
    assert slope[1] == moved[1] and slope[3] != moved[3]


def test_metrics_and_advice() -> None:
    found = ProcessReward().metrics(solutions([[1.0, -1.0, 2.0, -3.0]], [[0, 1, 2, 3]], [[1.0, 1.0, 0.0, 0.25]]))
    assert found["accuracies/steps"].tolist() == [1, 0, 0, 1]
    assert found["accuracies/right_steps"].tolist() == [1, 0] and found["accuracies/wrong_steps"].tolist() == [0, 1]
    assert ProcessReward().reward(two().y).tolist() == exactly([-0.4, 0.2])
    assert ProcessReward().advise(two()) == ("", ["33% of 3 steps are right"])
    same = solutions([[0.0, 0.0]], [[0, 1]], [[1.0, 1.0]])
    assert ProcessReward().advise(same)[0] == "all 2 steps have the label 1; there is nothing to learn from"
    with pytest.raises(ConfigError, match=r"^process_reward: supervise"):
        ProcessReward(supervise="first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_1000(dtype: torch.dtype) -> None:
    batch = solutions([[1000.0, -1000.0]], [[0, 1]], [[0.0, 1.0]], dtype)
    assert ProcessReward().loss(batch).tolist() == [2000.0]
    assert score_gradient(ProcessReward(), batch, batch.y) == [[1.0, -1.0]]


# --- steps as tokens (spec B.2: separators, truncation) ------------------------------------------------------------------

STEPS = Solution((Message("user", "2 + 2 * 3?"),), ("2 * 3 is 6.", "So 2 + 6.", "It is 8."), (1.0, 1.0, 0.5))


@pytest.mark.parametrize("mode", ["chat", "plain"])
def test_one_judged_token_per_step_at_its_end(mode: str) -> None:
    words = tokenizer()
    example = Template(words, mode).encode(STEPS)  # type: ignore[arg-type]
    (ids,) = example.completions
    cuts = [0, *(m + 1 for m in example.marks)]
    pieces = [words.decode(ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert pieces == ["2 * 3 is 6.\n", "So 2 + 6.\n", "It is 8.</s>"] and example.marks[-1] == len(ids) - 1


def test_truncation_keeps_labels_where_they_belong() -> None:
    template = Template(tokenizer())
    whole = template.encode(STEPS)
    limit = len(whole.prompt) + whole.marks[1] + 3  # into the third step
    (cut,), report = tokenize([STEPS], template, max_length=limit, truncation="completion", max_truncated=1.0)
    assert cut.marks == whole.marks[:2] and report.truncated_rows == 1
    y = scored([[float(t) for t in range(len(cut.completions[0]))]])
    view = Solutions.of(y, [cut])
    assert view.label.tolist() == [1.0, 1.0] and view.at.tolist() == list(whole.marks[:2])
    long = replace(STEPS, prompt=(Message("user", 40 * "2 + 2 * 3? "),))
    (short,), _ = tokenize([long], template, max_length=200, truncation="prompt", max_truncated=1.0)
    assert short.marks == whole.marks and len(short.prompt) < len(template.encode(long).prompt)
