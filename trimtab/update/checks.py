"""Invariants on the user's own run before the first step. A failed check stops the run and says why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimtab.errors import CheckFailed
from trimtab.logprobs.reference import sequence_tolerance
from trimtab.logprobs.scored import Completions
from trimtab.tokens.batch import Example
from trimtab.update.trainer import Update


@dataclass(frozen=True)
class Check:
    """The outcome of one check, as the run card tells it."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def policy_equals_reference(trainer: Update, examples: list[Example], precision: torch.dtype) -> Check:
    """At step 0 the policy is the reference: log-ratios are 0, and the loss is the method's closed form there.

    The closed form is the objective's own loss with the policy's log-probs replaced by the reference's; the tests tie
    that to the constants of the papers (ln 2 for DPO, ...). The tolerance is what this precision was measured to do.
    """
    name, tolerance = "policy equals reference at step 0", sequence_tolerance(precision)
    logps, lengths = trainer.scorer.score_all(examples)
    refs = torch.cat([r for r in trainer._reference_logps(examples) if r is not None]).to(logps)
    y = Completions(logps, lengths, refs)
    worst = y.log_ratio.abs().max().item()
    unmatched = y.with_policy(refs) if "mismatched" in trainer.objective.needs else None
    at_reference = trainer._view(y.with_policy(refs), examples, unmatched)
    expected = float(trainer.objective.loss(at_reference).sum() / trainer.objective.size(at_reference).sum())
    found = trainer._view(y, examples, unmatched)
    loss = float(trainer.objective.loss(found).sum() / trainer.objective.size(found).sum())
    detail = (
        f"largest |log-ratio| {worst:.2g} nats (allowed {tolerance:.2g}); loss {loss:.6g}, closed form {expected:.6g}"
    )
    if not worst <= tolerance:
        assert trainer.reference is not None
        raise CheckFailed(
            f"{name}: {detail}. The reference is: {trainer.reference.identity}. Either it is another model than the policy "
            "starts from, or one of the two is scored in another precision or layout, or dropout is on."
        )
    return Check(name, True, detail)
