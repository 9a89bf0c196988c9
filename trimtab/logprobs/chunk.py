"""Log-probabilities of given tokens from hidden states, without ever holding the logits of more than a block.

A vocabulary of 49,152 and 4,096 completion tokens would be 0.8 GB of float32 logits, three times over in a backward
pass. Here the backward recomputes each block, which costs one matrix product more and was measured as free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Blocks that paid on CPU (docs/decisions.md): float32 in a few row chunks over the whole vocabulary; bfloat16 in
# vocabulary blocks with a running log-sum-exp, because converting a whole row of logits to float32 misses the caches.
ROWS_FLOAT32, ROWS_BFLOAT16, VOCAB_BFLOAT16 = 512, 4096, 4096


class _TokenLogps(torch.autograd.Function):
    """forward: (hidden [N, H], weight [V, H], bias [V] or None, target [N]) -> log p(target) [N]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, softcap: float
    ) -> Tensor:
        logits_of = _Blocks(hidden, weight, bias, scale, softcap)
        n = len(hidden)
        lse = torch.full((n,), -torch.inf, dtype=logits_of.accumulate, device=hidden.device)
        picked = torch.zeros_like(lse)
        for rows, vocab in logits_of.blocks():
            logits, _ = logits_of(rows, vocab)
            lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(-1))
            here, index = _inside(target[rows], vocab)
            picked[rows] += torch.where(here, logits.gather(1, index[:, None])[:, 0], 0)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return picked - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse = ctx.saved_tensors
        logits_of = _Blocks(hidden, weight, bias, ctx.scale, ctx.softcap)
        grad = grads[0].to(logits_of.accumulate)
        grad_hidden = torch.zeros(hidden.shape, dtype=logits_of.accumulate, device=hidden.device)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for rows, vocab in logits_of.blocks():
            logits, slope = logits_of(rows, vocab)
            # d logp / d logits = onehot - softmax, times the incoming gradient
            delta = (logits - lse[rows, None]).exp_().mul_(-grad[rows, None])
            here, index = _inside(target[rows], vocab)
            delta.scatter_add_(1, index[:, None], (grad[rows] * here)[:, None])
            if slope is not None:
                delta = delta * slope
            if grad_bias is not None:
                grad_bias[vocab] += delta.sum(0).to(grad_bias.dtype)
            delta = delta.mul_(ctx.scale).to(logits_of.compute)
            grad_hidden[rows] += delta @ logits_of.weight[vocab]
            if grad_weight is not None:
                grad_weight[vocab] += (delta.T @ logits_of.hidden[rows]).to(grad_weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


class _Blocks:
    """logits(rows, vocab) = softcap(scale * hidden @ weight.T + bias), accumulated in at least float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> None:
        # ``hidden`` arrives in the compute precision; the weight follows it, so that both products run there
        self.compute = hidden.dtype
        self.accumulate = torch.float64 if self.compute == torch.float64 else torch.float32
        self.hidden, self.weight, self.bias = hidden, weight.to(self.compute), bias
        self.scale, self.softcap = scale, softcap
        low = self.compute in (torch.bfloat16, torch.float16)
        self.rows = ROWS_BFLOAT16 if low else ROWS_FLOAT32
        self.vocab = VOCAB_BFLOAT16 if low else len(weight)

    def blocks(self) -> list[tuple[slice, slice]]:
        n, v = len(self.hidden), len(self.weight)
        rows = [slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows)]
        return [(r, slice(b, min(b + self.vocab, v))) for r in rows for b in range(0, v, self.vocab)]

    def __call__(self, rows: slice, vocab: slice) -> tuple[Tensor, Tensor | None]:
        """The block of logits, and d softcap / d logits where there is a soft-cap."""
        logits = (self.hidden[rows] @ self.weight[vocab].T).to(self.accumulate)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.bias is not None:
            logits = logits + self.bias[vocab].to(self.accumulate)
        if not self.softcap:
            return logits, None
        bent = torch.tanh(logits / self.softcap)
        return self.softcap * bent, 1 - bent**2


def _inside(target: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in this vocabulary block, and their index in it (0 where they do not)."""
    here = (target >= vocab.start) & (target < vocab.stop)
    return here, torch.where(here, target - vocab.start, 0)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """log softmax(softcap(scale * hidden @ weight.T + bias))[target], the softmax in at least float32.

    Args:
        hidden: [N, H] hidden states that predict the targets; their type is the precision of the matrix products.
        weight: [V, H] of the language-model head, in any floating type.
        target: [N] integer token ids.
        bias: [V], or None.
        scale: multiplies the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: ``softcap * tanh(logits / softcap)`` where it is not 0 (Gemma).

    Returns:
        [N] float32 (float64 for float64 input).
    """
    return _TokenLogps.apply(hidden, weight, bias, target, scale, softcap)  # type: ignore[no-any-return]
