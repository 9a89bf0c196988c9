"""Log-probabilities of given tokens from hidden states, without holding more logits than a block, or than :data:`KEPT`.

A vocabulary of 49,152 and 4,096 completion tokens would be 0.8 GB of float32 logits, three times over in a backward
pass. Here the backward computes each block again, one matrix product more, unless all of them are few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.logprobs.products import serves, times

# Blocks that paid on CPU (docs/decisions.md): float32 in a few row chunks over the whole vocabulary; bfloat16 in
# vocabulary blocks with a running log-sum-exp, because converting a whole row of logits to float32 misses the caches.
ROWS_FLOAT32, ROWS_BFLOAT16, VOCAB_BFLOAT16 = 512, 4096, 4096
KEPT = 2**25  # numbers that are kept for the backward, where there are no more of them in all blocks: a product less


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
        blocks = logits_of.blocks()
        keep = any(ctx.needs_input_grad) and n * len(weight) <= KEPT and not softcap
        ctx.kept = []
        for rows, vocab in blocks:
            logits, _ = logits_of(rows, vocab)
            here, index = _inside(target[rows], vocab)
            picked[rows] += torch.where(here, logits.gather(1, index[:, None])[:, 0], 0)
            top = logits.amax(-1).clamp_(min=torch.finfo(lse.dtype).min)  # where all are -inf
            logits.sub_(top[:, None]).exp_()
            lse[rows] = torch.logaddexp(lse[rows], top + logits.sum(-1).log())
            if keep:
                ctx.kept.append((logits, top))
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return picked - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse = ctx.saved_tensors
        logits_of = _Blocks(hidden, weight, bias, ctx.scale, ctx.softcap)
        kept, ctx.kept = ctx.kept[::-1], []  # overwritten here: a second backward computes them again
        grad = grads[0].to(logits_of.accumulate)
        grad_hidden = torch.empty(hidden.shape, dtype=logits_of.accumulate, device=hidden.device)
        # not zeroed: the first rows write, the others add
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for rows, vocab in logits_of.blocks():
            # d logp / d logits = onehot - softmax, times the incoming gradient
            if kept:
                (delta, top), slope = kept.pop(), None
                delta.mul_((top - lse[rows]).exp_().mul_(-grad[rows])[:, None])
            else:
                delta, slope = logits_of(rows, vocab)
                delta.sub_(lse[rows, None]).exp_().mul_(-grad[rows, None])
            here, index = _inside(target[rows], vocab)
            delta.scatter_add_(1, index[:, None], (grad[rows] * here)[:, None])
            if slope is not None:
                delta.mul_(slope)
            if grad_bias is not None:
                grad_bias[vocab] += delta.sum(0).to(grad_bias.dtype)
            if ctx.scale != 1.0:
                delta.mul_(ctx.scale)
            delta = delta.to(logits_of.compute)
            _product(grad_hidden[rows], delta, logits_of.weight(vocab), first=vocab.start == 0)
            if grad_weight is not None:
                _product(grad_weight[vocab], delta.T, hidden[rows], first=rows.start == 0)
        if not len(hidden) and grad_weight is not None:
            grad_weight.zero_()
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _product(into: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """into = a @ b, or += where it is not the first."""
    if serves(a):
        for part in range(0, len(a), VOCAB_BFLOAT16):  # what is found first lies in the caches
            rows = slice(part, part + VOCAB_BFLOAT16)
            found = times(a[rows], b.T)
            into[rows].copy_(found) if first else into[rows].add_(found)
    elif into.dtype == a.dtype:
        torch.addmm(into, a, b, beta=0 if first else 1, out=into)
    elif first:
        into.copy_(a @ b)
    else:
        into.add_(a @ b)


class _Blocks:
    """logits(rows, vocab) = softcap(scale * hidden @ weight.T + bias), accumulated in at least float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> None:
        # ``hidden`` arrives in the compute precision; the weight follows it, so that both products run there
        self.compute = hidden.dtype
        self.accumulate = torch.float64 if self.compute == torch.float64 else torch.float32
        self.hidden, self.master, self.bias = hidden, weight, bias
        self.scale, self.softcap = scale, softcap
        low = self.compute in (torch.bfloat16, torch.float16)
        self.rows = ROWS_BFLOAT16 if low else ROWS_FLOAT32
        self.vocab = VOCAB_BFLOAT16 if low else len(weight)

    def blocks(self) -> list[tuple[slice, slice]]:
        n, v = len(self.hidden), len(self.master)
        rows = [slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows)]
        return [(r, slice(b, min(b + self.vocab, v))) for r in rows for b in range(0, v, self.vocab)]

    def weight(self, vocab: slice) -> Tensor:
        """These rows of the head, in the compute precision: a whole copy would be new memory in every pass."""
        return self.master[vocab].to(self.compute)

    def __call__(self, rows: slice, vocab: slice) -> tuple[Tensor, Tensor | None]:
        """A block of logits that the caller may overwrite, and d softcap / d logits where there is a soft-cap."""
        logits = times(self.hidden[rows], self.weight(vocab)).to(self.accumulate)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.bias is not None:
            logits.add_(self.bias[vocab])
        if not self.softcap:
            return logits, None
        bent = logits.div_(self.softcap).tanh_()
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
