"""DRO-V: golden values, which network each term moves, the closed-form optimum on a finite set (spec A.6)."""

from __future__ import annotations

import math

import torch

from tests.objectives.by_hand import completions, exactly
from trimtab.logprobs.scored import Completions, Scores
from trimtab.objectives.dro import DRO


def scores(logps: list[list[float]], refs: list[list[float]], values: list[list[float]], score: list[float]) -> Scores:
    y = completions(logps, refs)
    y._extras["value"] = torch.tensor([v for r in values for v in r], dtype=torch.float64, requires_grad=True)
    return Scores(y, torch.tensor(score, dtype=torch.float64))


def one() -> Scores:
    """rho = (-0.5 + 0.7) + (-1 + 1.3) = 0.5, log pi = -1.5; V(x) = 0.4 at the first token; score 3."""
    return scores([[-0.5, -1.0]], [[-0.7, -1.3]], [[0.4, 9.0]], [3.0])


def test_golden() -> None:
    """tau 2, score (3 - 1) / 4 = 0.5:
    L_policy = (2/2) 0.5^2 - (0.5 - 0.4)(-1.5) = 0.25 + 0.15 = 0.4
    L_value  = (1/2)(0.4 - (0.5 - 2 * 0.5))^2 = 0.405
    by each token: 2 * 0.5 - 0.1 = 0.9 (nothing through L_value);  by V(x): 0.4 + 0.5 = 0.9 (nothing through L_policy)
    """
    batch = one()
    loss = DRO(tau=2.0, score_mean=1.0, score_std=4.0).loss(batch)
    assert loss.item() == exactly(0.805)
    by_logp, by_value = torch.autograd.grad(loss.sum(), [batch.y._token_logps, batch.y._extras["value"]])
    assert by_logp.tolist() == exactly([0.9, 0.9])
    assert by_value.tolist() == exactly([0.9, 0.0])


def test_it_is_the_joint_gradient_over_tau() -> None:
    """The joint loss (1/2)(r - V - tau rho)^2 has -tau (r - V - tau rho) by log pi; DRO-V divides it by tau."""
    batch, tau = one(), 0.7
    (slope,) = torch.autograd.grad(DRO(tau=tau).loss(batch).sum(), batch.y._token_logps)
    residual = 3.0 - 0.4 - tau * 0.5
    assert slope.tolist() == exactly([-residual] * 2)


def test_nothing_moves_at_the_optimum() -> None:
    """Three answers, pi_ref = (0.5, 0.3, 0.2), scores (1, -0.5, 2), tau = 0.6:
    V* = tau log sum_y pi_ref e^(r/tau),  pi* = pi_ref e^((r - V*)/tau): both gradients are 0 for every answer."""
    tau, reference, reward = 0.6, [0.5, 0.3, 0.2], [1.0, -0.5, 2.0]
    value = tau * math.log(sum(p * math.exp(r / tau) for p, r in zip(reference, reward, strict=True)))
    best = [p * math.exp((r - value) / tau) for p, r in zip(reference, reward, strict=True)]
    assert sum(best) == exactly(1.0)
    batch = scores([[math.log(p)] for p in best], [[math.log(p)] for p in reference], [[value]] * 3, reward)
    slopes = torch.autograd.grad(DRO(tau=tau).loss(batch).sum(), [batch.y._token_logps, batch.y._extras["value"]])
    assert all(s.abs().max() < 1e-12 for s in slopes)


def test_descent_reaches_the_optimum() -> None:
    """From pi_ref and V = 0, answers drawn from pi_ref: the exact expectation of the gradient, 4,000 steps."""
    tau, reference, reward = 0.6, torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, -0.5, 2.0]).double()
    logits, value = reference.log().requires_grad_(), torch.zeros(1).double().requires_grad_()
    one_each, optimizer = torch.tensor([1, 1, 1]), torch.optim.Adam([logits, value], lr=0.01)
    for _ in range(4000):
        y = Completions(logits.log_softmax(0), one_each, reference.log(), {"value": value.expand(3)})
        optimizer.zero_grad()
        (reference * DRO(tau=tau).loss(Scores(y, reward))).sum().backward()
        optimizer.step()
    best = reference * (reward / tau).exp()
    assert torch.allclose(logits.softmax(0), best / best.sum(), atol=1e-4)
    assert abs(value.item() - tau * math.log(best.sum().item())) < 1e-3


def test_advice() -> None:
    batch = scores([[-1.0]] * 4, [[-1.0]] * 4, [[0.0]] * 4, [10.0, 12.0, 14.0, 20.0])
    refused, notes = DRO().advise(batch)
    assert not refused and notes == ["scores have mean 14 and deviation 4.32: set score_mean: 14, score_std: 4.32"]
    assert DRO(score_mean=14.0, score_std=4.32).advise(batch) == ("", [])
    same = Scores(batch.y, torch.full((4,), 3.0))
    assert DRO().advise(same)[0] == "all 4 scores are 3; there is nothing to learn from"
