"""The demonstration's stated true reward: friendly, brief, finished.

Real feedback hides what people want; here it is a formula, so that "did the method do what was asked?" has an answer.
For an answer of ``w`` words (cut at white space) with VADER's compound sentiment ``s`` in [-1, 1]::

    reward = s - too_long - too_short - unfinished

    too_long   = min(1, max(0, w - 20) / 40)      nothing up to 20 words, 1 from 60 words on
    too_short  = max(0, 5 - w) / 5                nothing from 5 words on
    unfinished = 0.5 if the answer does not end like a sentence, else 0

It is a function of the text alone, rounded to four decimals, and lies in [-2.5, 1]. An empty answer gets -2.5, the
worst there is. An answer that ran out of tokens is kept as it was cut: it breaks off within a sentence, and loses half
a point for that, on top of its length. To end like a sentence is to end with one of ``. ! ? …`` (or their full-width
forms), closing quotes, brackets and Markdown marks after it ignored; the number of a list item (``2.`` alone on its
line) is no end.

What it cannot see, and what a method may therefore exploit: truth, relevance, grammar. Its best answer is a short
shower of kind words. That is meant: a reward with a known hole shows over-optimisation, too.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ConfigError

FREE_WORDS = 20
LONG_WORDS = 60
SHORT_WORDS = 5
UNFINISHED = 0.5
WORST = -2.5
VADER_INSTALL = "pip install vaderSentiment==3.3.2"

_END = re.compile("[.!?…。！？][\"'”’»)\\]}*_`]*$")
_LIST_NUMBER = re.compile(r"(?:^|\n)[ \t]*\d+\.$")


@dataclass(frozen=True)
class Parts:
    """The terms of one answer's reward, each with the sign it has in the sum."""

    sentiment: float
    too_long: float
    too_short: float
    unfinished: float

    @property
    def total(self) -> float:
        return max(WORST, self.sentiment + self.too_long + self.too_short + self.unfinished)


def reward(answer: str) -> float:
    """The true reward of an answer, in [-2.5, 1], rounded to four decimals."""
    return round(parts(answer).total, 4)


def parts(answer: str) -> Parts:
    """The terms that :func:`reward` adds up."""
    words = len(answer.split())
    if words == 0:
        return Parts(sentiment=-1.0, too_long=0.0, too_short=-1.0, unfinished=-UNFINISHED)
    return Parts(
        sentiment=float(_vader().polarity_scores(answer)["compound"]),
        too_long=-min(1.0, max(0, words - FREE_WORDS) / (LONG_WORDS - FREE_WORDS)),
        too_short=-max(0, SHORT_WORDS - words) / SHORT_WORDS,
        unfinished=0.0 if ends_like_a_sentence(answer) else -UNFINISHED,
    )


def ends_like_a_sentence(answer: str) -> bool:
    """Whether the last thing in the answer is the end of a sentence: see the module's text."""
    text = answer.rstrip()
    return _END.search(text) is not None and _LIST_NUMBER.search(text) is None


@cache
def _vader() -> Any:
    """VADER's analyser, loaded when first needed: it is wanted for the demonstration only."""
    try:
        return importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    except ImportError as error:
        raise ConfigError(f"The demonstration's reward needs VADER, which is not installed: {VADER_INSTALL}") from error
