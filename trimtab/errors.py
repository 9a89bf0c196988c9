"""Every error a user can meet, in one place.

Each class is also a standard type, so that ``except ValueError`` keeps working. A message says what is wrong, where
(file and row), what was found, what was expected, and what to do; it is shown without a traceback by the command line.
"""

from __future__ import annotations


class TrimtabError(Exception):
    """Base of all errors that trimtab raises on purpose. The message alone must be enough to act."""


class DataError(TrimtabError, ValueError):
    """The feedback file is unreadable, ambiguous or contradicts itself."""


class TokenError(TrimtabError, ValueError):
    """A conversation cannot be turned into tokens that are safe to train on."""


class ConfigError(TrimtabError, ValueError):
    """An option is unknown, out of range, or without effect for the chosen method."""


class FeedbackKindError(TrimtabError, TypeError):
    """The method cannot learn from this kind of feedback."""


class NeedError(TrimtabError, AttributeError):
    """An objective read a quantity that it did not declare in ``needs``, or that the engine was not asked for."""


class ModelError(TrimtabError, RuntimeError):
    """The model cannot be loaded, scored or saved as asked."""


class CacheError(TrimtabError, RuntimeError):
    """The reference cache is stale, damaged, or cannot serve this method."""


class CheckFailed(TrimtabError, AssertionError):
    """An invariant of the run does not hold on the user's own data and model."""


class CheckpointError(TrimtabError, RuntimeError):
    """A checkpoint is incomplete or does not belong to this run."""


class JudgeError(TrimtabError, RuntimeError):
    """A judge cannot be asked at all, or fails more often than the user allows."""


def nearest(word: str, known: list[str]) -> str:
    """``' Did you mean "beta"?'`` or an empty string: the tail of every error about an unknown name."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
