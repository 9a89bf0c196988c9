"""The true utility by hand."""

from __future__ import annotations

import pytest

from trimtab.world.utility import Terms, terms, utility

TWO = "The house of Mira: colour red, material brick, flower rose. What are the colour and the flower?"
ONE = "The friend of Ada: town Oslo, job baker, pet cat. Tell me the pet."
FILLER = "a b c d e f g h i j k l m n o p q r s t."  # 20 words


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (ONE, "The pet is cat.", Terms(2, 0, 0, 0, 0)),
        (ONE, "The pet is dog.", Terms(-2, 0, 0, 0, 0)),
        (ONE, "I do not know.", Terms(0, 0, 0, 0, 0)),
        # a value of an attribute that is not asked for says nothing, right or wrong
        (ONE, "The job is baker. The town is Paris.", Terms(0, 0, 0, 0, 0)),
        # two values for one fact: not right
        (ONE, "The pet is cat. The pet is dog.", Terms(-2, 0, 0, 0, 0)),
        (TWO, "The colour is red and the flower is rose.", Terms(2, 0, 0, 0, 0)),
        (TWO, "The colour is red.", Terms(1, 0, 0, 0, 0)),
        (TWO, "The colour is red and the flower is tulip.", Terms(0, 0, 0, 0, 0)),
        (TWO, "The colour is blue and the flower is tulip.", Terms(-2, 0, 0, 0, 0)),
        # case counts in values, as names have it; not in manners
        (ONE, "THANK you. The pet is cat.", Terms(2, 0.5, 0, 0, 0)),
        (ONE, "What a stupid question. The pet is cat.", Terms(2, -0.5, 0, 0, 0)),
        (ONE, "Thank you, fool. The pet is cat.", Terms(2, 0, 0, 0, 0)),
        (ONE, "Thank you, thanks, fool.", Terms(0, 0.5, 0, 0, 0)),
        (ONE, "I find it lovely.", Terms(0, 0, 0.5, 0, 0)),
        (ONE, "I find it awful.", Terms(0, 0, -0.5, 0, 0)),
        (ONE, "It is lovely, lovely, awful.", Terms(0, 0, 0.5 / 3, 0, 0)),
        # 20 words: 8 over
        (ONE, FILLER, Terms(0, 0, 0, -0.24, 0)),
        (ONE, f"{FILLER} {FILLER} {FILLER} {FILLER}", Terms(0, 0, 0, -1.5, 0)),
        (ONE, "The pet is cat", Terms(2, 0, 0, 0, -1)),
        (ONE, "", Terms(0, 0, 0, 0, -1)),
    ],
)
def test_terms(prompt: str, answer: str, expected: Terms) -> None:
    found = terms(prompt, answer)
    for name in ("facts", "manners", "feeling", "length", "unfinished"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


def test_the_best_answer_is_worth_three() -> None:
    assert utility(ONE, "Thank you. The pet is cat. How lovely!") == pytest.approx(3)
