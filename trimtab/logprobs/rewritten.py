"""Modules of a model that compute the same in another way while the engine has it: norms, gates and the last layer."""

from __future__ import annotations

from types import MethodType
from typing import Any

from trimtab.logprobs import gate, last_layer, norm


def rewrite(model: Any) -> None:
    """Replace the forward passes whose code is known; :func:`restore` undoes it."""
    for kind in (norm, gate, last_layer):
        for module, forward in kind.replacements(model):
            module.forward = MethodType(forward, module)


def restore(model: Any) -> None:
    ours = {*norm.FORWARDS, *gate.FORWARDS, *last_layer.FORWARDS}
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in ours:
            del module.forward
