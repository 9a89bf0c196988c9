"""What is said in the world: prompts with facts and a request, and answers good and bad.

A prompt states three facts and asks for one or two of them::

    The house of Mira: colour red, material brick, flower rose. What are the colour and the flower?

An answer may be right or wrong, complete or not, polite or rude, kind or unkind, brief or wordy::

    Thank you for asking. The colour is red. The flower is tulip. I find it lovely. Have a nice day.

Every value belongs to one attribute only, so what an answer claims can be read from its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from trimtab.errors import DataError

WORDS = Path(__file__).with_name("words.txt")
ATTRIBUTES = {
    "friend": ("town", "job", "hobby", "pet", "instrument"),
    "house": ("colour", "material", "flower", "tree", "furniture"),
    "dish": ("vegetable", "fruit", "spice", "fish", "drink"),
    "trip": ("country", "vehicle", "river", "gift", "weather"),
}
FACTS = 3  # in each prompt

ASK_ONE = (
    "What is the {0}?",
    "Tell me the {0}.",
    "I would like to know the {0}.",
    "Can you say what the {0} is?",
    "Which {0} is it?",
)
ASK_TWO = (
    "What are the {0} and the {1}?",
    "Tell me the {0} and the {1}.",
    "I would like to know the {0} and the {1}.",
    "Which {0} is it, and which {1}?",
    "First the {0}, then the {1}.",
)
POLITE_OPENINGS = (
    "Thank you for asking.",
    "Thanks for your question.",
    "With pleasure.",
    "I am glad to help.",
    "You are welcome here.",
)
RUDE_OPENINGS = (
    "What a stupid question.",
    "Why do you bother me?",
    "Not you again, fool.",
    "Only an idiot asks that.",
    "Stop wasting my time.",
)
NEUTRAL_OPENINGS = ("Well.", "Let me see.", "Here it is.", "I looked it up.")
POLITE_CLOSINGS = (
    "Thank you and have a nice day.",
    "I was glad to help.",
    "You are always welcome.",
    "It was a pleasure.",
)
RUDE_CLOSINGS = ("Now stop asking, fool.", "Do not bother me again.", "Even an idiot knows that.")
STATED = ("The {a} is {v}.", "The {a} of {name} is {v}.", "As noted, the {a} is {v}.", "I think the {a} is {v}.")
STATED_BOTH = ("The {a} is {v} and the {b} is {w}.", "The {a} is {v}, and also the {b} is {w}.")
FEELINGS = ("I find it {}.", "That is {} indeed.", "It sounds {} to me.", "What a {} choice.", "How {} it is.")
FILLERS = (
    "As everyone here knows, there is always more to say about such things.",
    "People have talked about this for many years, and they still do.",
    "Let me add that questions of this kind come up again and again.",
    "Of course it depends on whom you ask, and on what day.",
    "My grandmother used to tell long stories about this by the fire.",
    "There are some who would disagree, and there are others who would not.",
    "It is written in the notes that I have here before me.",
    "In other words, this is what can be said about the matter.",
    "Having thought about it for long, I believe that this is how it stands.",
    "If we had more time, we could look into the history of it.",
)

_CARD = re.compile(r"The (\w+) of (\w+): ((?:\w+ \w+, )*\w+ \w+)\. (.+)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Card:
    """What a prompt says: the subject, its facts (attribute -> value), and the attributes that are asked for."""

    kind: str
    name: str
    facts: dict[str, str]
    asked: tuple[str, ...]


@cache
def words() -> dict[str, tuple[str, ...]]:
    """Attribute (or ``name``, ``kind``, ``unkind``) -> the words it can be."""
    lines = (line.split(": ") for line in WORDS.read_text(encoding="utf-8").splitlines())
    return {name: tuple(values.split()) for name, values in lines}


@cache
def attribute_of() -> dict[str, str]:
    """Value -> the attribute it belongs to."""
    return {v: a for attributes in ATTRIBUTES.values() for a in attributes for v in words()[a]}


def read_prompt(text: str) -> Card:
    """The inverse of :func:`draw_prompt`; :class:`DataError` for what is not a prompt of this world."""
    found = _CARD.fullmatch(text)
    if not found or found[1] not in ATTRIBUTES:
        raise DataError(f'"{text}" is not a prompt of the controlled world (trimtab/world/grammar.py).')
    facts = dict(fact.split(" ") for fact in found[3].split(", "))
    asked = tuple(word for word in _WORD.findall(found[4]) if word in facts)
    return Card(found[1], found[2], facts, asked)


def draw_prompt(rng: Random) -> str:
    """A random prompt."""
    kind = rng.choice(list(ATTRIBUTES))
    attributes = rng.sample(ATTRIBUTES[kind], FACTS)
    facts = ", ".join(f"{a} {rng.choice(words()[a])}" for a in attributes)
    asked = rng.sample(attributes, rng.choice((1, 2)))
    request = rng.choice(ASK_ONE if len(asked) == 1 else ASK_TWO).format(*asked)
    return f"The {kind} of {rng.choice(words()['name'])}: {facts}. {request}"


def distinct_prompts(n: int, seed: int) -> list[str]:
    """``n`` different prompts; the first of them are the same for every larger ``n``."""
    rng, found = Random(f"prompts {seed}"), dict[str, None]()
    while len(found) < n:
        found[draw_prompt(rng)] = None
    return list(found)


def draw_answer(card: Card, rng: Random) -> str:
    """A random answer. The shares are what the pretrained model learns, and so what there is to improve."""
    parts = [*_opening(rng), *_statements(card, rng)]
    if rng.random() < 0.5:
        parts.append(rng.choice(FEELINGS).format(rng.choice(words()[rng.choice(("kind", "unkind"))])))
    for _ in range(rng.choices((0, 1, 2), (0.5, 0.3, 0.2))[0]):
        parts.insert(rng.randint(min(1, len(parts)), len(parts)), rng.choice(FILLERS))
    manner = rng.random()
    if manner < 0.3:
        parts.append(rng.choice(POLITE_CLOSINGS if manner < 0.15 else RUDE_CLOSINGS))
    return " ".join(parts or ["I do not know."])


def _opening(rng: Random) -> Iterator[str]:
    manner = rng.random()
    if manner < 0.6:
        yield rng.choice(POLITE_OPENINGS if manner < 0.25 else RUDE_OPENINGS if manner < 0.45 else NEUTRAL_OPENINGS)


def _statements(card: Card, rng: Random) -> list[str]:
    """Each asked fact is stated with probability 0.85, and then rightly with probability 0.7."""
    said = [(a, _claim(card, a, rng)) for a in card.asked if rng.random() < 0.85]
    if len(said) == 2 and rng.random() < 0.4:
        (a, v), (b, w) = said
        return [rng.choice(STATED_BOTH).format(a=a, v=v, b=b, w=w)]
    return [rng.choice(STATED).format(a=a, v=v, name=card.name) for a, v in said]


def _claim(card: Card, attribute: str, rng: Random) -> str:
    return card.facts[attribute] if rng.random() < 0.7 else other_value(card, attribute, rng)


def other_value(card: Card, attribute: str, rng: Random) -> str:
    """A value of this attribute that is not the card's."""
    return rng.choice([v for v in words()[attribute] if v != card.facts[attribute]])


def claims(card: Card, answer: str) -> dict[str, list[str]]:
    """Asked attribute -> the values of it that the answer names, in order. Other values are not looked at."""
    found: dict[str, list[str]] = {a: [] for a in card.asked}
    for word in _WORD.findall(answer):
        attribute = attribute_of().get(word)
        if attribute in found:
            found[attribute].append(word)
    return found


def swap_claim(card: Card, answer: str, rng: Random) -> str | None:
    """The answer with its first claim replaced: a wrong one by the truth, a right one by another value of its kind.

    None where it claims nothing that was asked.
    """
    said = [(a, v) for a, values in claims(card, answer).items() for v in values]
    if not said:
        return None
    attribute, value = said[0]
    right = card.facts[attribute]
    other = other_value(card, attribute, rng) if value == right else right
    return re.sub(rf"\b{value}\b", other, answer, count=1)
