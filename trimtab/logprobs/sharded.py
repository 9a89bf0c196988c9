"""Weights in shards on several processes (FSDP2's ``fully_shard``, DeepSpeed's ZeRO-3), whole where they are needed whole.

Every forward pass of a sharded model is a collective call: the processes must make the same number of them. Learning does
(:meth:`trimtab.update.trainer.Update._cut`). What only scores, samples or copies does so while the weights are whole on
each process, and then none waits for another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from trimtab.logprobs.score import base_model, uninstalled

_inside: set[int] = set()  # models whose weights are whole at the moment
ENGINE = "_trimtab_engine"  # DeepSpeed's, of a model


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a shard of the weights only."""
    return isinstance(model, FSDPModule) or _offload(model) is not None


def in_step(model: nn.Module) -> bool:
    """Whether all processes must make the same number of backward passes: gradients are reduced in each."""
    return isinstance(model, FSDPModule) or engine_of(model) is not None


def remember_engine(model: nn.Module, engine: Any) -> None:
    """The model is DeepSpeed's from now on."""
    vars(model)[ENGINE] = engine  # not as an attribute: it would become a part of the model


def engine_of(model: nn.Module) -> Any:
    """DeepSpeed's engine around this model, or None."""
    return vars(model).get(ENGINE)


def _offload(model: nn.Module) -> Any:
    """What lays the weights out, of a model in ZeRO-3, or None."""
    engine = engine_of(model)
    return None if engine is None else getattr(engine.optimizer, "parameter_offload", None)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights on every process while this lasts; all of them must enter, and changes are lost. Nothing for other models."""
    if not is_sharded(model) or id(model) in _inside:
        yield
        return
    if not isinstance(model, FSDPModule):
        with _gathered(model):
            yield
        return
    root: Any = model
    root._get_fsdp_state()._lazy_init()  # else the first part that runs would take itself for the root
    parts: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [g for part in parts for g in part._get_fsdp_state()._fsdp_param_groups]
    after = [g.post_forward_mesh_info for g in groups]  # whether a part is in shards again after its forward
    for part in parts:
        part.unshard()
    root.set_reshard_after_forward(False)
    _inside.add(id(model))
    try:
        yield
    finally:
        _inside.discard(id(model))
        for group, mesh in zip(groups, after, strict=True):
            group.post_forward_mesh_info = mesh
        for part in parts:
            part.reshard()


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """:func:`whole` for ZeRO-3. Its hooks would cut a layer into shards again after each forward."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    offload = _offload(model)
    offload.partition_all_parameters()
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    _inside.add(id(model))
    try:
        with GatheredParameters(list(model.parameters())):
            yield
    finally:
        _inside.discard(id(model))
        offload._register_deepspeed_module(model)


def remember_structure(model: nn.Module) -> None:
    """To be called before the model is sharded: ``copy.deepcopy`` then gives a whole, ordinary model, here as anywhere.

    Sharded modules cannot be copied. What is kept is the model without weights; those of a copy are gathered (by all processes
    together).
    """
    with uninstalled(model):
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        frame = copy.deepcopy(model, dict(empty))
    # gradient checkpointing's; a handle of a hook that is not in the frame (a critic's) could not be copied again
    base_model(frame).disable_input_require_grads()

    def copied(memo: Any) -> nn.Module:
        with whole(model):
            now = dict(model.named_parameters())
            filled = {
                id(p): nn.Parameter(now[n].detach().clone(), requires_grad=p.requires_grad)
                for n, p in frame.named_parameters()
            }
        found: nn.Module = copy.deepcopy(frame, dict(filled))
        return found.train(model.training)

    vars(model)["__deepcopy__"] = copied


def load_whole(module: nn.Module, weights: dict[str, Any]) -> None:
    """Load weights that every process has whole into a module that may be part of a sharded model."""
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
