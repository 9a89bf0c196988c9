"""What happens at each logged step: a line in the metrics file, a line for the eye."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState

from trimtab.logprobs.reference import FrozenCopy

SHOWN = {"rewards/margins": "margin", "rewards/accuracies": "accuracy", "kl": "kl"}


def peak_memory_gb() -> float:
    """Peak memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)


class MetricsFile(TrainerCallback):
    """One JSON object per logged step. On resume, lines after the checkpoint are cut: those steps are run again."""

    def __init__(self, file: Path, trainer_tokens: Any) -> None:
        self.file, self.tokens, self.mark = file, trainer_tokens, (time.perf_counter(), 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.mark = (time.perf_counter(), self.tokens())
        if self.file.exists() and state.is_world_process_zero:
            kept = [line for line in self.file.read_text().splitlines() if _step_of(line) <= state.global_step]
            self.file.write_text("".join(line + "\n" for line in kept if state.global_step > 0))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = {"step": state.global_step, **logs, "peak_memory_gb": peak_memory_gb()}
        if "loss" in logs:
            now, tokens = time.perf_counter(), self.tokens()
            row["tokens_per_second"] = (tokens - self.mark[1]) / max(now - self.mark[0], 1e-9)
            self.mark = (now, tokens)
            logs["tokens_per_second"] = row["tokens_per_second"]
        with self.file.open("a") as f:
            f.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a half-written last line


class MovingReference(TrainerCallback):
    """TR-DPO (arXiv:2404.09656): every ``every`` steps the reference goes ``mix`` of the way to the policy; 1 is a copy."""

    def __init__(self, reference: FrozenCopy, every: int, mix: float) -> None:
        self.reference, self.every, self.mix = reference, every, mix

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.reference.move(model, self.mix)


class Shrink(TrainerCallback):
    """An L1 penalty on what is trained, as soft-thresholding after each step: unlike its subgradient it gives zeros."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        by = self.strength * lr_scheduler.get_last_lr()[0]
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.nn.functional.softshrink(p, by))


class Progress(TrainerCallback):
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console, self.start, self.first = console, 0.0, 0
        self.live: Live | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            self.live = Live(console=self.console, transient=False, refresh_per_second=4)
            self.live.start()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        done = max(state.global_step - self.first, 1)
        left = (time.perf_counter() - self.start) / done * (state.max_steps - state.global_step)
        parts = [f"step {state.global_step}/{state.max_steps}", f"{_clock(left)} left", f"loss {logs['loss']:.4f}"]
        parts += [f"{short} {logs[name]:.3f}" for name, short in SHOWN.items() if name in logs]
        parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
        parts.append(f"{peak_memory_gb():.1f} GB")
        text = Text("  ".join(parts))
        if self.live is not None:
            self.live.update(text)
        elif state.global_step == state.max_steps or state.global_step % max(1, state.max_steps // 20) == 0:
            self.console.print(text, soft_wrap=True)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Also called when training ends by an exception."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
