"""A process that trains keeps the memory that it frees, where glibc can be asked to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_folder import feedback_file, workplace
from trimtab import run as run_
from trimtab.config import resolve
from trimtab.update.trainer import Update

FAULTS = """
import resource
from trimtab.logprobs.pages import keep_pages
asked = keep_pages()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    start = faults()
    b"x" * 100_000_000
print(asked, faults() - start)  # of the second of two blocks of 100 MB
"""


RETURNED = """
import os
from pathlib import Path
from trimtab.logprobs.pages import give_back, keep_pages
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
keep_pages()
kept = [b"x" * 1_000_000 for _ in range(100)]
del kept[:-1]
before = held()
give_back()
print(before - held() > 90, held())
"""


def run(script: str, **more: str) -> tuple[bool, float]:
    """What the script prints, in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", script], env={**clean, **more}, capture_output=True, text=True, check=True
    )
    said, figure = out.stdout.split()
    return said == "True", float(figure)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be asked")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    asked, faults = run(FAULTS)
    assert asked and faults < 1000
    asked, faults = run(FAULTS, MALLOC_ARENA_TEST="8")
    assert not asked and faults > 10_000


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not os.path.exists("/proc/self/statm"), reason="glibc on Linux"
)
def test_what_is_free_can_be_given_back() -> None:
    """Also the holes below memory that is still in use."""
    assert run(RETURNED)[0]


# of peft, by the old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_run_gives_back_between_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before learning, after it and before samples; what learning needed is gone by then."""
    workplace(tmp_path, monkeypatch)
    feedback_file(tmp_path / "pairs.jsonl", "comparison", 8)
    kept: list[int] = []
    trainers: list[Update] = []
    forget = Update.forget
    monkeypatch.setattr(
        Update, "forget", lambda self: (kept.append(len(self.optimizer.state)), trainers.append(self), forget(self))
    )
    monkeypatch.setattr(
        run_, "give_back", lambda: kept.extend(len(t.optimizer.state) for t in trainers) or kept.append(-1)
    )
    run_.train(
        resolve(
            {
                "data": "pairs.jsonl",
                "method": "dpo",
                "model": "./model",
                "max_steps": 1,
                "batch_size": 4,
                "output": "run",
            }
        )
    )
    assert kept[0] == -1 and kept[1] > 0 and kept[2:] == [0, -1, 0, -1]
