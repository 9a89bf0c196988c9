"""What a method is: hyperparameters, what it needs, the reward it implies, and one loss per example."""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Completions, View


def option(
    default: Any,
    help: str,
    *,
    source: str = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[Any, ...] = (),
    follows: str = "",
) -> Any:
    """A hyperparameter: its default, meaning, where the default comes from, and its range, declared once.

    ``follows`` names an option of runs that it must be equal to; a run sets it.
    The configuration, the command-line flag, the method's card and the error for a bad value all follow from it.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "source": source, "follows": follows, **bounds})


HOLDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the hyperparameters.

    Class attributes:
        feedback: the view it learns from (``Pairs``, ``Thumbs``, ...).
        needs: quantities beyond the policy's log-probs: ``reference``, ``mismatched``, ``greedy`` (the score of a greedy
            answer), or one of :data:`trimtab.logprobs.scored.EXTRAS`. Reading what is not declared raises, declaring what
            is not read fails :func:`trimtab.objectives.check.check_objective`.
        coupled: True where one example's loss depends on other examples of the batch through the policy's
            log-probs, so that microbatches must be scored together before they are differentiated.
        ties: True where the method learns from ties; others refuse them.
        paper: where the mathematics comes from.
    """

    feedback: ClassVar[type[View]]
    needs: ClassVar[frozenset[str]] = frozenset()
    coupled: ClassVar[bool] = False
    ties: ClassVar[bool] = False
    weighs: ClassVar[bool] = False  # bad rows count by their weight, which match_prompts computes
    critic: ClassVar[Literal["head", "network"]] = (
        "head"  # what gives ``value``: a head on the policy, or its own network
    )
    rivals: ClassVar[int] = 1  # how many of the likeliest tokens the extra ``rival`` is drawn from
    control_tokens: ClassVar[tuple[str, ...]] = ()  # (good, bad): put before answers in training, good asked for after
    jointly: ClassVar[bool] = (
        False  # both answers stand in one text, in either order; a reward model says which one wins
    )
    paper: ClassVar[str] = ""
    use: ClassVar[str] = ""  # when to use it, in a sentence
    avoid: ClassVar[str] = ""  # when not to use it, in a sentence
    differs: ClassVar[str] = ""  # from the paper, its authors' code or peers, and which one the default follows
    # places on the axes of the alignment survey (arXiv:2407.16216) that nothing above tells
    divergence: ClassVar[str] = "reverse KL"  # from the reference, where there is one
    length_control: ClassVar[bool] = False
    with_sft: ClassVar[bool] = False  # likelihood of good answers is part of the loss
    level: ClassVar[str] = "response"  # or token
    negatives_only: ClassVar[bool] = False
    partner: ClassVar[bool] = False  # one answer of each pair must be the reference's: it is the pair's target
    untied: ClassVar[bool] = False  # on lists: no two answers of one may be equal
    duel: ClassVar[bool] = False  # a pair's strength says both answers' chances: there are no others to its prompt
    by_answer: ClassVar[bool] = False  # on rollouts: the ratio pi/pi_old is the whole answer's, not each token's

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_range(type(self).name(), f, getattr(self, f.name))

    @classmethod
    def name(cls) -> str:
        """The method's name in configurations: its file's name (a user's own class: its own, in small letters)."""
        package, _, file = cls.__module__.rpartition(".")
        return file if package == __package__ else cls.__name__.lower()

    @classmethod
    def equation(cls) -> str:
        """The class docstring: idea and equation."""
        return inspect.getdoc(cls) or ""

    @abstractmethod
    def reward(self, y: Completions) -> Tensor:
        """[B] the reward that the policy implies for each completion, in the units of the method's own margin."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """[R] one number per example. The engine divides their sum by the sum of :meth:`size` over the whole batch."""

    def size(self, batch: Any) -> Tensor:
        """[R] what each example counts in the denominator: 1, unless the method normalises by tokens.

        Must not depend on log-probabilities: it is summed over the whole batch before anything is scored.
        """
        return torch.ones(len(batch))

    def remember(self, batch: Any, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The method's state after this batch (whole, without a graph), kept in checkpoints, frozen in evaluation.

        The loss then reads it as ``batch.memory``. Methods without memory leave this alone.
        """
        return memory

    def credit(self, batch: Any, memory: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What a method on rollouts computes once per round, when the answers were sampled and judged.

        ``batch.y`` holds the log-probs of the policy that sampled (and reference and critic, where declared).

        Returns:
            Columns [N] that the loss then reads as constants (``advantage``, ``returns``, ...), and the memory after this
            round (a KL coefficient that adapts, say).
        """
        return {}, memory

    def settle(self, batch: Any) -> Objective:
        """The method with the settings that follow from the labels of the whole training data (its log-probs are NaN)."""
        return self

    def advise(self, batch: Any) -> tuple[str, list[str]]:
        """Look at the labels of the whole training data (its log-probs are NaN): why it cannot be learned from, or "",
        and notes for the user."""
        return "", []

    def metrics(self, batch: Any) -> dict[str, Tensor]:
        """Extra quantities to log: name -> a vector whose mean is reported (any number of elements)."""
        return {}

    def has_memory(self) -> bool:
        """Whether the method overrides :meth:`remember`."""
        return type(self).remember is not Objective.remember


def _check_range(method: str, field: dataclasses.Field[Any], value: Any) -> None:
    if (choices := field.metadata.get("choices")) and value not in choices:
        raise ConfigError(f'{method}: {field.name} is "{value}"; expected one of {", ".join(map(str, choices))}.')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = {name: field.metadata.get(name) for name in HOLDS}
        said = {name: bound for name, bound in bounds.items() if bound is not None}
        if not math.isfinite(value) or not all(HOLDS[name](value, bound) for name, bound in said.items()):
            wanted = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in said.items())
            raise ConfigError(f"{method}: {field.name} is {value}; expected a number {wanted}.")


def typed(cls: type[Objective], field: dataclasses.Field[Any], value: Any) -> Any:
    """A hyperparameter given as text becomes what the dataclass says it is."""
    kind = type(field.default)
    try:
        if isinstance(value, bool) and kind is not bool:
            raise TypeError
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        return kind(value)  # type: ignore[misc]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f'{cls.name()}: {field.name} is "{value}"; expected {WORDS[kind]}.') from None
