"""The chat template, and the one place where the boundary between prompt and completion is found.

The whole conversation is tokenised once; the prompt's own tokens must be a prefix of it. Where they are not, the row is
repaired in a stated way or refused, and counted. A completion ends with the end-of-sequence token, which is trained.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from trimtab.errors import TokenError
from trimtab.feedback.records import STEP, Conversation, Message, Record, Solution
from trimtab.tokens.batch import Example, jointly

Truncation = Literal["drop", "prompt", "completion"]
MIN_PROMPT = 8  # tokens of a prompt that truncation must leave


class RowRefused(Exception):
    """This row cannot be tokenised safely; the text is the reason it is counted under."""


class Template:
    """Turns conversations into token ids for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        mode: ``chat`` applies the chat template, ``plain`` joins prompt and completion as they are (a prompt is then
            one user message), ``auto`` is ``chat`` where the tokenizer has a template.
        eos: ``template`` requires that the template ends an answer with an end-of-sequence token, ``append`` adds one.
        eos_ids: every id that ends an answer (the generation config may name several).

    Raises:
        TokenError: no template, no end-of-sequence token, or a doubled beginning-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        mode: Literal["auto", "chat", "plain"] = "auto",
        eos: Literal["template", "append"] = "template",
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if mode == "chat" and not has_template:
            raise TokenError(
                f"the tokenizer of {_name(tokenizer)} has no chat template. "
                "Pass chat_template: FILE with a Jinja template, or template: plain to train on the bare text."
            )
        self.mode = mode if mode != "auto" else "chat" if has_template else "plain"
        self.eos = eos
        self.eos_ids = {i for i in (tokenizer.eos_token_id, *eos_ids) if i is not None}
        if tokenizer.eos_token_id is None:
            raise TokenError(
                f"the tokenizer of {_name(tokenizer)} has no end-of-sequence token: a model trained without one never "
                "stops. Set tokenizer.eos_token before saving it."
            )
        self.control = sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special})
        self.repaired: Counter[str] = Counter()
        self.opened = False  # whether prompts end in a control token
        self.opening: tuple[int, ...] = ()  # where no chat template writes it

    def add_control(self, good: str, bad: str) -> tuple[int, int]:
        """Give the tokenizer two control tokens, and let prompts end in the good one from now on; returns both ids."""
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": [good, bad]}, replace_extra_special_tokens=False
        )
        self.opened = True
        first, second = self.tokenizer.convert_tokens_to_ids([good, bad])
        if self.mode == "chat":  # whoever loads the saved tokenizer gets it too
            self.tokenizer.chat_template += "{% if add_generation_prompt %}" + good + "{% endif %}"
        else:
            self.opening = (first,)
        return first, second

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the text: the chat template, or that there is none."""
        text = self.tokenizer.chat_template if self.mode == "chat" else f"plain {self.eos}"
        return hashlib.blake2b(str(text).encode(), digest_size=8).hexdigest()

    def prompt_text(self, prompt: Conversation) -> str:
        """The conversation as text, up to where the model answers."""
        if self.mode == "plain":
            if len(prompt) != 1 or prompt[0].role != "user":
                here, way = "has none", "chat_template: FILE"
                if self.tokenizer.chat_template:
                    here, way = "was set to plain", "template: chat"
                raise TokenError(
                    f"a conversation of {len(prompt)} messages needs a chat template, and {_name(self.tokenizer)} {here}. "
                    f"Pass {way}, or flatten the conversation into one prompt string."
                )
            return prompt[0].content
        return self._render(prompt, add_generation_prompt=True)

    def prompt_ids(self, prompt: Conversation) -> list[int]:
        """Token ids to generate from: exactly those that training conditions on."""
        ids = self._ids(self.prompt_text(prompt), start=True)
        if self.mode == "plain":
            while len(ids) > 1 and ids[-1] in self.eos_ids:
                ids.pop()  # some tokenizers close every text
        ids += self.opening
        self._refuse_double_bos(ids)
        return ids

    def encode(self, record: Record) -> Example:
        """One record as tokens. Raises :class:`RowRefused` with the reason to count it under."""
        for text in (*(m.content for m in record.prompt), *record.completions):
            if any(c in text for c in self.control):
                raise RowRefused("text contains a control token of the tokenizer")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise RowRefused("text contains half of a character (a surrogate without its other half)")
        prompt_text, prompt_ids = self.prompt_text(record.prompt), self.prompt_ids(record.prompt)
        if isinstance(record, Solution):
            return self._in_steps(record, prompt_text, prompt_ids)
        answers = tuple(self._completion(record, prompt_text, prompt_ids, c) for c in record.completions)
        return Example(tuple(prompt_ids), answers, record)

    def _completion(self, record: Record, prompt_text: str, prompt_ids: list[int], answer: str) -> tuple[int, ...]:
        tail = answer if self.mode == "plain" else self._tail(record.prompt, prompt_text, answer)
        ids = self._ids(prompt_text + tail, start=True)
        if ids[: len(prompt_ids)] == prompt_ids:
            completion = ids[len(prompt_ids) :]
        else:
            # a token reaches over the boundary: generation starts from the prompt's own tokens, so training does too
            completion = self._apart(prompt_ids, tail, ids)
            self.repaired["a token straddled the boundary: prompt and completion were tokenised apart"] += 1
        return self._ended(completion)

    def _ended(self, completion: list[int]) -> tuple[int, ...]:
        """The completion up to its end token, which the template has put there, or which is added."""
        last = max((i for i, t in enumerate(completion) if t in self.eos_ids), default=-1)
        if last >= 0:
            completion = completion[: last + 1]  # what the template puts after it is never generated
        elif self.mode == "plain" or self.eos == "append":
            completion = [*completion, self.tokenizer.eos_token_id]
        else:
            raise TokenError(
                f"the chat template of {_name(self.tokenizer)} ends an answer without an end-of-sequence token "
                f"({sorted(self.eos_ids)}): the model would never learn to stop. Pass eos: append to add it."
            )
        if len(completion) < 2:
            raise RowRefused("completion has no tokens")
        return tuple(completion)

    def _in_steps(self, record: Solution, prompt_text: str, prompt_ids: list[int]) -> Example:
        """Each step is tokenised with the line break that ends it, so that no token belongs to two steps; the last one ends
        with the end token."""
        (answer,) = record.completions
        tail = answer if self.mode == "plain" else self._tail(record.prompt, prompt_text, answer)
        before, found, after = tail.partition(answer)
        if not found:
            raise RowRefused("the chat template rewrote the steps of the solution")
        pieces = [*(step + STEP for step in record.steps[:-1]), record.steps[-1] + after]
        pieces[0] = before + pieces[0]
        ids, text, marks = list(prompt_ids), prompt_text, list[int]()
        for piece in pieces:
            text += piece
            ids += self._apart(ids, piece, self._ids(text, start=True))
            marks.append(len(ids) - len(prompt_ids) - 1)
        completion = self._ended(ids[len(prompt_ids) :])
        return Example(tuple(prompt_ids), (completion,), record, marks=(*marks[:-1], len(completion) - 1))

    def _apart(self, prompt_ids: list[int], tail: str, whole: list[int]) -> list[int]:
        """Tokens of the tail that continue the prompt's own tokens to the same text.

        Some tokenizers put a space before every text; they do not where a sign that merges with nothing stands first.
        """
        for sign in ("", "\n", ":", "。"):
            before = self._ids(sign, start=False) if sign else []
            ids = self._ids(sign + tail, start=False)
            rest = ids[len(before) :]
            if ids[: len(before)] == before and self._text([*prompt_ids, *rest]) == self._text(whole):
                return rest
        raise RowRefused("a token straddles the boundary, and prompt and completion cannot be tokenised apart")

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tail(self, prompt: Conversation, prompt_text: str, answer: str) -> str:
        """What follows the prompt's text once the answer is there: the answer and the template's end of turn."""
        whole = self._render((*prompt, Message("assistant", answer)), add_generation_prompt=False)
        if whole.startswith(prompt_text):
            return whole[len(prompt_text) :]
        at = whole.rfind(answer.strip())
        if at < 0 or not answer.strip():
            raise RowRefused("prompt is not a prefix of prompt + completion under the chat template")
        self.repaired[
            "the template rewrote the prompt once answered: the answer was put after the prompt as asked"
        ] += 1
        return whole[at:]

    def _render(self, messages: Conversation, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                [asdict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as e:  # templates raise whatever they like (jinja2.TemplateError, TypeError, ...)
            raise RowRefused(f"the chat template refused the conversation: {e}") from e

    def _ids(self, text: str, start: bool) -> list[int]:
        special = start and self.mode == "plain"  # a chat template writes its own
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _refuse_double_bos(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            twice = "the text begins with one and the tokenizer adds another."
            if self.mode == "chat":
                twice = "the chat template writes it twice."
            raise TokenError(
                f"the prompt starts with two beginning-of-sequence tokens ({self.tokenizer.bos_token!r}, ids {ids[:6]}…): "
                f"{twice} Remove one of them."
            )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


@dataclass
class TokenReport:
    """What tokenising did to the data: nothing is cut or dropped without a count. Lengths are in tokens."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first origins
    repaired: dict[str, int] = field(default_factory=dict)
    truncated_rows: int = 0
    tokens_lost: dict[str, int] = field(default_factory=dict)  # side -> tokens
    eos_lost: dict[str, int] = field(default_factory=dict)  # side -> completions that no longer end
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)  # side -> mean, median, p99, max

    def drop(self, reason: str, record: Record) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, [])
        if len(self.examples[reason]) < 5:
            self.examples[reason].append(str(record.origin))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


