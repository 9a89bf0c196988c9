"""Where a judging language model runs: behind an OpenAI-compatible endpoint, or in this process.

A backend writes replies, and weighs options: the probability that the reply is each of them.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

from trimtab.errors import ConfigError, JudgeError
from trimtab.feedback.records import Conversation, Demonstration, Message
from trimtab.judges.base import Failure
from trimtab.judges.prompt import Unusable
from trimtab.logprobs.cache import weights_hash
from trimtab.logprobs.score import Scorer
from trimtab.online.sample import sample
from trimtab.tokens.batch import Example
from trimtab.tokens.template import TOO_LONG, RowRefused, Template

T = TypeVar("T")
Weights = dict[str, float]  # option -> probability of the reply, not normalised
Read = Callable[[str, bool], T]  # (reply, whether it was cut) -> what it says; raises Unusable

OPENAI_INSTALL = "pip install 'openai>=1.60'"
LEAST = 0.01  # what the options must have together; below that the reply is something else
OPTION_TOKENS = 8  # of a reply that should be an option
WIDEST = 20  # alternatives to a token that a server is asked for: OpenAI's largest number
LONGEST_PAUSE = 60.0  # seconds
REFUSAL = re.compile(r"\b(i('m| am) (sorry|unable|not able)|i (can ?not|can[’']t|won[’']t)|as an ai\b)", re.IGNORECASE)


class Backend(Protocol):
    """A language model that can be asked. One answer or one failure for each conversation, in order."""

    notes: Counter[str]

    @property
    def identity(self) -> str: ...

    @property
    def temperature(self) -> float: ...

    @property
    def control(self) -> Sequence[str]:
        """Control tokens that it is known to have."""
        ...

    def write(self, asked: Sequence[Conversation], seed: int, read: Read[T]) -> list[T | Failure]:
        """What ``read`` makes of the reply to each conversation."""
        ...

    def weigh(self, asked: Sequence[Conversation], options: Sequence[str]) -> list[Weights | Failure]:
        """The probability of each option as reply to each conversation: together at least :data:`LEAST`."""
        ...


# --- behind an endpoint -------------------------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """A model behind ``URL/chat/completions`` (vLLM, SGLang, llama.cpp, ``transformers serve``, OpenAI and others).

    What may pass is asked again: timeouts, lost connections, busy and failing servers after a pause that doubles each time;
    refusals and replies that cannot be read at once, with another seed. Options are weighed by the log-probs of the reply's
    first tokens where the server gives them, and by the reply's text (1 and 0) where it does not.

    Args:
        url: up to and including ``/v1``.
        temperature: of written replies; options are always read at 0.
        max_tokens: of a written reply.
        timeout, backoff: in seconds; ``retries``: how often one question is asked again.
        parallel: requests at a time.
        logprobs: ask for them.
        prefill: the server goes on with an unfinished reply where ``continue_final_message`` says so (vLLM, SGLang). Only
            needed where options begin alike (1 and 10) and the tokenizer cuts numbers into digits.
        key_from: environment variable with the key.
        version: what tells apart two models that are served under one name, for caches.
        extra: further fields of the request.
        sleep: how to wait; tests do not.
    """

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    parallel: int = 4
    logprobs: bool = True
    prefill: bool = False
    key_from: str = "OPENAI_API_KEY"
    version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    notes: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    control: Sequence[str] = field(default=(), init=False)  # the tokenizer is not known here

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._soft = self.logprobs

    @property
    def identity(self) -> str:
        options = (self.temperature, self.max_tokens, self.logprobs, self.prefill, dict(self.extra))
        return f"endpoint {self.model} {self.version} {options}"

    def write(self, asked: Sequence[Conversation], seed: int, read: Read[T]) -> list[T | Failure]:
        def attempt(conversation: Conversation, again: int) -> T:
            # another seed, but none that the next sample of the same question has
            choice = self._ask(conversation, self.max_tokens, self.temperature, seed + 1_000_003 * again)
            return read(_text(choice), choice.finish_reason == "length")

        return self._all(attempt, asked)

    def weigh(self, asked: Sequence[Conversation], options: Sequence[str]) -> list[Weights | Failure]:
        def attempt(conversation: Conversation, again: int) -> Weights:
            choice = self._ask_soft(conversation, again)
            text = _text(choice)
            if steps := _steps(choice):
                follow = partial(self._follow, conversation) if self.prefill else None
                found = over_options(options, steps, follow)
                if sum(found.values()) >= LEAST:
                    return found
            option = read_option(text, options)
            self._note("hard label, without log-probs")
            return {option: 1.0}

        return self._all(attempt, asked)

    def _all(self, attempt: Callable[[Conversation, int], T], asked: Sequence[Conversation]) -> list[T | Failure]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(partial(self._persist, attempt), asked))

    def _persist(self, attempt: Callable[[Conversation, int], T], conversation: Conversation) -> T | Failure:
        for again in range(self.retries + 1):
            try:
                return attempt(conversation, again)
            except Unusable as e:
                if not e.again or again == self.retries:
                    return Failure(e.reason, e.detail)
                self._note(f"asked again: {e.reason}")
                if e.wait:
                    self.sleep(min(self.backoff * 2**again, LONGEST_PAUSE))
        raise AssertionError

    def _note(self, what: str) -> None:
        with self._lock:
            self.notes[what] += 1

    def _ask_soft(self, conversation: Conversation, seed: int) -> Any:
        """With log-probs, unless the server refuses a request because of them."""
        if self._soft:
            try:
                return self._ask(conversation, OPTION_TOKENS, 0.0, seed, logprobs=True, top_logprobs=WIDEST)
            except Unusable as e:
                if e.reason not in ("http 400", "http 422"):
                    raise
        choice = self._ask(conversation, OPTION_TOKENS, 0.0, seed)
        self._soft = False
        return choice

    def _follow(self, conversation: Conversation, begun: str) -> Mapping[str, float]:
        """Log-probs of the tokens that may follow a reply that has begun so."""
        more = {"continue_final_message": True, "add_generation_prompt": False}
        whole = (*conversation, Message("assistant", begun))
        steps = _steps(self._ask(whole, 1, 0.0, 0, more, logprobs=True, top_logprobs=WIDEST))
        return steps[0][1] if steps else {}

    @cached_property
    def client(self) -> Any:
        """OpenAI's, made when first asked for. Raises :class:`ConfigError` where the package is missing."""
        try:
            openai: Any = importlib.import_module("openai")
        except ImportError as e:
            raise ConfigError(f"A judge behind an endpoint needs the package openai: {OPENAI_INSTALL}.") from e
        key = os.environ.get(self.key_from) or "none"
        client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=0)
        weakref.finalize(self, client.close)
        return client

    def _ask(
        self,
        conversation: Conversation,
        max_tokens: int,
        temperature: float,
        seed: int,
        more: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        client = self.client
        openai: Any = importlib.import_module("openai")
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=[asdict(m) for m in conversation],
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                extra_body={**self.extra, **(more or {})},
                **options,
            )
            choice = reply.choices[0]
            refusal = getattr(choice.message, "refusal", None)
            if refusal or choice.finish_reason == "content_filter":
                raise Unusable("refused", refusal or "finish_reason is content_filter")
            return choice
        except openai.APITimeoutError:
            raise Unusable("timeout", f"{self.url} gave no reply in {self.timeout:g} s.", wait=True) from None
        except openai.APIConnectionError as e:
            raise Unusable("no connection", f"{self.url}: {e.__cause__ or e}", wait=True) from None
        except openai.APIStatusError as e:
            said = str(e).splitlines()[0][:200]
            if e.status_code in (401, 403, 404):
                raise JudgeError(
                    f"{self.url} does not answer for the model {self.model} (http {e.status_code}: {said}). Check url and model, "
                    f"and the key in the environment variable {self.key_from}."
                ) from None
            passing = e.status_code in (408, 409, 425, 429) or e.status_code >= 500
            raise Unusable(f"http {e.status_code}", said, again=passing, wait=True) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as e:
            raise Unusable("unreadable reply of the server", repr(e)[:200], wait=True) from None


