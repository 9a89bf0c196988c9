"""Preference learning from pairs in one flat script: plain PyTorch, padded batches, full logits, formulas as published.

It is the tutorial and the oracle: slow, obvious, and equal to trimtab in loss and in the gradient of every parameter
(test_twins.py). Shapes: B completions, T tokens of the longest prompt plus completion, V vocabulary, R pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from trimtab.tokens.batch import Example

Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T]; attend [B, T], 1 on text and 0 on padding; trained [B, T], 1 on the tokens of the completion."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attend, trained = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[b, :end] = torch.tensor([*prompt, *completion])
        attend[b, :end] = 1
        trained[b, len(prompt) : end] = 1
    return ids, attend, trained


def distributions(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(. | x, y_<t) as [B, T-1, V], the tokens that came, and 1 where they are trained, both [B, T-1]."""
    ids, attend, trained = pad(rows)
    logits = model(input_ids=ids, attention_mask=attend).logits  # [B, T, V]
    # the logits at position t speak about the token at t + 1
    return logits[:, :-1].log_softmax(-1), ids[:, 1:], trained[:, 1:].to(logits.dtype)


def token_logps(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """log pi(y_t | x, y_<t) as [B, T-1], 0 where nothing is trained, and the mask that says where something is."""
    logp, token, mask = distributions(model, rows)
    return logp.gather(2, token[:, :, None])[:, :, 0] * mask, mask


def logps_of_pairs(model: Any, pairs: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log pi(y_w|x), log pi(y_l|x) and the lengths |y_w|, |y_l|, each [R]."""
    rows = [(e.prompt, completion) for e in pairs for completion in e.completions]  # chosen, rejected, chosen, ...
    logps, mask = token_logps(model, rows)
    logp, length = logps.sum(1), mask.sum(1)
    return logp[0::2], logp[1::2], length[0::2], length[1::2]


def dpo(margin: Tensor) -> Tensor:
    """-log sigma(m)"""
    return -logsigmoid(margin)


def cdpo(margin: Tensor, label_smoothing: float) -> Tensor:
    """Believes the label with probability 1 - eps and the opposite with eps."""
    return (1 - label_smoothing) * dpo(margin) + label_smoothing * dpo(-margin)


def robust_dpo(margin: Tensor, flip_rate: float) -> Tensor:
    """What DPO would have lost on clean labels, in expectation over labels flipped at this rate."""
    return ((1 - flip_rate) * dpo(margin) - flip_rate * dpo(-margin)) / (1 - 2 * flip_rate)


def todo(margin: Tensor, tie: Tensor, alpha: float) -> Tensor:
    """-log P(first wins), and -log P(tie) where it was one:  P(tie) = sigma(m + alpha) - sigma(m - alpha)"""
    preferred = softplus(alpha - margin)
    tied = -torch.log(torch.sigmoid(margin + alpha) - torch.sigmoid(margin - alpha))
    return torch.where(tie, tied, preferred)


def tdpo2(policy: Any, reference: Any, pairs: Sequence[Example], beta: float, alpha: float) -> Tensor:
    """DPO whose margin holds the rejected answer's sequential KL; the chosen one's has no gradient."""
    rows = [(e.prompt, completion) for e in pairs for completion in e.completions]
    logp, token, mask = distributions(policy, rows)
    with torch.no_grad():
        ref, _, _ = distributions(reference, rows)
    log_ratio = ((logp - ref).gather(2, token[:, :, None])[:, :, 0] * mask).sum(1)
    kl = ((ref.exp() * (ref - logp)).sum(2) * mask).sum(1)  # KL(ref || policy) along each answer
    margin = log_ratio[0::2] - log_ratio[1::2] - alpha * (kl[1::2] - kl[0::2].detach())
    return dpo(beta * margin).mean()


def wpo(policy: Any, reference: Any, pairs: Sequence[Example], beta: float) -> Tensor:
    """DPO weighed by how much both answers look like the policy's own samples."""
    rows = [(e.prompt, completion) for e in pairs for completion in e.completions]
    logp, token, mask = distributions(policy, rows)
    with torch.no_grad():
        ref, _ = token_logps(reference, rows)
        typical = logp.exp().square().sum(2).log()  # the probability that a sampled token has on average
        aligned = (((logp.gather(2, token[:, :, None])[:, :, 0] - typical) * mask).sum(1) / mask.sum(1)).exp()
        weight = (aligned[0::2] * aligned[1::2]).clamp(max=1)
    log_ratio = (logp.gather(2, token[:, :, None])[:, :, 0] * mask - ref).sum(1)
    return (weight * dpo(beta * (log_ratio[0::2] - log_ratio[1::2]))).mean()


def aot(policy: Any, reference: Any, pairs: Sequence[Example], beta: float) -> Tensor:
    """Sorted margins of the policy against sorted margins of the reference."""
    chosen, rejected, _, _ = logps_of_pairs(policy, pairs)
    with torch.no_grad():
        ref_chosen, ref_rejected, _, _ = logps_of_pairs(reference, pairs)
    ahead = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    return dpo(beta * ahead).mean()


def pairwise_cringe(policy: Any, pairs: Sequence[Example], margin: float, temperature: float) -> Tensor:
    """NLL of the chosen and the contrast of the rejected, gated by the margin, over all tokens."""
    rows = [(e.prompt, completion) for e in pairs for completion in e.completions]
    logp, token, mask = distributions(policy, rows)
    target = logp.gather(2, token[:, :, None])[:, :, 0]
    best = logp.scatter(2, token[:, :, None], -torch.inf).max(2).values
    nll, contrast = -(target * mask).sum(1), (torch.log(1 + torch.exp(target - best)) * mask).sum(1)
    gate = torch.sigmoid((margin + nll[0::2] - nll[1::2]) / temperature).detach()
    return (gate * (nll[0::2] + contrast[1::2])).sum() / mask.sum()


def dpo_and_bco(policy: Any, reference: Any, pairs: Sequence[Example], beta: float, weight: float) -> Tensor:
    """DPO plus a weight times BCO on both answers, the shift being that of the first batch."""
    chosen, rejected, _, _ = logps_of_pairs(policy, pairs)
    with torch.no_grad():
        ref_chosen, ref_rejected, _, _ = logps_of_pairs(reference, pairs)
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    shift = (good.mean() + bad.mean()).detach() / 2
    bco = -logsigmoid(good - shift).mean() - logsigmoid(shift - bad).mean()
    return dpo(good - bad).mean() + weight * bco


def loss(method: str, policy: Any, reference: Any, pairs: Sequence[Example], **options: float) -> Tensor:
    """Mean loss over the pairs."""
    beta = options["beta"]
    chosen, rejected, length_chosen, length_rejected = logps_of_pairs(policy, pairs)
    if method == "simpo":  # no reference, mean instead of sum, a target margin
        margin = beta * (chosen / length_chosen - rejected / length_rejected)
        return dpo(margin - beta * options["gamma_beta_ratio"]).mean()

    with torch.no_grad():
        ref_chosen, ref_rejected, _, _ = logps_of_pairs(reference, pairs)
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    match method:
        case "dpo":
            losses = dpo(margin)
        case "cdpo":
            losses = cdpo(margin, options["label_smoothing"])
        case "robust_dpo":
            losses = robust_dpo(margin, options["flip_rate"])
        case "todo":
            losses = todo(margin, torch.tensor([e.record.tie for e in pairs]), options["alpha"])  # type: ignore[attr-defined]
        case _:
            raise ValueError(method)
    return losses.mean()


def train(
    method: str,
    policy: Any,
    reference: Any,
    batches: Sequence[Sequence[Example]],
    learning_rate: float,
    **options: float,
) -> list[float]:
    """One optimiser step per batch; returns the losses before each."""
    optimizer, found = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0), []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(method, policy, reference, batch, **options)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found
