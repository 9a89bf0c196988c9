"""The contract that every method keeps, proof that the check can fail, and the rules of the folder."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import trimtab
from trimtab.errors import CheckFailed, ConfigError, NeedError
from trimtab.logprobs.scored import Completions, Pairs, Rankings
from trimtab.objectives import methods, objective_class
from trimtab.objectives.base import Objective, option
from trimtab.objectives.check import CHECKS, check_objective
from trimtab.objectives.dpo import DPO
from trimtab.objectives.simpo import SimPO

ROOT = Path(trimtab.__file__).parent


def variants(cls: type[Objective]) -> Iterator[Objective]:
    """The defaults, every named choice, and every number once at half and once at twice its default (or 0.25 at 0), but
    for values that the method refuses."""
    yield cls()
    for f in dataclasses.fields(cls):
        if f.metadata.get("choices"):
            values: list[Any] = [c for c in f.metadata["choices"] if c != f.default]
        elif isinstance(f.default, bool):
            values = [not f.default]
        elif isinstance(f.default, str):
            values = []  # free text has no variants
        elif isinstance(f.default, int):
            values = [f.default + 1]
        else:
            values = [f.default / 2, 2 * f.default] if f.default else [0.25]
        for value in values:
            with contextlib.suppress(ConfigError):
                yield cls(**{f.name: value})


EVERY = [v for cls in methods().values() for v in variants(cls)]


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_contract(objective: Objective) -> None:
    assert len(check_objective(objective)) == len(CHECKS)


@pytest.mark.parametrize("name", methods())
def test_every_option_says_what_it_is_and_where_its_default_comes_from(name: str) -> None:
    cls = objective_class(name)
    assert cls.name() == name and cls.avoid.endswith(".")
    for f in dataclasses.fields(cls):
        assert f.metadata["help"] and f.metadata["source"], f.name


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'There is no method "ktoo"\. Did you mean "kto"\? Known: .*\bkto\b'):
        objective_class("ktoo")


# --- the check can fail: small objectives, each wrong in one way ------------------------------------------------------


@dataclass(frozen=True)
class Right(Objective):
    """L = -log sigma(r(y_w) - r(y_l)),   r(y) = beta log pi(y|x)/pi_ref(y|x)"""

    beta: float = option(0.1, "scale", above=0)
    feedback, needs = Pairs, frozenset({"reference"})
    paper = "a test"

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.log_ratio

    def margin(self, batch: Pairs) -> Tensor:
        return self.reward(batch.chosen) - self.reward(batch.rejected)

    def loss(self, batch: Pairs) -> Tensor:
        return -logsigmoid(self.margin(batch))


class FlippedSign(Right):
    """L = -log sigma(-m)"""

    def loss(self, batch: Pairs) -> Tensor:
        return -logsigmoid(-self.margin(batch))


class FallingReward(Right):
    """L = -log sigma(m), and a reward of the wrong sign"""

    def reward(self, y: Completions) -> Tensor:
        return -self.beta * y.log_ratio

    def loss(self, batch: Pairs) -> Tensor:
        return -logsigmoid(-self.margin(batch))


class UnusedReference(Right):
    """L = -log sigma(r(y_w) - r(y_l)),   r(y) = beta log pi(y|x)"""

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.logp


class UndeclaredReference(Right):
    """L = -log sigma(m)"""

    needs = frozenset()


class UndeclaredCoupling(Right):
    """L = -log sigma(m - mean m)"""

    def loss(self, batch: Pairs) -> Tensor:
        margin = self.margin(batch)
        return -logsigmoid(margin - margin.mean())


class NeedlesslyCoupled(Right):
    """L = -log sigma(m)"""

    coupled = True


class OrderMatters(Right):
    """L = -log sigma(m) + (previous row's m)^2 row / 100"""

    coupled = True

    def loss(self, batch: Pairs) -> Tensor:
        margin = self.margin(batch)
        return -logsigmoid(margin) + margin.roll(1) ** 2 * torch.arange(len(margin)) / 100


class SizeOfLogps(Right):
    """L = -log sigma(m), divided by -log pi(y_w)"""

    def size(self, batch: Pairs) -> Tensor:
        return -batch.chosen.logp.detach()


class Overflow(Right):
    """L = -log(sigma(m))"""

    def loss(self, batch: Pairs) -> Tensor:
        return -torch.log(torch.sigmoid(self.margin(batch)))


class NanGradient(Right):
    """L = log(1 + e^-m), by where: the branch that is not taken overflows in the gradient"""

    def loss(self, batch: Pairs) -> Tensor:
        m = self.margin(batch)
        return torch.where(m > -30, torch.log1p(torch.exp(-m)), -m)


class CutGraph(Right):
    """L = -log sigma(m) |m|, the second factor without a graph"""

    def loss(self, batch: Pairs) -> Tensor:
        return -logsigmoid(self.margin(batch)) * (1 + self.margin(batch).detach().abs())


class MeanLoss(Right):
    """L = mean of -log sigma(m)"""

    def loss(self, batch: Pairs) -> Tensor:
        return super().loss(batch).mean()


class Float32(Right):
    """L = -log sigma(m), in float32 whatever comes in"""

    def loss(self, batch: Pairs) -> Tensor:
        return super().loss(batch).float()


class NoPaper(Right):
    """L = -log sigma(m)"""

    paper = ""


class NoEquation(Right):
    """Direct preference optimization."""


WRONG = [
    (FlippedSign, "moves away from what was preferred"),
    (FallingReward, "the reward does not rise"),
    (UnusedReference, r"declares needs \['reference'\], but reads nothing"),
    (UndeclaredCoupling, "depends on the other rows; declare coupled = True"),
    (NeedlesslyCoupled, "is declared coupled, but no row's loss depends on another"),
    (OrderMatters, "summed loss changes with the order of the rows"),
    (SizeOfLogps, r"size\(\) depends on log-probs"),
    (Overflow, "loss overflows at log-ratios of 1000 in torch.float32"),
    (NanGradient, "gradient is not finite at log-ratios of 1000"),
    (CutGraph, "the loss's slope is"),
    (MeanLoss, r"loss has shape \(\), expected one number per example: \(6,\)"),
    (Float32, "loss is torch.float32 for torch.float64 log-probs"),
    (NoPaper, "set `paper`"),
    (NoEquation, "must hold the equation"),
]


def test_the_right_one_passes() -> None:
    assert check_objective(Right())


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[w.__name__ for w, _ in WRONG])
def test_check_fails_for(wrong: type[Objective], message: str) -> None:
    with pytest.raises(CheckFailed, match=f"^{wrong.__name__}: .*{message}"):
        check_objective(wrong())


