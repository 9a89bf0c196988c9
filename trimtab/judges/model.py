"""Models that judge through the engine: a reward model, a preference model, a process reward model, a policy/reference pair.

Numbers do not depend on how questions are batched but for the last bits of float32; a token budget of 1 scores every question
alone and gives the same bits whatever was judged before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid

from trimtab.errors import ConfigError, ModelError, nearest
from trimtab.feedback.records import STEP, Comparison, Conversation, Demonstration, Message, Record, Solution
from trimtab.judges.base import Failure, Judge, Judgement, Preference, Question, Scores
from trimtab.logprobs.cache import weights_hash
from trimtab.logprobs.layout import Mode, cost
from trimtab.logprobs.reference import adapter_off
from trimtab.logprobs.score import PRECISION, Scorer, base_model, choose_layout, install
from trimtab.models import (
    FIRST_WINS,
    STEP_RIGHT,
    check_weights,
    end_tokens,
    is_reward_model,
    load_model,
    load_reward_model,
    load_tokenizer,
    what_it_says,
)
from trimtab.tokens.batch import Example, fill, jointly
from trimtab.tokens.template import TOO_LONG, RowRefused, Template

PROBE = Comparison((Message("user", "Which is more?"),), "Two is more than one.", "One.")  # what a layout is tried on


@dataclass
class ModelJudge(Judge):
    """What they share: answers become tokens as in training; those that cannot are failures, one by one.

    Args:
        scorer: the engine around the model, see :func:`scorer_for`.
        max_length: in tokens, prompt and answer together; longer ones are failures, never cut.
    """

    scorer: Scorer
    template: Template
    max_length: int = field(default=1024, kw_only=True)

    @property
    def identity(self) -> str:
        weights, precision = weights_hash(self.scorer.model, skip=()), getattr(base_model(self.scorer.model), PRECISION)
        return f"{type(self).__name__} {weights} {precision} {self.template.fingerprint} {self.max_length}"

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        answers = [[self._encode(q.prompt, c) for c in q.completions] for q in questions]
        rows = [self._rows([a for a in part if isinstance(a, Example)]) for part in answers]
        costs = [sum(cost(e, self.scorer.mode, self.scorer.closed) for e in part) for part in rows]
        for part in fill(costs, self.scorer.budget):
            examples = [e for i in part for e in rows[i]]
            numbers = iter(self._numbers(examples) if examples else [])
            for i in part:
                yield self._judgement(answers[i], numbers)

    def _encode(self, prompt: Conversation, completion: str) -> Example | Failure:
        try:
            example = self.template.encode(self._record(prompt, completion))
        except RowRefused as why:
            return Failure(str(why))
        over = len(example.prompt) + len(example.completions[0]) > self.max_length
        return Failure(f"{TOO_LONG} ({self.max_length} tokens)") if over else example

    def _record(self, prompt: Conversation, completion: str) -> Record:
        return Demonstration(prompt, completion)

    def _rows(self, answers: list[Example]) -> list[Example]:
        """What is scored for one question: its answers after one prompt."""
        if not answers:
            return []
        return [replace(answers[0], completions=tuple(chain.from_iterable(a.completions for a in answers)))]

    @abstractmethod
    def _numbers(self, examples: list[Example]) -> list[float]:
        """One number for each completion."""

    def _judgement(self, answers: Sequence[Example | Failure], numbers: Iterator[float]) -> Judgement:
        return Scores(tuple(a if isinstance(a, Failure) else next(numbers) for a in answers))


class RewardJudge(ModelJudge):
    """The number of a reward model at the last token."""

    kind = "pointwise"

    def _numbers(self, examples: list[Example]) -> list[float]:
        return self.scorer.completions(examples).score.tolist()  # type: ignore[no-any-return]


@dataclass
class ImplicitJudge(ModelJudge):
    """The implicit reward of a policy: beta log pi(y|x)/pi_ref(y|x), in the unit of beta (DPO, arXiv:2305.18290, section 4).

    Args:
        scorer: of the policy.
        reference: None for the model under the policy's adapter.
    """

    reference: Scorer | None
    beta: float = field(default=0.1, kw_only=True)
    kind = "pointwise"

    @property
    def identity(self) -> str:
        other = "adapter off" if self.reference is None else weights_hash(self.reference.model, skip=())
        return f"{super().identity} {self.beta} against {other}"

    def _numbers(self, examples: list[Example]) -> list[float]:
        policy, other = self.scorer.completions(examples), self.reference or self.scorer
        with adapter_off(other.model) if self.reference is None else nullcontext():
            reference = other.completions(examples)
        return (self.beta * policy.sum(policy.token_logps - reference.token_logps)).tolist()  # type: ignore[no-any-return]


class PreferenceJudge(ModelJudge):
    """P(the first answer wins) of a preference model, which reads both answers in one text: the mean over both orders."""

    kind = "pairwise"

    def _rows(self, answers: list[Example]) -> list[Example]:
        return [jointly(e) for e in super()._rows(answers)] if len(answers) == 2 else []

    def _numbers(self, examples: list[Example]) -> list[float]:
        return torch.sigmoid(self.scorer.completions(examples).score).tolist()  # type: ignore[no-any-return]

    def _judgement(self, answers: Sequence[Example | Failure], numbers: Iterator[float]) -> Judgement:
        for answer in answers:
            if isinstance(answer, Failure):
                return answer
        shown_first, shown_second = next(numbers), 1 - next(numbers)
        return Preference((shown_first + shown_second) / 2, orders=(shown_first, shown_second))


@dataclass
class StepJudge(ModelJudge):
    """A process reward model: a number for a solution out of P(right so far) at the end of each of its steps.

    Steps are the lines that are not blank.

    Args:
        aggregate: the ``product`` of the steps' probabilities, their minimum (``min``), or the ``last`` one.
    """

    aggregate: Literal["product", "min", "last"] = field(default="product", kw_only=True)
    kind = "pointwise"

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.aggregate}"

    def _record(self, prompt: Conversation, completion: str) -> Record:
        steps = tuple(line for line in completion.split(STEP) if line.strip()) or ("",)
        return Solution(prompt, steps, (0.0,) * len(steps))

    def _rows(self, answers: list[Example]) -> list[Example]:
        return answers  # each has its own steps

    def _numbers(self, examples: list[Example]) -> list[float]:
        y = self.scorer.completions(examples)
        found = []
        for e, number in zip(examples, y.extra("score").split([len(e.completions[0]) for e in examples]), strict=True):
            right = logsigmoid(number[list(e.marks)].double())
            match self.aggregate:
                case "product":
                    log = right.sum()
                case "min":
                    log = right.min()
                case "last":
                    log = right[-1]
            found.append(log.exp().item())
        return found


def load_judge(
    name: str,
    reference: str | None = None,
    *,
    template: Template | None = None,
    precision: torch.dtype = torch.float32,
    layout: Mode | Literal["auto"] = "auto",
    budget: int = 2048,
    **options: Any,
) -> ModelJudge:
    """The judge that the model folder says it is; a language model judges by its implicit reward against ``reference``.

    Args:
        template: None for the tokenizer and chat template that lie beside the model.
        budget: tokens per forward pass.
        options: fields of the judge: ``max_length``, ``stop_after``, ``beta`` or ``aggregate`` where it has them.

    Raises:
        ConfigError: a reference for a reward model, none for a language model, or an option that this judge does not have.
        ModelError: a model cannot be loaded, or the tokenizers of policy and reference differ.
    """
    template = template or Template(load_tokenizer(name), eos_ids=end_tokens(name))
    judges_itself = is_reward_model(name)
    if judges_itself and reference is not None:
        raise ConfigError(f"{name} is a reward model and needs no reference. Remove {reference}.")
    if not judges_itself and reference is None:
        raise ConfigError(
            f"{name} is a language model: its implicit reward needs the reference that it was trained from."
        )
    says = what_it_says(name) if judges_itself else ""
    kind: type[ModelJudge] = RewardJudge if judges_itself else ImplicitJudge
    if says in (FIRST_WINS, STEP_RIGHT):
        kind = PreferenceJudge if says == FIRST_WINS else StepJudge
    known = [f.name for f in fields(kind) if f.kw_only]
    for option in options:
        if option not in known:
            raise ConfigError(
                f'The option "{option}" has no effect on {kind.__name__}.{nearest(option, known)} It has {", ".join(known)}.'
            )
    models = [load_reward_model(name, template.tokenizer, ends=template.eos_ids) if judges_itself else load_model(name)]
    if reference is not None:
        if load_tokenizer(reference).get_vocab() != template.tokenizer.get_vocab():
            raise ModelError(
                f"the tokenizers of {name} and {reference} differ: their log-probs are of different tokens."
            )
        models.append(load_model(reference))
    together = kind is PreferenceJudge
    first, *others = [scorer_for(m, template, precision, layout, budget, together) for m in models]
    return kind(first, template, *others, **options)


def scorer_for(
    model: torch.nn.Module,
    template: Template,
    precision: torch.dtype = torch.float32,
    layout: Mode | Literal["auto"] = "auto",
    budget: int = 2048,
    together: bool = False,
) -> Scorer:
    """The engine around a model, in the fastest layout that gives the model's own numbers on a short pair of answers."""
    check_weights(model)
    probe = template.encode(PROBE)
    mode = choose_layout(model, [jointly(probe) if together else probe], layout).mode
    install(model, precision, mode)
    return Scorer(model, mode, budget)