TOO_LONG = "longer than max_length"


def tokenize(
    records: Sequence[Record],
    template: Template,
    *,
    max_length: int,
    truncation: Truncation = "drop",
    max_truncated: float = 0.1,
    together: bool = False,
) -> tuple[list[Example], TokenReport]:
    """All records as examples of at most ``max_length`` tokens (prompt plus longest completion).

    ``truncation``: ``drop`` leaves long rows out; ``prompt`` cuts the beginning of the prompt, for all completions
    alike; ``completion`` cuts the end of the completions, end-of-sequence token included, which is counted.
    ``together``: both answers of a comparison stand in one text, in either order.

    Raises:
        TokenError: more than the share ``max_truncated`` of the rows was cut or left out for length, or none is left.
    """
    report, kept = TokenReport(rows=len(records)), []
    template.repaired.clear()
    for record in records:
        try:
            example = jointly(template.encode(record)) if together else template.encode(record)
        except RowRefused as e:
            report.drop(str(e), record)
            continue
        except TokenError as e:
            raise TokenError(f"{record.origin}: {e}") from e
        cut = _truncate(example, max_length, truncation, report)
        if cut is None:
            report.drop(f"{TOO_LONG} ({max_length} tokens)", record)
        else:
            kept.append(cut)
    report.kept, report.repaired = len(kept), dict(template.repaired)
    _refuse_too_much(report, max_length, truncation, max_truncated)
    for side, lengths in _sides(kept).items():
        report.lengths[side] = _summary(lengths)
    return kept, report


