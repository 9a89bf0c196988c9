"""A process that trains keeps the memory that it frees, where glibc can be asked to, and few kernels."""

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


KERNELS = """
import os
from pathlib import Path
import torch
from trimtab.logprobs.score import install
from tests import tiny
install(tiny.model(torch.float32), torch.bfloat16, "shared")
held = lambda: int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") / 1e6  # touched or not
weight, before = torch.ones(64, 64, dtype=torch.bfloat16), held()
for n in range(1, 1001):  # each a shape of its own
    torch.ones(n, 64, dtype=torch.bfloat16) @ weight
print(True, held() - before)
"""


def run(script: str, **more: str) -> tuple[bool, float]:
    """What the script prints, in a process of its own."""
    theirs = ("GLIBC_TUNABLES", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in theirs}
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


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells how much memory is mapped")
def test_few_kernels_are_kept_unless_the_user_says_otherwise() -> None:
    """Most of a thousand shapes' kernels are forgotten; with the user's own setting they are not."""
    many = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "2000", "LRU_CACHE_CAPACITY": "2000"}
    _, unlimited = run(KERNELS, **many)
    if unlimited < 100:
        pytest.skip(f"bfloat16 products leave no kernels here ({unlimited:.0f} MB of a thousand shapes)")
    _, limited = run(KERNELS)
    assert limited < unlimited / 2, (limited, unlimited)


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
