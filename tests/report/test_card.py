"""Cards are generated, complete and up to date."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trimtab.objectives import methods
from trimtab.report.card import axes, card, page

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.mark.parametrize("name", methods())
def test_card_has_everything(name: str) -> None:
    cls = methods()[name]
    text = card(cls)
    assert (
        cls.equation() in text and cls.paper in text and cls.use in text and cls.avoid in text and cls.differs in text
    )
    assert cls.use.endswith(".") and (not cls.differs or cls.differs.endswith("."))
    for f in dataclasses.fields(cls):
        assert f"| `{f.name}` | {f.default} |" in text
    assert len(axes(cls)) == 13 and all(axes(cls).values())


def test_axes_of_known_methods() -> None:
    """Rows of the survey's table 1, read there."""
    dpo, kto, simpo, tdpo = (axes(methods()[m]) for m in ("dpo", "kto", "simpo", "tdpo2"))
    assert (dpo["reward"], dpo["feedback"], dpo["answers"], dpo["reference"]) == (
        "implicit",
        "preference",
        "pair",
        "based",
    )
    assert kto["feedback"] == "binary" and kto["reward of"] == "pointwise"
    assert (simpo["reference"], simpo["length control"], simpo["divergence"]) == ("free", "yes", "none")
    assert tdpo["level"] == "token"


def test_docs_are_up_to_date() -> None:
    assert DOCS.read_text() == page(methods()), "run: python -m trimtab.report.card > docs/methods.md"
