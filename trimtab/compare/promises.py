"""What methods promise, each as a comparison of two arms in a world made for it.

A promise holds where the 95 % interval of the difference lies on the promised side of ``beyond``, does not hold where
it lies on the other side, and is not shown otherwise. Nothing here knows how a method works.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trimtab.compare.stats import Result, gain, mean_of, p_value
from trimtab.compare.trial import Budget, Trial
from trimtab.report.stats import Interval, mean_interval
from trimtab.world.named import world


@dataclass(frozen=True)
class Arm:
    """A method with its options."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = ", ".join(f"{k} {v}" for k, v in self.options.items())
        return f"{self.method} ({said})" if said else self.method


@dataclass(frozen=True)
class Promise:
    """``ours`` is better than ``theirs`` (None: than the start model) by a measure.

    Attributes:
        measure: ``utility`` (gain), ``words``, ``kl``, or a name in :mod:`trimtab.compare.measures`.
        beyond: what the difference must exceed, in the measure's unit and towards the better side. Negative for "is
            worse by no more than".
    """

    text: str
    world: str
    measure: str
    better: Literal["higher", "lower"]
    ours: Arm
    theirs: Arm | None
    beyond: float = 0.0
    budget: Budget = Budget()

    @property
    def arms(self) -> list[Arm]:
        return [self.ours, *([self.theirs] if self.theirs else [])]

    def trial(self, arm: Arm, rate: float, seed: int) -> Trial:
        return Trial(self.world, world(self.world), arm.method, rate, seed, dict(arm.options), self.budget)

    def value(self, result: Result) -> float:
        """The measure of one trial."""
        if self.measure == "utility":
            return gain(result)
        found = result["measures"]
        return float(found[self.measure]) if self.measure in found else mean_of(self.measure)(result)


@dataclass(frozen=True)
class Verdict:
    """A promise, what was found, and what follows."""

    promise: Promise
    ours: float
    theirs: float
    difference: Interval  # ours - theirs, over seeds
    p: float  # that it is ``beyond``
    says: str


def judge(promise: Promise, ours: Sequence[Result], theirs: Sequence[Result]) -> Verdict:
    """Compare the two arms seed by seed; ``theirs`` is empty where the start model is what is compared with."""
    failed = [r["failed"] for r in (*ours, *theirs) if "failed" in r]
    if failed:
        return Verdict(
            promise, math.nan, math.nan, Interval(math.nan, math.nan, math.nan, 0, ""), 1.0, f"failed: {failed[0]}"
        )
    mine = [promise.value(r) for r in ours]
    other = [promise.value(r) for r in theirs] or [0.0] * len(mine)
    gaps = [a - b for a, b in zip(mine, other, strict=True)]
    found, sign = mean_interval(gaps), 1 if promise.better == "higher" else -1
    worst, best = sorted((sign * found.low, sign * found.high))
    says = "holds" if worst > promise.beyond else "does not hold" if best < promise.beyond else "not shown"
    p = p_value([sign * g - promise.beyond for g in gaps])
    return Verdict(promise, sum(mine) / len(mine), sum(other) / len(other), found, p, says)


LONG = replace(Budget(), steps=192)
EPOCH = replace(Budget(), steps=32)  # every pair once; two chunks are then the halves of the epoch
SDPO = Arm("dpo", {"reference_every": 16})
PAFT, IN_TURN = Arm("dpo", {"merged_with": "sft"}), Arm("dpo", {"after": "sft"})
DPO, SFT, KTO, BCO, TODO = Arm("dpo"), Arm("sft"), Arm("kto"), Arm("bco"), Arm("todo")
MATCHED = Arm("bco", {"match_prompts": "tfidf"})
WEIGHTED = Arm("kto", {"balance": "paper"})
BETA, IPO = Arm("beta_dpo"), Arm("ipo")
ONCE = replace(Budget(), steps=32)  # in rounds: every judged answer is learned from once
COUPLES = replace(ONCE, prompts=512, answers=2)  # on file and in rounds the same pairs: two answers to every prompt
ROUNDS_DPO = Arm("dpo", {"rounds": 8})
RLOO, PPO = Arm("rloo", {"rounds": 32}), Arm("ppo", {"rounds": 32})
NOISY = "plain,temperature=3"
PROMISES = (
    Promise("tells ties from wins better than DPO", "ties", "tie_auc", "higher", TODO, DPO),
    Promise("is no worse than DPO without ties", "plain", "utility", "higher", TODO, DPO, beyond=-0.1),
    Promise("beats its unmatched form under prompt shift", "shift", "utility", "higher", MATCHED, BCO),
    Promise("beats KTO under prompt shift", "shift", "utility", "higher", MATCHED, KTO),
    Promise("is no worse than its unmatched form without shift", "plain", "utility", "higher", MATCHED, BCO, beyond=-0.1),
    Promise("gains with a tenth of the thumbs up, by its weight rule", "few-up", "utility", "higher", WEIGHTED, None),
    Promise("gains more by its weight rule with a tenth of the thumbs up", "few-up", "utility", "higher", WEIGHTED, KTO),
    Promise("keeps the chosen log-prob from falling on small edits", "edits", "train_chosen_shift", "higher", Arm("dpop"), None),
    Promise("keeps it higher than DPO does", "edits", "train_chosen_shift", "higher", Arm("dpop"), DPO),
    Promise("beats DPO at 20 % flipped labels", "flips20", "utility", "higher", BETA, DPO),
    Promise("beats DPO at 40 % flipped labels", "flips40", "utility", "higher", BETA, DPO),
    Promise("keeps a smaller margin than DPO on sure preferences", "sure", "train_margin", "lower", IPO, DPO, budget=LONG),
    Promise("answers more briefly than DPO under a length-biased judge", "length", "words", "lower", Arm("r_dpo"), DPO),
    Promise("answers more briefly than DPO under a length-biased judge", "length", "words", "lower", Arm("simpo"), DPO),
    Promise("lowers the rejected log-prob", "plain", "rejected_shift", "lower", Arm("orpo"), None),
    Promise("lowers it where SFT does not", "plain", "rejected_shift", "lower", Arm("orpo"), SFT),
    Promise("answers better after its good token than after its bad one", "plain", "good_minus_bad", "higher", Arm("csft"), None),
    Promise("stays closer to the start than DPO", "plain", "kl", "lower", Arm("tdpo2"), DPO),
    Promise("gains no less than DPO", "plain", "utility", "higher", Arm("tdpo2"), DPO, beyond=-0.1),
    Promise("as sDPO in two stages gains more than DPO in one", "plain", "utility", "higher", SDPO, DPO, budget=EPOCH),
    Promise("as PAFT keeps winning answers likelier than SFT then DPO", "plain", "chosen_shift", "higher", PAFT, IN_TURN),
    Promise("as PAFT gains no less than SFT then DPO", "plain", "utility", "higher", PAFT, IN_TURN, beyond=-0.1),
    Promise("gains on the judge's own scores", "plain", "utility", "higher", Arm("dro"), None),
    Promise("in rounds beats the same pairs of the start model", "plain", "utility", "higher", ROUNDS_DPO, DPO, budget=COUPLES),
    Promise("in rounds gains", "plain", "utility", "higher", RLOO, None, budget=ONCE),
    Promise("in rounds gains", "plain", "utility", "higher", PPO, None, budget=ONCE),
    Promise("gains no less than PPO under noisy scores", NOISY, "utility", "higher", RLOO, PPO, beyond=-0.1, budget=ONCE),
)  # fmt: skip
