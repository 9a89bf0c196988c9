"""DeepSpeed's engine (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054), which keeps the optimizer's state in shards, from stage
2 on gradients, too, and in stage 3 weights.

accelerate steps that engine inside ``backward``. Here the two are apart: the step comes where the Trainer asks for the
gradient's norm, which only that step finds, when every microbatch has been looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import propagate_args_to_deepspeed, unset_hf_deepspeed_config

from trimtab.logprobs.sharded import remember_engine


class _Backward(DeepSpeedEngineWrapper):  # type: ignore[misc]
    """accelerate's, without its step."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **more: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **more)


def set_up(accelerator: Accelerator, args: TrainingArguments) -> None:
    """What accelerate does on GPUs, also on a CPU, which it would take for DDP without a word."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        plugin = args.deepspeed_plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        state.deepspeed_plugins = plugin
        plugin.select(_from_accelerator_state=True)
        propagate_args_to_deepspeed(accelerator, args)
    # what transformers loads or samples from now on would take itself for a part of the sharded model
    unset_hf_deepspeed_config()


def take_over(accelerator: Accelerator, model: nn.Module) -> None:
    """To be called when accelerate has made its engine around ``model``."""
    engine = accelerator.deepspeed_engine_wrapped.engine
    accelerator.deepspeed_engine_wrapped = _Backward(engine)
    remember_engine(model, engine)


def step(accelerator: Accelerator) -> float:
    """Clip, learn, forget the gradients; returns their norm before they were clipped. If it is not finite nothing was learned."""
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.step()
    return float(engine.get_global_grad_norm())


@contextmanager
def not_the_last(accelerator: Accelerator) -> Iterator[None]:
    """More gradients of this step follow."""
    state = accelerator.gradient_state
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(True)