def test_reading_an_undeclared_reference_raises() -> None:
    with pytest.raises(NeedError, match='"reference" is not in the objective\'s needs'):
        check_objective(UndeclaredReference())


def test_signature_that_dataclass_writes_is_no_equation() -> None:
    @dataclass(frozen=True)
    class Undocumented(Right):
        pass

    assert "=" in (Undocumented.__doc__ or "")
    with pytest.raises(CheckFailed, match="must hold the equation"):
        check_objective(Undocumented())


@dataclass(frozen=True)
class ListWise(Objective):
    """L = -log sigma(m - mean m + shift),   m = beta (log pi(best) - log pi(worst)),   shift grows with every batch"""

    beta: float = option(0.1, "scale", above=0)
    feedback = Rankings
    coupled = True
    paper = "a test"

    def reward(self, y: Completions) -> Tensor:
        return self.beta * y.logp

    def loss(self, batch: Rankings) -> Tensor:
        reward = self.reward(batch.y).view(len(batch), -1)
        gap = reward[:, 0] - reward[:, -1]
        return -logsigmoid(gap - gap.mean() + self.shift(batch.memory).to(gap))

    @staticmethod
    def shift(memory: Mapping[str, Tensor]) -> Tensor:
        return memory.get("shift", torch.zeros(()))

    def remember(self, batch: Rankings, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"shift": self.shift(memory) + 0.1}


class NoFirstStep(ListWise):
    """L = -log sigma(m - mean m + shift), but no shift before the first batch"""

    def loss(self, batch: Rankings) -> Tensor:
        return super().loss(batch) + 0 * batch.memory["shift"]


def test_rankings_coupling_and_memory_are_checked_too() -> None:
    assert ListWise().has_memory() and not DPO().has_memory()
    assert check_objective(ListWise())
    with pytest.raises(
        CheckFailed, match=r"^NoFirstStep: reads memory\['shift'\] before the first batch: use memory.get"
    ):
        check_objective(NoFirstStep())


