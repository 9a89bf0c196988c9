"""Small files on disk, and the real ones where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("TRIMTAB_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as ``prefs.jsonl`` and give its path."""

    def write(*rows: Any, name: str = "prefs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def real() -> Callable[[str], Path]:
    """The path of a file of real feedback; skips, with the reason, where the folder is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"{path} is absent: set TRIMTAB_DATA to the folder of real data sets")
        return path

    return find