def _text(choice: Any) -> str:
    return str(choice.message.content or "")


def _steps(choice: Any) -> list[tuple[str, dict[str, float]]]:
    """For each token of the reply: the token, and the log-probs of it and of its likeliest alternatives."""
    content = getattr(choice.logprobs, "content", None) or []
    return [(c.token, {**{t.token: t.logprob for t in c.top_logprobs or []}, c.token: c.logprob}) for c in content]


def over_options(
    options: Sequence[str],
    steps: Sequence[tuple[str, Mapping[str, float]]],
    follow: Callable[[str], Mapping[str, float]] | None = None,
) -> Weights:
    """The probability of each option out of the log-probs of a reply's tokens, spaces around it ignored.

    An option may have several tokens. Where one is the beginning of another (1 and 10), its own probability is what the
    longer one leaves of it: known where the reply itself begins so, else asked of ``follow``.

    Raises:
        Unusable: more than :data:`LEAST` of the probability cannot be told apart.
    """
    weights, unclear = dict.fromkeys(options, 0.0), dict[str, float]()
    start = next((i for i, (token, _) in enumerate(steps) if token.strip()), len(steps))

    def spread(before: str, mass: float, found: Mapping[str, float], at: int | None) -> float:
        """Put what begins with ``before`` where it belongs; ``at`` is the step that ``found`` is from, if it is one."""
        placed, whole = 0.0, {(before + token).strip() for token in found}
        for token, logp in found.items():
            text, p = (before + token).strip(), mass * math.exp(min(logp, 0.0))
            longer = [o for o in options if text and o.startswith(text) and o != text]
            if not longer and text not in weights:
                continue
            beyond = 0.0
            if longer and at is not None and token == steps[at][0]:
                beyond = spread(text, p, steps[at + 1][1], at + 1) if at + 1 < len(steps) else 0.0
            elif set(longer) <= whole:
                pass  # the longer ones are tokens of their own
            elif follow is not None:
                beyond = spread(text, p, follow(text), None)
            elif text in weights:
                unclear[f"{text} and {longer[0]}"] = unclear.get(f"{text} and {longer[0]}", 0.0) + p
            if text in weights:
                weights[text] += p - beyond
                beyond = p
            placed += beyond
        return placed

    if start < len(steps):
        spread("", 1.0, steps[start][1], start)
    for pair, p in unclear.items():
        if p > LEAST * sum(weights.values()):
            raise Unusable(
                f"the tokens of the server do not tell {pair} apart",
                "Set prefill where the server can continue a reply, or use a prompt with weighted: [1, 9].",
                again=False,
            )
    return weights


