"""The prompts of language models that judge: files that the user can replace, and how an answer is put into one.

What is judged was written by somebody else, perhaps for the judge. Each piece stands between lines that hold a mark: a hash of
all pieces, found in none of them, so that no text can pretend to end its piece. Values are put in once and never looked at
again, so that ``$second`` inside an answer stays what it is. Control tokens of chat templates are broken up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from string import Template
from typing import Any

import yaml

from trimtab.errors import ConfigError, nearest
from trimtab.feedback.records import Conversation, Message
from trimtab.judges.base import Kind, Question

PROMPTS = Path(__file__).with_name("prompts")
SLOTS = ("first", "second", "tie")
# control tokens of common chat templates; the backend adds those it knows of
CONTROL = (
    r"<[|｜][^<>\n]{1,60}[|｜]>|</?s>|<(?:bos|eos|pad|unk|sep|cls|mask)>|<(?:start|end)_of_(?:turn|image|text)>|<</?SYS>>|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|MODEL_SETTINGS|THINK|CLS|SEP|PAD|MASK|BOS|EOS)\]"
)


class Unusable(Exception):
    """No judgement comes of this: ``reason`` is what it is counted under.

    ``again``: it may pass if asked again, after a pause where ``wait`` is true."""

    def __init__(self, reason: str, detail: str = "", *, again: bool = True, wait: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt in parts, as one file of ``trimtab/judges/prompts/`` holds them.

    Attributes:
        preamble: the task; must hold ``$mark`` and say what it marks.
        exemplars: worked examples.
        sample: where ``$conversation`` and ``$first``, ``$second`` (of a pair) or ``$answer`` go.
        ending: what is asked.
        reason: asks for reasons; the judge writes them first, and the ending is asked after them.
        options: what the judge may reply -> ``first``, ``second`` or ``tie``: a pairwise judge.
        weighted: lowest and highest of the whole numbers that it may reply; their mean by probability is mapped to [-1, 1].
        score: lowest and highest number after the last ``Score:`` of its reply.
        digest: hash of the file.
    """

    name: str
    version: int
    preamble: str
    sample: str
    ending: str
    digest: str
    source: str = ""
    exemplars: tuple[str, ...] = ()
    reason: str = ""
    options: Mapping[str, str] | None = None
    weighted: tuple[int, int] | None = None
    score: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        readings = [k for k in ("options", "weighted", "score") if getattr(self, k) is not None]
        if len(readings) != 1:
            self._refuse(f"has {' and '.join(readings) or 'none'} of options, weighted and score; expected one of them")
        if self.options is not None and not {"first", "second"} <= set(self.options.values()) <= set(SLOTS):
            self._refuse(f"options mean {', '.join(self.options.values())}; expected first, second and, if wanted, tie")
        for low, high in filter(None, (self.weighted, self.score)):
            if not low < high:
                self._refuse(f"has a scale from {low} to {high}; expected the lower end first")
        if self.score is not None and self.reason:
            self._refuse("asks for reasons and for a score in text; ask for the justification in the ending")
        answers = {"first", "second"} if self.options is not None else {"answer"}
        wanted = {"mark": self.preamble, **dict.fromkeys(("conversation", *answers), self.sample)}
        for name, part in wanted.items():
            if name not in Template(part).get_identifiers():
                self._refuse(f"lacks ${name} in its {'preamble' if name == 'mark' else 'sample'}")
        whole = Template("\n".join((self.preamble, *self.exemplars, self.sample, self.reason, self.ending)))
        if not whole.is_valid():
            self._refuse("holds a $ that names nothing; write $$ for the sign")
        if unknown := set(whole.get_identifiers()) - {*wanted, "principle"}:
            self._refuse(f"names ${sorted(unknown)[0]}; known: {', '.join('$' + n for n in (*wanted, 'principle'))}")

    def _refuse(self, what: str) -> None:
        raise ConfigError(f"judge prompt {self.name}: {what}. Correct the file.")

    @property
    def kind(self) -> Kind:
        return "pointwise" if self.options is None else "pairwise"

    @property
    def has_principle(self) -> bool:
        return "$principle" in self.reason + self.ending + self.preamble + self.sample

    def ask(self, question: Question, shown: Sequence[int], principle: str = "") -> tuple[str, str]:
        """(opening, ending): what is said before the reply, in two messages where reasons come between, else one and "".

        ``shown``: which of the question's completions stand where, such as (1, 0) for the second one first.
        """
        pieces = [m.content for m in question.prompt] + [question.completions[i] for i in shown]
        mark = mark_for(pieces)
        values = {"mark": mark, "principle": principle}
        values["conversation"] = "\n".join(piece(mark, m.role.upper(), m.content) for m in question.prompt)
        if self.options is None:
            values["answer"] = piece(mark, "ANSWER", question.completions[shown[0]])
        else:
            label = {slot: option for option, slot in self.options.items()}
            for slot, i in zip(SLOTS[:2], shown, strict=True):
                values[slot] = piece(mark, f"ANSWER {label[slot]}", question.completions[i])
        parts = [self.preamble, *self.exemplars, self.sample, self.reason or self.ending]
        opening = "\n\n".join(Template(part.strip()).substitute(values) for part in parts)
        return opening, Template(self.ending.strip()).substitute(values) if self.reason else ""


