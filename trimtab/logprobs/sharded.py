"""Weights that lie in shards on several processes (FSDP2, ``fully_shard``), whole where they are needed whole.

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

from trimtab.logprobs.score import uninstalled

_inside: set[int] = set()  # models whose weights are whole at the moment


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a shard of the weights only."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights on every process while this lasts; all of them must enter, and changes are lost. Nothing for other models."""
    if not is_sharded(model) or id(model) in _inside:
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
