"""A process that trains keeps the memory that it frees, where glibc can be asked to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from trimtab.logprobs.pages import keep_pages
asked = keep_pages()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    start = faults()
    b"x" * 100_000_000
print(asked, faults() - start)
"""


def run(**more: str) -> tuple[bool, int]:
    """(whether the allocator was asked, page faults of the second of two blocks of 100 MB)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**clean, **more}, capture_output=True, text=True, check=True
    )
    asked, faults = out.stdout.split()
    return asked == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be asked")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    asked, faults = run()
    assert asked and faults < 1000
    asked, faults = run(MALLOC_ARENA_TEST="8")
    assert not asked and faults > 10_000
