"""Making text inert and numbers readable. Everything a report prints passes through here.

Samples are written by a model and rows by strangers. Escaping makes markup harmless; :func:`visible` also makes
harmless what escaping leaves alone: control characters, right-to-left overrides that reorder a line, invisible letters.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

CLIP = 4000
MINUS = "\u2212"

# Invisible characters that change how their neighbours look, or smuggle text. Joiners (200C, 200D) stay: emoji and
# several scripts need them.
_HIDDEN = {0x00AD, 0x061C, 0x180E, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *range(0x2060, 0x2070)}
_HIDDEN |= {*range(0x202A, 0x202F), *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080)}

_SECRET_KEY = re.compile(r"(^|[._-])(api_?key|secret|password|passwd|token|hf_token|(auth|access)_token)$", re.I)
_SECRET_FLAG = re.compile(r"(--?[\w.-]*(?:api[_-]?key|secret|password|token)[ =])([^\s-]\S*)", re.I)
_SECRET_VALUE = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|xox[bap]-)[\w-]{12,}")


def visible(value: object) -> str:
    """Text in which every character can be seen: ``\\x00`` becomes ``␀``, a right-to-left override ``⟨U+202E⟩``."""
    text = str(value).replace("\r\n", "\n")
    return text if text.isascii() and text.isprintable() else "".join(map(_seen, text))


def _seen(char: str) -> str:
    code = ord(char)
    if char in "\n\t":
        return char
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code in _HIDDEN or unicodedata.category(char) in ("Cc", "Cs") or code & 0xFFFE == 0xFFFE:
        return f"⟨U+{code:04X}⟩"
    return char


def inert(value: object) -> object:
    """Jinja's ``finalize``: every printed value becomes visible and escaped, unless it is markup of our own."""
    return value if isinstance(value, Markup) else "" if value is None else escape(visible(value))


def clip(text: str, limit: int = CLIP) -> tuple[str, int]:
    """The beginning of a text, and how many characters were left out."""
    return (text, 0) if len(text) <= limit * 1.1 else (text[:limit], len(text) - limit)


def as_text(value: object) -> str:
    """A prompt or an answer as text: a string as it is, a list of messages as ``role: content`` lines."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n\n".join(f"{m.get('role', '?')}: {as_text(m['content'])}" for m in value)
    return json.dumps(value, ensure_ascii=False)


def number(value: object, digits: int = 3) -> str:
    """A number for people: 2,312 · 0.693 · 5e-7 · NaN, with a real minus sign. Anything else is printed as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return (f"{value:,}" if value.bit_length() < 64 else "a huge number").replace("-", MINUS)
    if not isinstance(value, float):
        return as_text(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    places = max(0, digits - whole) if whole else digits + max(0, -math.floor(math.log10(abs(value))) - 1)
    while places and math.isclose(round(value, places - 1), value, rel_tol=1e-9):
        places -= 1
    return f"{value:,.{places}f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """``42 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number(count)} {noun if count == 1 else many or noun + 's'}"


def setting(key: str, value: Any) -> str:
    """A configuration value as text; what looks like a credential is not printed, because reports are passed around."""
    if isinstance(value, str):
        return "(hidden)" if value and _SECRET_KEY.search(key) else without_secrets(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() < 64 else "a huge number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        value = {k: setting(str(k), v) if isinstance(v, str) else v for k, v in value.items()}
    return without_secrets(json.dumps(value, ensure_ascii=False))


def without_secrets(text: str) -> str:
    """A command line or a setting with keys and tokens blanked."""
    return _SECRET_VALUE.sub("(hidden)", _SECRET_FLAG.sub(r"\1(hidden)", text))
