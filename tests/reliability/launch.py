"""Several processes on this machine, launched as users do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "reliability"
ACCELERATE = ["--num_machines", "1", "--machine_rank", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(cwd: Path) -> dict[str, str]:
    """One thread each, and what is cached goes below ``cwd``."""
    ours = {"PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "hf"), "TRIMTAB_HOME": str(cwd / "home")}
    return {**os.environ, "OMP_NUM_THREADS": "1", **ours}


def with_accelerate(processes: int, *more: str) -> list[str]:
    """``accelerate launch`` with these options; ``--cpu`` would start one process, ``--multi_gpu`` is torchrun."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    return [*command, *(more or ("--multi_gpu", *ACCELERATE)), "--main_process_port", str(free_port())]


def with_torchrun(processes: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(free_port())]


def run(
    command: Sequence[str], cwd: Path, seconds: float = 240, more: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """(exit code, what it told) of a launcher; where it takes longer, it and its workers are killed. ``more``: environment."""
    started = subprocess.Popen(
        command, env={**environment(cwd), **(more or {})}, cwd=cwd, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _, told = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # the launcher and its workers: one of them waits for ever
        raise
    return started.returncode, told


def launch(processes: int, script: str, *words: str, cwd: Path) -> None:
    """A file of this folder in several processes, which must end well."""
    code, told = run([*with_accelerate(processes), str(HERE / script), *words], cwd)
    assert code == 0, told[-4000:]
