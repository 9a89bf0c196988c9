"""Quantities of the whole distribution at each completion token: what the log-prob of one token does not tell.

They are computed where the logits are, a few rows at a time, and the backward pass computes those rows again; no more
than :data:`ROWS` rows of logits ever exist. One column per quantity, the token's own log-prob first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.tokens.batch import Example, completion_keys

ROWS = 256  # rows of logits held at once: 256 x 49,152 in float32 are 50 MB

Logits = Callable[[Tensor], Tensor]  # hidden states [n, H] -> logits [n, V], at least float32


@dataclass(frozen=True)
class Distribution:
    """The reference's next-token distributions at the N completion tokens of a microbatch, as hidden states [N, H]."""

    hidden: Tensor
    logits: Logits


@dataclass(frozen=True)
class Extras:
    """What to compute beside the log-probs of one microbatch.

    Attributes:
        names: out of :data:`trimtab.logprobs.scored.EXTRAS`, in the order of the columns.
        reference: for ``token_kl``.
        noise: [N, k] standard Gumbel noise that draws ``rival`` out of the k likeliest other tokens.
        value: whether the critic's values are asked for: one more column, the last.
    """

    names: tuple[str, ...]
    reference: Distribution | None = None
    noise: Tensor | None = None
    value: bool = False


def columns(hidden: Tensor, target: Tensor, logits: Logits, extras: Extras) -> Tensor:
    """[N, 1 + len(names)]: log-prob of the target, then the extras."""
    parts = []
    for a in range(0, len(hidden), ROWS):
        rows = slice(a, a + ROWS)
        noise = None if extras.noise is None else extras.noise[rows]
        other = None
        if extras.reference is not None:
            with torch.no_grad():
                other = extras.reference.hidden[rows]
        parts.append(checkpoint(_rows, hidden[rows], target[rows], logits, extras, other, noise, use_reentrant=False))
    return torch.cat(parts)


def _rows(
    hidden: Tensor, target: Tensor, logits: Logits, extras: Extras, other: Tensor | None, noise: Tensor | None
) -> Tensor:
    logp = logits(hidden).log_softmax(-1)
    found = [logp.gather(1, target[:, None])[:, 0]]
    for name in extras.names:
        match name:
            case "token_kl":
                assert extras.reference is not None and other is not None
                with torch.no_grad():
                    ref = extras.reference.logits(other).log_softmax(-1)
                    # p log p is 0 where p underflows; never 0 * -inf
                    entropy = torch.special.xlogy(ref.exp(), ref.exp()).sum(-1)
                found.append(entropy - (ref.exp() * logp).sum(-1))
            case "collision":
                found.append((2 * logp.detach()).logsumexp(-1))
            case "rival":
                assert noise is not None
                found.append(logp.gather(1, rival(logp.detach(), target, noise)[:, None])[:, 0])
            case _:
                raise AssertionError(name)
    return torch.stack(found, 1)


def rival(logp: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    """[n] a token drawn from the softmax over the k likeliest ones but the target; noise [n, k] (k = 1: the likeliest)."""
    others = logp.scatter(1, target[:, None], -torch.inf)
    best, token = others.topk(noise.shape[1], -1)
    return token.gather(1, (best + noise).argmax(-1, keepdim=True))[:, 0]


def gumbel(examples: Sequence[Example], k: int, seed: int) -> Tensor:
    """[N, k] noise that depends on the seed and on each completion's tokens alone, not on how the batch is cut."""
    parts = []
    for e in examples:
        for key, completion in zip(completion_keys(e), e.completions, strict=True):
            mixed = hashlib.blake2b(key + seed.to_bytes(8, "little", signed=True), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
            uniform = torch.rand(len(completion), k, generator=generator).clamp(1e-9, 1 - 1e-7)
            parts.append(-torch.log(-torch.log(uniform)))
    return torch.cat(parts) if parts else torch.zeros(0, k)