def load_prompt(name: str | Path) -> JudgePrompt:
    """A prompt by the name of a shipped file, or by the path of the user's own."""
    known = sorted(p.stem for p in PROMPTS.glob("*.yaml"))
    path = PROMPTS / f"{name}.yaml" if name in known else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f'There is no judge prompt "{name}".{nearest(str(name), known)} Shipped: {", ".join(known)}; or name a .yaml file.'
        )
    content = path.read_bytes()
    try:
        body: Any = yaml.safe_load(content)
        body = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is no judge prompt: expected YAML with the parts of one ({e}).") from None
    parts = {f.name: f for f in fields(JudgePrompt) if f.name != "digest"}
    if unknown := set(body) - set(parts):
        raise ConfigError(f'{path}: "{sorted(unknown)[0]}" is no part of a judge prompt. Parts: {", ".join(parts)}.')
    if lacking := {"name", "version", "preamble", "sample", "ending"} - set(body):
        raise ConfigError(f"{path} lacks {', '.join(sorted(lacking))}.")
    if isinstance(body.get("options"), dict):
        body["options"] = {str(k): str(v) for k, v in body["options"].items()}
    try:
        return JudgePrompt(**body, digest=hashlib.blake2b(content, digest_size=8).hexdigest())
    except (TypeError, ValueError, AttributeError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{path} has a part of the wrong type: {e}. Compare it with a shipped prompt.") from None


def load_principles(file: str | Path) -> tuple[str, ...]:
    """The principles of a constitution: one a line, blank lines and those that begin with # left out."""
    path = Path(file).expanduser()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise ConfigError(f"{path} holds no principles: expected a text file with one in each line.")
    return found


def piece(mark: str, label: str, text: str) -> str:
    """A text between two lines that hold the mark."""
    return f"=== {mark} {label} ===\n{text}\n=== {mark} END ==="


def mark_for(texts: Iterable[str]) -> str:
    """16 hexadecimal digits that depend on all texts, in whatever order, and occur in none of them."""
    texts = sorted(texts)
    for attempt in count():
        seed = "\0".join((str(attempt), *texts)).encode("utf-8", "surrogatepass")
        mark = hashlib.blake2b(seed, digest_size=8).hexdigest()
        if not any(mark in t for t in texts):
            return mark
    raise AssertionError


def control_pattern(more: Iterable[str]) -> re.Pattern[str]:
    """What matches the control tokens of chat templates, and these."""
    return re.compile("|".join([*map(re.escape, sorted(more, key=len, reverse=True)), CONTROL]))


def neutral(text: str, control: re.Pattern[str]) -> str:
    """The text with a space inside every control token, so that no tokenizer takes it for one.

    Raises :class:`Unusable` where one is left, or where a character is only half there."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Unusable("text contains half of a character (a surrogate without its other half)", again=False)
    for _ in range(3):
        if not control.search(text):
            return text
        text = control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
    raise Unusable("text contains a control token that cannot be broken up", text[:80], again=False)


def neutral_question(question: Question, control: re.Pattern[str]) -> Question:
    """The question with every text made :func:`neutral`."""
    said: Conversation = tuple(Message(m.role, neutral(m.content, control)) for m in question.prompt)
    return Question(said, tuple(neutral(c, control) for c in question.completions), origin=question.origin)
