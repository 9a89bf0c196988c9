"""Learning from single answers in one flat script: thumbs up and down (KTO), demonstrations (SFT).

Like pairs.py: plain PyTorch, padded batches, full logits; slow, obvious, and equal to trimtab in loss and gradient.
Shapes: R rows, one completion each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.twins.pairs import Row, distributions, pad, token_logps
from trimtab.tokens.batch import Example


def rows_of(examples: Sequence[Example]) -> list[Row]:
    return [(e.prompt, e.completions[0]) for e in examples]


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Each prompt with the completion of the next row, cyclically, that answers another prompt."""
    found = []
    for i, (prompt, _) in enumerate(rows):
        later = [rows[(i + step) % len(rows)] for step in range(1, len(rows))]
        others = [completion for other, completion in later if other != prompt]
        if others:
            found.append((prompt, others[0]))
    return found


def log_ratios(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """[R] rho = log pi(y|x) - log pi_ref(y|x)"""
    with torch.no_grad():
        ref = token_logps(reference, rows)[0].sum(1)
    return token_logps(policy, rows)[0].sum(1) - ref


def kto(
    policy: Any,
    reference: Any,
    examples: Sequence[Example],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """mean of lambda_y (1 - v):  v = sigma(beta (rho - z0)) for a thumb up, sigma(beta (z0 - rho)) for a thumb down."""
    rows = rows_of(examples)
    rho = log_ratios(policy, reference, rows)
    # the reference point: how far the policy has moved on answers that do not belong to the prompt; no gradient
    with torch.no_grad():
        others = mismatched(rows)
        z0 = log_ratios(policy, reference, others).mean().clamp(min=0) if others else torch.zeros(())
    losses = []
    for i, e in enumerate(examples):
        if e.record.desirable:  # type: ignore[attr-defined]
            losses.append(desirable_weight * (1 - torch.sigmoid(beta * (rho[i] - z0))))
        else:
            losses.append(undesirable_weight * (1 - torch.sigmoid(beta * (z0 - rho[i]))))
    return torch.stack(losses).mean()


def sft(policy: Any, examples: Sequence[Example], normalise: str) -> Tensor:
    """-log-probs of the demonstrations: per token of the batch, per sequence, or per sequence after a mean in each."""
    logps, mask = token_logps(policy, rows_of(examples))
    match normalise:
        case "token":
            return -logps.sum() / mask.sum()
        case "sequence_sum":
            return -logps.sum(1).mean()
        case "sequence_mean":
            return -(logps.sum(1) / mask.sum(1)).mean()
        case _:
            raise ValueError(normalise)


def bco(policy: Any, reference: Any, examples: Sequence[Example], beta: float) -> Tensor:
    """Binary cross-entropy around the middle of both classes' mean rewards, which are those of the first batch."""
    reward = beta * log_ratios(policy, reference, rows_of(examples))
    up = torch.tensor([e.record.desirable for e in examples])  # type: ignore[attr-defined]
    shift = (reward[up].mean() + reward[~up].mean()).detach() / 2
    return -torch.log(torch.sigmoid(reward - shift))[up].mean() - torch.log(torch.sigmoid(shift - reward))[~up].mean()


def apo_zero(policy: Any, reference: Any, examples: Sequence[Example], beta: float) -> Tensor:
    """1 - sigma(r) of good answers, sigma(r) of bad ones."""
    win = torch.sigmoid(beta * log_ratios(policy, reference, rows_of(examples)))
    up = torch.tensor([e.record.desirable for e in examples])  # type: ignore[attr-defined]
    return torch.where(up, 1 - win, win).mean()


def cringe(policy: Any, examples: Sequence[Example], alpha: float) -> Tensor:
    """NLL of good answers; each token of a bad one against the likeliest other token; over all tokens."""
    logp, token, mask = distributions(policy, rows_of(examples))
    target = logp.gather(2, token[:, :, None])[:, :, 0]
    best = logp.scatter(2, token[:, :, None], -torch.inf).max(2).values
    good = torch.tensor([e.record.desirable for e in examples])[:, None]  # type: ignore[attr-defined]
    losses = torch.where(good, -target, alpha * torch.log(1 + torch.exp(target - best)))
    return (losses * mask).sum() / mask.sum()


def values(model: Any, rows: Sequence[Row]) -> Tensor:
    """[R, T-1] what the critic expects before each token: a head on the policy's states, or with a trunk of its own."""
    ids, attend, _ = pad(rows)
    critic = model.trimtab_critic
    own = critic.trunk is not None
    states = (critic.trunk if own else model.model)(input_ids=ids, attention_mask=attend).last_hidden_state[:, :-1]
    return critic.head(states if own else states.detach())[:, :, 0]


def offline_ppo(
    policy: Any, reference: Any, examples: Sequence[Example], clip: float, value: float, kl: float
) -> Tensor:
    """PPO's clipped objective with the reference as behaviour policy; +1 or -1 at the last token; gamma .99, lambda .95."""
    rows = rows_of(examples)
    logp, mask = token_logps(policy, rows)
    with torch.no_grad():
        ref, _ = token_logps(reference, rows)
    expected = values(policy, rows)
    advantage, to_go = torch.zeros_like(logp), torch.zeros_like(logp)
    for r, e in enumerate(examples):
        places = mask[r].nonzero().flatten().tolist()
        error = gain = after = 0.0
        for t in reversed(places):
            paid = (1.0 if e.record.desirable else -1.0) if t == places[-1] else 0.0  # type: ignore[attr-defined]
            now = expected[r, t].item()
            error = paid + 0.99 * after - now + 0.99 * 0.95 * error
            gain = paid + 0.99 * gain
            advantage[r, t], to_go[r, t], after = error, gain, now
    every = advantage[mask > 0]
    advantage = (advantage - every.mean()) / (every.var(correction=0) + 1e-8).sqrt()
    ratio = torch.exp(logp - ref)
    surrogate = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    losses = surrogate + value * 0.5 * (expected - to_go) ** 2 + kl * (logp - ref)
    return (losses * mask).sum() / mask.sum()


def dro(policy: Any, reference: Any, examples: Sequence[Example], tau: float) -> Tensor:
    """(tau/2) rho^2 - (r - V) log pi for the policy, (1/2)(V - r + tau rho)^2 for the value of the prompt."""
    rows = rows_of(examples)
    score = torch.tensor([e.record.score for e in examples], dtype=torch.float64)  # type: ignore[attr-defined]
    logp = token_logps(policy, rows)[0].sum(1)
    rho = log_ratios(policy, reference, rows)
    value = torch.stack([v[len(p) - 1] for v, (p, _) in zip(values(policy, rows), rows, strict=True)])
    losses = tau / 2 * rho**2 - (score - value.detach()) * logp + 0.5 * (value - score + tau * rho.detach()) ** 2
    return losses.mean()


def train(policy: Any, batches: Sequence[Sequence[Example]], learning_rate: float, **how: Any) -> list[float]:
    """One optimiser step per batch; ``how``: ``reference`` and KTO's options, or ``normalise`` for SFT."""
    optimizer, found = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0), []
    for batch in batches:
        optimizer.zero_grad()
        value = sft(policy, batch, **how) if "normalise" in how else kto(policy, examples=batch, **how)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found