def _truncate(e: Example, limit: int, how: Truncation, report: TokenReport) -> Example | None:
    longest = max((len(c) for c in e.completions), default=0)
    over = len(e.prompt) + longest - limit
    if over <= 0:
        return e
    match how:
        case "drop":
            return None
        case "prompt":
            if len(e.prompt) - over < MIN_PROMPT:
                return None
            report.tokens_lost["prompt"] = report.tokens_lost.get("prompt", 0) + over
            report.truncated_rows += 1
            return replace(e, prompt=e.prompt[over:])
        case "completion":
            room = limit - len(e.prompt)
            if room < 2:
                return None
            marks = tuple(m for m in e.marks if m < room)
            if e.marks and not marks:
                return None  # no judged step is left
            for side, c in zip(sides(e), e.completions, strict=True):
                if len(c) > room:
                    report.tokens_lost[side] = report.tokens_lost.get(side, 0) + len(c) - room
                    report.eos_lost[side] = report.eos_lost.get(side, 0) + 1
            report.truncated_rows += 1
            return replace(e, completions=tuple(c[:room] for c in e.completions), marks=marks)


def _refuse_too_much(report: TokenReport, limit: int, how: Truncation, allowed: float) -> None:
    if not report.kept:
        reasons = "; ".join(f"{n} × {r} (e.g. {report.examples[r][0]})" for r, n in report.dropped.items())
        remedy = "Raise max_length, or choose another truncation."
        if TOO_LONG not in reasons:
            remedy = "Correct the rows or the chat template; `trimtab data show` shows what becomes of a row."
        raise TokenError(f"no row is left to train on, of {report.rows:,}: {reasons or 'the file has none'}. {remedy}")
    too_long = sum(n for r, n in report.dropped.items() if r.startswith(TOO_LONG))
    affected = too_long + report.truncated_rows
    if affected > allowed * report.rows:
        fate = [f"{too_long} would be left out"] * bool(too_long) + [f"{report.truncated_rows} cut"] * (how != "drop")
        choice = " choose truncation: prompt or completion," if how == "drop" else ""
        raise TokenError(
            f"{affected} of {report.rows} rows ({affected / report.rows:.0%}) are longer than max_length {limit}: "
            f"{', '.join(fate)}; at most {allowed:.0%} is allowed. Raise max_length,{choice} or accept it with a larger "
            "max_truncated."
        )


def sides(example: Example) -> tuple[str, ...]:
    """What each completion is called in counts."""
    match type(example.record).__name__, len(example.completions):
        case "Comparison", 2:
            return ("chosen", "rejected")
        case "Comparison", 3:
            return ("chosen", "rejected", "target")
        case _, k:
            return ("completion",) * k


def _sides(examples: Sequence[Example]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"prompt": [len(e.prompt) for e in examples]}
    for e in examples:
        for side, c in zip(sides(e), e.completions, strict=True):
            found.setdefault(side, []).append(len(c))
    return found


def _summary(values: list[int]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda q: float(ordered[min(int(q * len(ordered)), len(ordered) - 1)])  # noqa: E731
    return {"mean": sum(values) / len(values), "median": at(0.5), "p99": at(0.99), "max": float(ordered[-1])}
