"""The grammar: what is said can be read again, and no sentence says more than it should."""

from __future__ import annotations

import re
from random import Random

import pytest

from trimtab.errors import DataError
from trimtab.world import grammar
from trimtab.world.grammar import ATTRIBUTES, claims, distinct_prompts, draw_answer, read_prompt, swap_claim, words
from trimtab.world.utility import POLITE, RUDE

HOUSE = "The house of Mira: colour red, material brick, flower rose. What are the colour and the flower?"
MARKED = POLITE | RUDE | {w for which in ("kind", "unkind") for w in words()[which]}


def test_prompt_is_read() -> None:
    card = read_prompt(HOUSE)
    assert (card.kind, card.name, card.asked) == ("house", "Mira", ("colour", "flower"))
    assert card.facts == {"colour": "red", "material": "brick", "flower": "rose"}


def test_every_drawn_prompt_is_read() -> None:
    for prompt in distinct_prompts(300, seed=1):
        card = read_prompt(prompt)
        assert set(card.asked) <= set(card.facts) <= set(ATTRIBUTES[card.kind]) and len(card.asked) in (1, 2)


@pytest.mark.parametrize("text", ["What is the colour?", "The horse of Mira: colour red. What is the colour?", ""])
def test_what_is_no_prompt_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="controlled world"):
        read_prompt(text)


def test_prompts_are_distinct_and_those_of_a_larger_set_begin_with_them() -> None:
    few, many = distinct_prompts(50, seed=3), distinct_prompts(80, seed=3)
    assert len(set(many)) == 80 and many[:50] == few and few != distinct_prompts(50, seed=4)


def test_a_value_belongs_to_one_attribute() -> None:
    values = [v.lower() for attributes in ATTRIBUTES.values() for a in attributes for v in words()[a]]
    assert len(values) == len(set(values)) == 640
    assert not MARKED & set(values)


def test_sentences_hold_no_value_and_only_the_words_they_are_there_for() -> None:
    values = {v.lower() for attributes in ATTRIBUTES.values() for a in attributes for v in words()[a]}
    spoken = lambda texts: {w for t in texts for w in re.findall("[a-z]+", t.lower())}  # noqa: E731
    g = grammar
    neutral = (*g.FILLERS, *g.STATED, *g.STATED_BOTH, *g.FEELINGS, *g.NEUTRAL_OPENINGS)
    polite, rude = (*g.POLITE_OPENINGS, *g.POLITE_CLOSINGS), (*g.RUDE_OPENINGS, *g.RUDE_CLOSINGS)
    assert not spoken((*neutral, *polite, *rude, *g.ASK_ONE, *g.ASK_TWO)) & values
    assert not spoken(neutral) & MARKED
    assert all(spoken([t]) & POLITE and not spoken([t]) & RUDE for t in polite)
    assert all(spoken([t]) & RUDE and not spoken([t]) & POLITE for t in rude)


def test_claims() -> None:
    card = read_prompt(HOUSE)
    said = claims(card, "The colour is red. The flower of Mira is tulip, or rose; the material is wood.")
    assert said == {"colour": ["red"], "flower": ["tulip", "rose"]}


def test_answers_are_good_and_bad() -> None:
    rng, right, said = Random(0), 0, 0
    for prompt in distinct_prompts(500, seed=0):
        card = read_prompt(prompt)
        for a, values in claims(card, draw_answer(card, rng)).items():
            said += bool(values)
            right += values == [card.facts[a]]
    assert 0.6 < right / said < 0.8


def test_swap_turns_right_into_wrong_and_back() -> None:
    card, rng = read_prompt(HOUSE), Random(0)
    wrong = swap_claim(card, "The colour is red.", rng)
    assert wrong is not None and claims(card, wrong)["colour"] != ["red"]
    assert swap_claim(card, wrong, rng) == "The colour is red."
    assert swap_claim(card, "I do not know.", rng) is None
