"""A Python function as judge."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError, nearest
from trimtab.feedback.records import Conversation
from trimtab.judges.base import Failure, Judge, Judgement, Question, Scores

if TYPE_CHECKING:
    from trimtab.samples import Reward


@dataclass
class RuleJudge(Judge):
    """(prompt, answer) -> number. What it raises, and None, are failures.

    The prompt is the text of its message; a conversation of several is one text, each message after its role.

    Args:
        function: a callable, ``package.module:function`` or ``path/to/file.py:function``.
        version: raise it when something changes that the function's own source does not show (a cache asks for it).
    """

    function: Reward | str
    version: str = field(default="", kw_only=True)
    kind = "pointwise"

    def __post_init__(self) -> None:
        self.call: Reward = load_function(self.function) if isinstance(self.function, str) else self.function

    @property
    def identity(self) -> str:
        try:
            source = inspect.getsource(self.call)
        except (OSError, TypeError):
            if not self.version:
                raise ConfigError(
                    f"the source of the rule {self.call!r} cannot be read, so a cache would not see it change. Pass version."
                ) from None
            source = ""
        name = getattr(self.call, "__qualname__", type(self.call).__name__)
        return f"rule {name} {hashlib.blake2b(source.encode(), digest_size=8).hexdigest()} {self.version}"

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        for q in questions:
            yield Scores(tuple(self._score(plain(q.prompt), c) for c in q.completions))

    def _score(self, prompt: str, answer: str) -> float | Failure:
        try:
            found: Any = self.call(prompt, answer)
            return float(found)
        except Exception as e:  # the user's own code raises whatever it likes
            return Failure(f"the rule raised {type(e).__name__}", str(e))


def plain(prompt: Conversation) -> str:
    """A conversation as one text."""
    return prompt[0].content if len(prompt) == 1 else "\n\n".join(f"{m.role}: {m.content}" for m in prompt)


def load_function(name: str) -> Any:
    """The function that ``module:function`` or ``file.py:function`` names."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not attribute:
        raise ConfigError(f'"{name}" is no function: expected package.module:function or file.py:function.')
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            spec = importlib.util.spec_from_file_location(f"trimtab_rule_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as e:  # the user's own code again
        raise ConfigError(f'The module of the function "{name}" cannot be imported: {type(e).__name__}: {e}.') from e
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if inspect.isfunction(v)]
        raise ConfigError(f'{place} has no function "{attribute}".{nearest(attribute, known)}')
    return found
