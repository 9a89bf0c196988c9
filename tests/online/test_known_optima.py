"""Where methods on rollouts lead, by enumeration: no sampling, no noise, every answer with its exact probability.

The policy is a table of logits, one row for each prefix. Every group of K answers that it could have sampled is a prompt of
one batch, weighed by its probability, so the gradient is the expected one, and what it must be is the gradient of a formula.

Mistakes that were tried, each of which made tests here fail:

    sign        of the KL in rloo, nash_md, remax, reinforce_pp, ppo and (in the loss) grpo; of dapo's loss; of k3's logarithm
    ratio       pi_old/pi in grpo; a sum for gspo's mean; cispo's weight with its gradient; nash_md's token by token
    baseline    rloo's mean with the answer itself; half of rloo's advantage; dr_grpo's bare reward; gae's delta without V
    deviation   left out where it divides the advantage
    mask        the last token left out of rloo's and dapo's sums; the first left out of the log-ratio to the reference
    length      1/|y| in dr_grpo and dapo, none in grpo and gspo; nash_md's log-ratio of each token alone
    estimator   k2 without its half; k3 for what was asked; corrected with a ratio that has no gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.by_hand import close
from trimtab.credit.kl import kl
from trimtab.feedback.records import Message
from trimtab.judges.base import Question, Scores, Verdicts
from trimtab.judges.records import rankings
from trimtab.logprobs.scored import Completions, Rollouts
from trimtab.objectives import methods, objective_class
from trimtab.objectives.base import Objective
from trimtab.objectives.grpo import GRPO
from trimtab.objectives.nash_md import NashMD

END = 0


class Table:
    """All answers of at most ``depth`` tokens out of ``vocabulary``, of which token 0 ends an answer."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        self.answers: list[tuple[int, ...]] = []
        open_ones: list[tuple[int, ...]] = [()]
        for _ in range(depth):
            longer = [(*a, t) for a in open_ones for t in range(vocabulary)]
            self.answers += [a for a in longer if a[-1] == END or len(a) == depth]
            open_ones = [a for a in longer if a[-1] != END and len(a) < depth]
        at = {p: i for i, p in enumerate(dict.fromkeys(a[:n] for a in self.answers for n in range(len(a))))}
        self.shape = (len(at), vocabulary)
        self.prefix = torch.tensor([at[a[:n]] for a in self.answers for n in range(len(a))])
        self.token = torch.tensor([t for a in self.answers for t in a])
        self.length = torch.tensor([len(a) for a in self.answers])

    def __len__(self) -> int:
        return len(self.answers)

    def random(self, seed: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def tokens(self, logits: Tensor) -> Tensor:
        """[N] log-probs of the tokens of every answer."""
        return logits.log_softmax(1)[self.prefix, self.token]

    def scored(self, logits: Tensor, ref: Tensor | None = None) -> Completions:
        """Every answer; what a critic and the like would say of a token depends on its prefix alone."""
        value = self.random(99)[:, 0][self.prefix]
        return Completions(
            self.tokens(logits), self.length, None if ref is None else self.tokens(ref), {"value": value}
        )

    def logp(self, logits: Tensor) -> Tensor:
        """[n] log-probs of the answers."""
        return Completions(self.tokens(logits), self.length).logp


SMALL, LARGE = Table(3, 3), Table(4, 4)  # 15 and 121 answers
ARMS = Table(3, 1)  # 3 answers of one token


def test_the_probabilities_of_all_answers_add_up_to_1() -> None:
    assert (len(SMALL), len(LARGE), len(ARMS)) == (15, 121, 3)
    for table in (SMALL, LARGE, ARMS):
        assert table.logp(table.random(0)).exp().sum().item() == pytest.approx(1, rel=1e-12)


def rising(
    method: Objective, table: Table, logits: Tensor, ref: Tensor, score: Tensor | Callable[[Tensor], Tensor], k: int
) -> Tensor:
    """[prefixes, V] the expected direction of a step on answers sampled just now: minus the mean gradient over all groups.

    ``score``: of each answer, or what a judge says of the groups [groups, K] of answers.
    """
    groups = torch.tensor(list(product(range(len(table)), repeat=k)))
    leaf = logits.detach().requires_grad_()
    every = table.scored(leaf, ref)
    likely = every.logp.detach()[groups].sum(1).exp()
    y, rows = every.take(groups.flatten()), torch.arange(len(groups)).repeat_interleave(k)
    columns = {"behaviour": y.token_logps.detach(), "baseline": torch.full_like(y.token_logps, 0.3).detach()}
    said = score[groups] if isinstance(score, Tensor) else score(groups)
    batch = Rollouts(y.detach(), rows, torch.ones_like(rows), said.flatten(), columns=columns)
    earned = method.credit(batch, {})[0]
    batch = replace(batch, y=y, columns={**columns, **earned})
    return -torch.autograd.grad((likely * method.loss(batch)).sum(), leaf)[0]


def slope(value: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(value(leaf), leaf)[0]


def regularised(table: Table, ref: Tensor, score: Tensor, beta: float) -> Callable[[Tensor], Tensor]:
    """logits -> E[r] - beta KL(pi || pi_ref), over whole answers."""

    def value(logits: Tensor) -> Tensor:
        logp = table.logp(logits)
        return (logp.exp() * (score - beta * (logp - table.logp(ref)))).sum()

    return value


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def scores(table: Table, seed: int = 5) -> Tensor:
    """A reward for every answer, no two alike."""
    return torch.randn(len(table), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- what each method's mean gradient is on-policy ------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What is true of a method on rollouts; every one has its line below.

    Attributes:
        options: with which it is true.
        beta: of the KL that its gradient holds, with these options.
        factor: K -> its gradient over that of E[r] - beta KL; None: some positive number.
        ranks: it sees the order of two rewards and not their sizes (it divides by their deviation).
        by_length: it weighs an answer by 1/|y|.
    """

    options: dict[str, Any]
    beta: float = 0.0
    factor: Callable[[int], float] | None = None
    ranks: bool = False
    by_length: bool = False


PROMISES = {
    "rloo": Promise({"beta": 0.4}, 0.4, factor=lambda k: k),
    "dr_grpo": Promise({"longest": 1}, factor=lambda k: k - 1),
    "grpo": Promise({"beta": 0.0}, ranks=True, by_length=True),
    "gspo": Promise({}, ranks=True, by_length=True),
    "dapo": Promise({}, ranks=True),
    "cispo": Promise({}, ranks=True),
    "nash_md": Promise({"tau": 0.4}, 0.4, factor=lambda k: k),
    "remax": Promise({"beta": 0.4}, 0.4, factor=lambda k: k),
    "reinforce_pp": Promise({"beta": 0.4}, 0.4),  # whitened: the direction is right, the length is not
    "ppo": Promise(
        {"beta": 0.4, "gae_lambda": 1.0}, 0.4
    ),  # whitened; with lambda below 1 the critic would have to be right
}
NAMES = sorted(name for name, cls in methods().items() if cls.feedback is Rollouts)
EXACT = [n for n in NAMES if not PROMISES[n].ranks and not PROMISES[n].by_length]
RANKS = [n for n in NAMES if PROMISES[n].ranks]


def made(name: str) -> Objective:
    return objective_class(name)(**PROMISES[name].options)


def test_every_method_on_rollouts_is_here() -> None:
    assert sorted(PROMISES) == NAMES


@pytest.mark.parametrize(("table", "k"), [(SMALL, 2), (SMALL, 3), (LARGE, 2)], ids=["15, K 2", "15, K 3", "121, K 2"])
@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_of_the_reward_and_the_kl(name: str, table: Table, k: int) -> None:
    promise, method = PROMISES[name], made(name)
    logits, ref, score = table.random(1), table.random(2), scores(table)
    found = rising(method, table, logits, ref, score, k)
    wanted = slope(regularised(table, ref, score, promise.beta), logits)
    assert cosine(found, wanted) == pytest.approx(1, rel=1e-12)
    if promise.factor:
        assert close(found, promise.factor(k) * wanted, 1e-10)


@pytest.mark.parametrize("name", RANKS)
def test_rewards_in_deviations_are_wins(name: str) -> None:
    """K = 2: A = +-1/sqrt(2) by who wins, so the mean gradient is sqrt(2) E[(2 P - 1) grad log pi(y)], P the probability of
    beating another answer (each token's share 1/|y| where the method has it): a rate of wins, and not E[r]."""
    logits, ref, score = SMALL.random(1), SMALL.random(2), scores(SMALL)
    found = rising(made(name), SMALL, logits, ref, 1e9 * score, 2)  # far apart: the 1e-4 in the deviation vanishes
    p = SMALL.logp(logits).exp()
    wins = ((score[:, None] > score).double() + (score[:, None] == score) / 2) @ p
    weight = math.sqrt(2) * p * (2 * wins - 1) / (SMALL.length if PROMISES[name].by_length else 1)
    assert close(found, slope(lambda x: (weight * SMALL.logp(x)).sum(), logits), 1e-9)
    reward = slope(regularised(SMALL, ref, score, 0), logits)
    assert (0 if PROMISES[name].by_length else 0.5) < cosine(found, reward) < 0.999  # uphill, but not the gradient


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("k", [2, 3])
def test_right_and_wrong_in_deviations_is_uphill(name: str, k: int) -> None:
    """Rewards of 0 and 1 lose nothing but a factor; what weighs answers by 1/|y| goes elsewhere all the same."""
    logits, ref, right = SMALL.random(1), SMALL.random(2), (scores(SMALL) > 0).double()
    found = cosine(rising(made(name), SMALL, logits, ref, right, k), slope(regularised(SMALL, ref, right, 0), logits))
    if PROMISES[name].by_length:
        assert 0.5 < found < 0.99
    else:
        assert found == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_on_all_rewards_changes_nothing(name: str) -> None:
    """Each has a baseline, or 1/2, or a critic: whatever it is, it takes nothing from the mean gradient."""
    logits, ref, score = SMALL.random(1), SMALL.random(2), scores(SMALL)
    once, more = (rising(made(name), SMALL, logits, ref, s, 2) for s in (score, score + 3))
    assert close(once, more, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_of_the_reward(name: str) -> None:
    """Ten times the reward: nothing where it is divided by its deviation, another balance with the KL where not."""
    logits, ref, score = SMALL.random(1), SMALL.random(2), scores(SMALL)
    once, more = (rising(made(name), SMALL, logits, ref, s, 2) for s in (1e6 * score, 1e7 * score))
    whitened = PROMISES[name].factor is None
    assert close(once / once.norm(), more / more.norm(), 1e-5)  # the KL is nothing beside such rewards
    assert (more.norm() / once.norm()).item() == pytest.approx(1 if whitened else 10, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_in_the_loss_is_one_of_tokens(estimator: str) -> None:
    """Summed over answers, each prefix adds the divergence of its next token, as likely as the prefix is; that no token
    answers for the prefixes that it leads to makes it another gradient than that of the KL of whole answers."""
    logits, ref = SMALL.random(1), SMALL.random(2).log_softmax(1)
    leaf = logits.clone().requires_grad_()
    y = SMALL.scored(leaf, ref)
    p = y.logp.detach().exp()
    (found,) = torch.autograd.grad((p * y.sum(kl(y.token_log_ratios, estimator))).sum(), leaf)
    reached = torch.zeros(len(logits)).double().index_add(0, SMALL.prefix, p[y.owner])

    def by_prefix(x: Tensor) -> Tensor:
        a, b = (ref, x.log_softmax(1)) if estimator == "k3" else (x.log_softmax(1), ref)
        return (reached * (a.exp() * (a - b)).sum(1)).sum()

    assert close(found, slope(by_prefix, logits))
    whole = slope(regularised(SMALL, ref, torch.zeros(15).double(), -1.0), logits)
    assert cosine(found, whole) < 0.999


# --- where they lead ------------------------------------------------------------------------------------------------------


def ascend(
    direction: Callable[[Tensor], Tensor], table: Table, logits: Tensor, steps: int = 100, rate: float = 1.0
) -> Tensor:
    """Follow a direction, each entry divided by how often its token is sampled: the natural gradient of a table."""
    for _ in range(steps):
        p = table.logp(logits).exp().repeat_interleave(table.length)
        often = torch.zeros_like(logits).index_put((table.prefix, table.token), p, accumulate=True)
        logits = logits + rate * direction(logits) / often
    return logits


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize("name", [n for n in EXACT if PROMISES[n].beta])
def test_the_reference_tilted_by_the_reward(name: str) -> None:
    """pi_ref(y) exp(r(y) / beta) / Z, where E[r] - beta KL is beta log Z."""
    beta, method = PROMISES[name].beta, made(name)
    ref, score = SMALL.random(2), scores(SMALL)
    found = ascend(lambda x: rising(method, SMALL, x, ref, score, 2), SMALL, SMALL.random(1))
    tilted = SMALL.logp(ref) + score / beta
    assert abs(divergence(SMALL.logp(found), tilted - tilted.logsumexp(0))) < 1e-9
    assert regularised(SMALL, ref, score, beta)(found).item() == pytest.approx(
        beta * tilted.logsumexp(0).item(), rel=1e-6
    )


@pytest.mark.parametrize("name", [n for n in NAMES if not PROMISES[n].beta])
def test_without_a_kl_the_best_answer_takes_it_all(name: str) -> None:
    score = scores(SMALL)
    found = ascend(lambda x: rising(made(name), SMALL, x, x, score, 2), SMALL, SMALL.random(1))
    assert SMALL.logp(found).exp()[score.argmax()] > 0.99


@pytest.mark.parametrize("estimator", ["k2", "k3", "corrected"])
def test_grpo_with_a_kl(estimator: str) -> None:
    """Answers of one token, K = 2, a(y) = (2 P(y) - 1)/sqrt(2) by who wins. Descending KL(pi || ref) it stops at
    pi = ref exp(a/beta)/Z, descending KL(ref || pi) (k3) at pi = ref / (1 - a/beta) (arXiv:2502.18548)."""
    method, ref, score = (
        GRPO(beta=2.0, estimator=estimator),
        ARMS.random(2),
        torch.tensor([0, 2e9, 1e9], dtype=torch.float64),
    )
    log_p = ARMS.logp(ascend(lambda x: rising(method, ARMS, x, ref, score, 2), ARMS, ARMS.random(1), rate=0.2))
    log_ref = ARMS.logp(ref)
    wins = ((score[:, None] > score).double() + torch.eye(3) / 2) @ log_p.exp()
    a = (2 * wins - 1) / math.sqrt(2)
    tilted = log_ref + a / 2
    wanted = log_ref - (1 - a / 2).log() if estimator == "k3" else tilted - tilted.logsumexp(0)
    assert close(log_p, wanted, 1e-6)
    assert (log_p - log_ref).abs().max() > 0.1


# --- preferences that are no rewards --------------------------------------------------------------------------------------

CYCLE = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)  # rock, paper, scissors
# the first beats either other one narrowly; the second beats the third by so much that it wins most on average
CONDORCET = torch.tensor([[0.5, 0.55, 0.55], [0.45, 0.5, 0.95], [0.45, 0.05, 0.5]], dtype=torch.float64)
UNIFORM = torch.zeros(1, 3, dtype=torch.float64)


def equilibrium(beats: Tensor, mu: Tensor, tau: float, mixture: float, steps: int = 150) -> tuple[Tensor, Tensor]:
    """(log pi, what it is at a fixed point: mu exp(P(y > mixture) / tau) / Z)."""

    def wins(logits: Tensor) -> Tensor:
        mixed = (1 - mixture) * ARMS.logp(logits) + mixture * ARMS.logp(mu)
        return beats @ mixed.detach().softmax(0)

    method = NashMD(tau=tau)
    found = ascend(lambda x: rising(method, ARMS, x, mu, wins(x), 1), ARMS, ARMS.random(3), steps)
    return ARMS.logp(found), (ARMS.logp(mu) + wins(found) / tau).log_softmax(0)


@pytest.mark.parametrize("k", [2, 3])
def test_a_round_robin_is_self_play(k: int) -> None:
    """Each answer against the K - 1 others to its prompt: on average the gradient against the policy itself."""

    def won(groups: Tensor) -> Tensor:
        beats = CYCLE[groups[:, :, None], groups[:, None, :]]
        return (beats.sum(2) - 0.5) / (k - 1)  # itself aside

    logits, mu = ARMS.random(1), ARMS.random(2)
    exact = rising(NashMD(), ARMS, logits, mu, CYCLE @ ARMS.logp(logits).exp(), 1)
    assert close(rising(NashMD(), ARMS, logits, mu, won, k), k * exact)
    assert not close(exact, rising(NashMD(), ARMS, logits, mu, CYCLE @ ARMS.logp(mu).exp(), 1), 1e-3)


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_rock_paper_scissors_is_played_evenly(mixture: float) -> None:
    log_p, wanted = equilibrium(CYCLE, UNIFORM, 0.2, mixture)
    assert close(log_p.exp(), torch.full((3,), 1 / 3, dtype=torch.float64), 1e-6) and close(log_p, wanted, 1e-6)


@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beats", [CYCLE, CONDORCET], ids=["cycle", "condorcet"])
def test_the_fixed_point(beats: Tensor, mixture: float) -> None:
    """From a reference that is not even: pi = mu exp(P(y > mixture) / tau) / Z, for self-play, mixture and best response."""
    log_p, wanted = equilibrium(beats, ARMS.random(2), 0.2, mixture)
    assert close(log_p, wanted, 1e-6)


def test_who_beats_all_others_wins_as_tau_falls() -> None:
    """In self-play; against the reference alone it is who wins most often on average, which a reward model sees, too."""
    first = [equilibrium(CONDORCET, UNIFORM, tau, 0.0)[0].exp()[0].item() for tau in (0.3, 0.1, 0.02, 0.005)]
    assert first == sorted(first) and first[0] < 0.5 and first[-1] > 0.99
    assert equilibrium(CONDORCET, UNIFORM, 0.005, 1.0)[0].argmax() == (CONDORCET.mean(1)).argmax() == 1


# --- best of n ------------------------------------------------------------------------------------------------------------


def best_of(n: int, log_p: Tensor, score: Tensor) -> Tensor:
    """[answers] log-probability of being the best of n; rewards are distinct: F(r)^n - F(r-)^n."""
    order = score.argsort()
    below = torch.cat([torch.zeros(1).double(), log_p[order].exp().cumsum(0)])
    return torch.empty_like(log_p).index_copy(0, order, (below[1:] ** n - below[:-1] ** n).log())


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_moves_by_log_n_less_a_bit(n: int) -> None:
    """KL = log n - (n - 1)/n where no answer has much of the probability, and less where some has (arXiv:2404.01730)."""
    wanted = math.log(n) - (n - 1) / n
    for count in (2_000, 20_000):
        even = torch.full((count,), -math.log(count), dtype=torch.float64)
        found = divergence(best_of(n, even, torch.arange(count).double()), even)
        assert 0 < wanted - found < n / count
    log_p, score = LARGE.logp(LARGE.random(1)), scores(LARGE)
    best = best_of(n, log_p, score)
    assert best.exp().sum().item() == pytest.approx(1) and 0 < divergence(best, log_p) < wanted


@pytest.mark.parametrize("n", [2, 3])
def test_the_first_of_a_ranking_is_the_best_of_n(n: int) -> None:
    """Every group of n answers once, judged; whom the ranking puts first, weighed by the group's probability."""
    log_p, score = SMALL.logp(SMALL.random(1)), scores(SMALL)
    groups, text = list(product(range(len(SMALL)), repeat=n)), [f"answer {i}" for i in range(len(SMALL))]
    asked = tuple(Question((Message("user", "?"),), tuple(text[i] for i in g)) for g in groups)
    ranked, _ = rankings(Verdicts(asked, tuple(Scores(tuple(score[list(g)].tolist())) for g in groups)))
    first = torch.tensor([text.index(r.ranked[r.ranks.index(1)]) for r in ranked])
    likely = log_p[torch.tensor(groups)].sum(1).exp()
    assert close(torch.zeros_like(log_p).index_add(0, first, likely), best_of(n, log_p, score).exp())


def test_best_of_n_is_nearly_the_best_that_its_kl_buys() -> None:
    """pi_ref exp(r / beta) / Z with the KL of best-of-4 has at least its reward (and less than a tenth more)."""
    log_p, score = LARGE.logp(LARGE.random(1)), scores(LARGE)
    best = best_of(4, log_p, score)

    def tilted(beta: float) -> Tensor:
        return (log_p + score / beta).log_softmax(0)

    low, high = 0.05, 20.0  # the KL falls with beta
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(tilted(middle), log_p) > divergence(best, log_p) else (low, middle)
    gained = [float((q.exp() - log_p.exp()) @ score) for q in (best, tilted(low))]
    assert gained[0] < gained[1] < 1.1 * gained[0]
