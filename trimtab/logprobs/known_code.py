"""Which code a module runs: what the engine computes otherwise, it replaces where it knows that code word for word."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

# Most models of transformers have copies of these.
NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
LAYER = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, position_ids=position_ids,
    past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""
MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
ROTARY = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = (q * cos) + (rotate_half(q) * sin)
k_embed = (k * cos) + (rotate_half(k) * sin)
return q_embed, k_embed
"""
HALF = """
x1 = x[..., : x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2 :]
return torch.cat((-x2, x1), dim=-1)
"""


def runs(module: Any, code: str) -> bool:
    """Whether the module's forward pass is this code."""
    return is_code(type(module).forward, code)


def is_code(function: Any, code: str) -> bool:
    return _code(function) == _parsed(code)


@lru_cache(256)
def _code(forward: Any) -> str:
    """What a function does, without its signature, comments and types; "" where its source is not there."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    body = getattr(found, "body", [])
    told = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return "\n".join(map(ast.dump, body[1:] if told else body))


@lru_cache(8)
def _parsed(code: str) -> str:
    return "\n".join(map(ast.dump, ast.parse(f"def f():\n{textwrap.indent(code, ' ')}").body[0].body))  # type: ignore[attr-defined]
