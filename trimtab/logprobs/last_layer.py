"""The last layer gives what is read of it, and nothing else: what it makes of a prompt, nobody asks.

Its attention needs the keys and values of all tokens, but what comes behind, the widest products of a layer, is a matter of
each token alone. Gradient checkpointing leaves it out, and loses nothing: the backward pass begins with it, when nothing else
is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trimtab.logprobs.known_code import LAYER, runs


class Read:
    """Which hidden states are read: ``rows`` [N] of the packed row. ``taken``: they are the only ones that the decoder gave."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.taken = rows, False


def replacements(model: Any) -> Iterator[tuple[Any, Any]]:
    for layers in (getattr(module, "layers", None) for module in model.modules()):
        if isinstance(layers, nn.ModuleList) and len(layers) and runs(layers[-1], LAYER):
            yield layers[-1], _shortened


def _shortened(self: Any, hidden_states: Tensor, *more: Any, trimtab_read: Read | None = None, **kwargs: Any) -> Tensor:
    """[1, T, H] -> [1, N, H] where it is said what is read."""
    if trimtab_read is None or more:
        return type(self).forward(self, hidden_states, *more, **kwargs)  # type: ignore[no-any-return]
    trimtab_read.taken = True
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    states = (hidden_states + attended).index_select(1, trimtab_read.rows)
    found: Tensor = states + self.mlp(self.post_attention_layernorm(states))
    return found


FORWARDS = (_shortened,)