# --- the folder is the registry, and its rules --------------------------------------------------------------------------

SEAM = {"trimtab.errors", "trimtab.logprobs.scored", "trimtab.objectives.base"}
OUTER = {"__init__.py": {"trimtab.errors"}, "base.py": {"trimtab.errors"}, "check.py": {"trimtab.errors", "trimtab.tokens.batch"}}  # fmt: skip  # noqa: E501
FILES = [f for folder in ("objectives", "credit") for f in sorted((ROOT / folder).glob("*.py"))]
METHOD_FILES = [f for f in FILES if f.parent.name == "objectives" and f.name not in OUTER]


def imports(source: str) -> set[str]:
    """Absolute names of every module imported anywhere in the file; a relative import shows as its dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def forbidden(source: str, file: Path) -> set[str]:
    siblings = {f"trimtab.{file.parent.name}.{f.stem}" for f in file.parent.glob("*.py")}
    credit = {f"trimtab.credit.{f.stem}" for f in (ROOT / "credit").glob("*.py")}
    allowed = SEAM | siblings | credit | {"trimtab.objectives"} | OUTER.get(file.name, set())
    ours = {m for m in imports(source) if m.partition(".")[0] not in {"torch", *sys.stdlib_module_names}}
    return {m for m in ours if m not in allowed and not (file.name == "__init__.py" and m == "trimtab")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_mathematics_imports_torch_and_the_seam_only(file: Path) -> None:
    assert not forbidden(file.read_text(), file)


@pytest.mark.parametrize("line", ["import numpy", "from trimtab.logprobs.score import Scorer", "from . import dpo", "import transformers"])  # fmt: skip  # noqa: E501
def test_a_forbidden_import_is_seen(line: str) -> None:
    assert forbidden(f"def f():\n    {line}\n", METHOD_FILES[0])


@pytest.mark.parametrize("file", METHOD_FILES, ids=lambda f: f.name)
def test_a_method_is_one_short_file(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60
    here = [n for n, cls in methods().items() if cls.__module__ == f"trimtab.objectives.{file.stem}"]
    assert here == [file.stem]


def compares_names(source: str) -> list[int]:
    """Lines that decide by a method's name: ==, in, match, startswith, or isinstance of a method's class."""
    names, classes = set(methods()), {c.__name__ for c in methods().values()}

    def is_name(node: ast.AST) -> bool:
        literal = isinstance(node, ast.Constant) and node.value in names
        asked = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "name"
        return literal or (asked and not node.args)  # type: ignore[attr-defined]

    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left=left, comparators=others):
                inside = [e for o in others if isinstance(o, ast.Tuple | ast.List | ast.Set) for e in o.elts]
                hit = any(map(is_name, (left, *others, *inside)))
            case ast.MatchValue(value=value):
                hit = is_name(value)
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith"), args=args):
                hit = any(map(is_name, args))
            case ast.ImportFrom(module=str(module)):
                hit = module.removeprefix("trimtab.objectives.") in names
            case ast.Name(id=name):
                hit = name in classes
            case _:
                hit = False
        if hit:
            found.append(node.lineno)
    return found


# promises are about named methods, each against another; the world's model is made by one
ABOUT_METHODS = {"compare/promises.py", "world/train.py"}
BELOW = [
    f
    for f in sorted(ROOT.rglob("*.py"))
    if f.parent.name != "objectives" and str(f.relative_to(ROOT)) not in ABOUT_METHODS
]


@pytest.mark.parametrize("file", BELOW, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_below_asks_which_method_it_is(file: Path) -> None:
    assert compares_names(file.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'if objective.name() == "mine": pass',
        'x = method == "dpo"',
        'x = "kto" != method',
        'x = method in ("dpo", "simpo")',
        'match m:\n    case "todo": pass',
        'x = m.startswith("sft")',
        "from trimtab.objectives.kto import KTO as K",
        "x = isinstance(o, KTO)",
    ],
)
def test_asking_which_method_it_is_is_seen(line: str) -> None:
    assert compares_names(line)


def test_a_subclass_of_a_method_keeps_its_own_name() -> None:
    class Mine(SimPO):
        """L = mine"""

    assert Mine.name() == "mine" and "mine" not in methods()
