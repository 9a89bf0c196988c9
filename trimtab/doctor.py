"""What this machine does with this model and this file: one real optimiser step, and only what was seen is claimed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab import run
from trimtab.config import resolve
from trimtab.demo.run import demo_data
from trimtab.errors import ConfigError
from trimtab.logprobs.products import times
from trimtab.report.folder import read_folder


def examine(flags: dict[str, Any], console: Console) -> None:
    """Run every stage on a few rows with one optimiser step, in a folder that is thrown away, and print the figures."""
    console.print("  ".join(f"{k} {v}" for k, v in run.versions().items()))
    console.print("  ".join(f"{k} {v}" for k, v in run.machine().items()), markup=False)
    console.print(
        f"matrix products: {rate(torch.float32) / 1e12:.2f} TFLOP/s float32, {rate(torch.bfloat16) / 1e12:.2f} bfloat16"
    )
    for name in flags.keys() & {"output", "resume", "save_every"}:
        raise ConfigError(
            f'The option "{name}" has no effect on `trimtab doctor`: its run folder is thrown away. Remove it.'
        )
    defaults = {"max_steps": 1, "samples": 0, "batch_size": 4, "limit": 64}
    values = {**defaults, **(demo_data(flags.get("method", "dpo")) if "data" not in flags else {}), **flags}
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        folder = run.train(resolve({**values, "output": str(Path(temporary) / "run")}), console=console)
        card = read_folder(folder).card
        for check in card["checks"]:
            console.print(f"{'ok' if check['ok'] else 'FAILED'}: {check['name']}: {check['detail']}", markup=False)
        peak = card["engine"]["peak_memory_gb"]
        console.print(f"one optimiser step ran; {time.perf_counter() - started:.0f} s in all, peak memory {peak} GB")


def rate(dtype: torch.dtype, rows: int = 1024, inner: int = 1024, columns: int = 1024, repeats: int = 8) -> float:
    """Floating-point operations per second of [rows, inner] @ [inner, columns] here, as the engine multiplies, the best of
    ``repeats``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(n, m, device=device).to(dtype) for n, m in ((rows, inner), (inner, columns)))
    return 2 * rows * inner * columns / _best(lambda: times(a, b.T), repeats)


def bandwidth(size: int = 1 << 28, repeats: int = 4) -> float:
    """Bytes per second that are read and written here when float32 numbers are scaled."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(size // 4, device=device)
    return 2 * size / _best(lambda: a.mul_(1.0), repeats)


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several times."""
    found = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found = min(found, time.perf_counter() - start)
    return found
