"""The true utility u(prompt, answer): a sum of terms that anyone can check by reading the two texts.

    u = facts + manners + feeling + length + unfinished

    facts       2 (right - wrong) / asked      an asked fact is right where every value named for it is the prompt's,
                                               wrong where one is not, and neither where none is named
    manners     0.5, -0.5 or 0                 more polite words than rude ones, fewer, as many
    feeling     0.5 (kind - unkind) / (kind + unkind), 0 without such words
    length      -0.03 for every word after the twelfth, at most -1.5
    unfinished  -1 where the text does not end with ``.``, ``!`` or ``?``

The best answer is worth 3. An empty one has no end: -1.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass

from trimtab.world.grammar import claims, read_prompt, words

FACTS, MANNERS, FEELING, UNFINISHED = 2.0, 0.5, 0.5, 1.0
FREE_WORDS, PER_WORD, LONGEST = 12, 0.03, 1.5
POLITE = frozenset({"thank", "thanks", "pleasure", "glad", "welcome"})
RUDE = frozenset({"stupid", "bother", "fool", "idiot", "wasting"})
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Terms:
    """The terms of one answer's utility, each with the sign it has in the sum."""

    facts: float
    manners: float
    feeling: float
    length: float
    unfinished: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def utility(prompt: str, answer: str) -> float:
    """The true utility of an answer: facts, manners, feeling, brevity (trimtab/world/utility.py)."""
    return terms(prompt, answer).total


def terms(prompt: str, answer: str) -> Terms:
    """What :func:`utility` adds up."""
    card, spoken = read_prompt(prompt), _WORD.findall(answer.lower())
    right = wrong = 0
    for attribute, values in claims(card, answer).items():
        truth = [v == card.facts[attribute] for v in values]
        right += bool(truth) and all(truth)
        wrong += not all(truth)
    polite, rude = sum(w in POLITE for w in spoken), sum(w in RUDE for w in spoken)
    kind, unkind = (sum(w in words()[which] for w in spoken) for which in ("kind", "unkind"))
    return Terms(
        facts=FACTS * (right - wrong) / len(card.asked),
        manners=MANNERS * ((polite > rude) - (polite < rude)),
        feeling=FEELING * (kind - unkind) / max(kind + unkind, 1),
        length=max(-LONGEST, PER_WORD * min(0, FREE_WORDS - word_count(answer))),
        unfinished=0.0 if answer.rstrip().endswith((".", "!", "?")) else -UNFINISHED,
    )


def word_count(answer: str) -> int:
    """Words of an answer, cut at white space."""
    return len(answer.split())
