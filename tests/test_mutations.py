"""The table of deliberate mistakes names code that is there: otherwise nothing would be tried."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.meaning)
def test_its_line_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / "trimtab" / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert (ROOT / "tests" / mutation.tests.split()[0]).exists()