def read_option(text: str, options: Sequence[str]) -> str:
    """The option that a reply names, at its beginning or nowhere else than once. Raises :class:`Unusable` for anything else."""
    either = "|".join(re.escape(o) for o in sorted(options, key=len, reverse=True))
    first = re.match(rf"\W*({either})(\W*$|\.(?!\d)|[:)\]*/\n])", text)
    named = {first[1]} if first else set(re.findall(rf"(?<![\w.])({either})(?!\w|\.\d)", text))
    if len(named) != 1:
        raise unreadable(text)
    return str(named.pop())


def unreadable(text: str) -> Unusable:
    """A reply that says nothing that can be used, as what it is counted under."""
    reason = "empty reply" if not text.strip() else "refused" if REFUSAL.search(text) else "nonsense"
    return Unusable(reason, f"it said: {text.strip()[:200]}" if text.strip() else "")


# --- in this process ----------------------------------------------------------------------------------------------------


@dataclass
class Local:
    """A model in this process; the probability of an option is exact, whatever its tokens are.

    Args:
        scorer: the engine around the model, see :func:`trimtab.judges.model.scorer_for`.
        temperature: of written replies.
        max_tokens: of a written reply.
        max_length: of a conversation in tokens; longer ones are failures.
    """

    scorer: Scorer
    template: Template
    temperature: float = 0.0
    max_tokens: int = 512
    max_length: int = 4096
    notes: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    @property
    def identity(self) -> str:
        options = (self.temperature, self.max_tokens, self.max_length)
        return f"local {weights_hash(self.scorer.model, skip=())} {self.template.fingerprint} {options}"

    @property
    def control(self) -> Sequence[str]:
        return self.template.control

    def write(self, asked: Sequence[Conversation], seed: int, read: Read[T]) -> list[T | Failure]:
        def replies(prompts: list[tuple[int, ...]]) -> list[T | Failure]:
            model, tokenizer = self.scorer.model, self.template.tokenizer
            how: Any = {"max_new_tokens": self.max_tokens, "seed": seed, "temperature": self.temperature}
            found: list[T | Failure] = []
            for (answer,) in sample(model, tokenizer, prompts, **how):
                try:
                    found.append(read(tokenizer.decode(list(answer.ids), skip_special_tokens=True), not answer.ended))
                except Unusable as e:
                    found.append(Failure(e.reason, e.detail))
            return found

        return through([self._prompt(c) for c in asked], replies)

    def weigh(self, asked: Sequence[Conversation], options: Sequence[str]) -> list[Weights | Failure]:
        spelled = [(o, ids) for o in options for ids in {self._ids(o), self._ids(" " + o)}]

        def weights(prompts: list[tuple[int, ...]]) -> list[Weights | Failure]:
            answers, nothing = tuple(ids for _, ids in spelled), Demonstration((), "")
            table = self.scorer.completions([Example(p, answers, nothing) for p in prompts]).logp.double().exp()
            return [self._shares(spelled, row) for row in table.view(len(prompts), -1).tolist()]

        return through([self._prompt(c) for c in asked], weights)

    def _shares(self, spelled: Sequence[tuple[str, tuple[int, ...]]], given: Sequence[float]) -> Weights | Failure:
        found: Weights = {}
        for (option, ids), p in zip(spelled, given, strict=True):
            longer = [
                q
                for (o, i), q in zip(spelled, given, strict=True)
                if o != option and len(i) > len(ids) == _same(i, ids)
            ]
            found[option] = found.get(option, 0.0) + max(p - sum(longer), 0.0)
        if sum(found.values()) < LEAST:
            return Failure("nonsense", f"the options have a probability of {sum(found.values()):.2g} together")
        return found

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.template.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt(self, asked: Conversation) -> tuple[int, ...] | Failure:
        if self.template.mode == "plain":
            asked = (Message("user", "\n\n".join(m.content for m in asked)),)
        try:
            ids = tuple(self.template.prompt_ids(asked))
        except RowRefused as why:
            return Failure(str(why))
        return ids if len(ids) <= self.max_length else Failure(f"{TOO_LONG} ({self.max_length} tokens)")


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


U = TypeVar("U")


def through(items: Sequence[T | Failure], work: Callable[[list[T]], Sequence[U]]) -> list[U | Failure]:
    """``work`` done on all that has not failed yet, in one call; failures stay where they are."""
    live = [item for item in items if not isinstance(item, Failure)]
    done = iter(work(live) if live else ())
    return [item if isinstance(item, Failure) else next(done) for item in items]
