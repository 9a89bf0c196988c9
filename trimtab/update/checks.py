"""Invariants on the user's own run before the first step. A failed check stops the run and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trimtab.errors import CheckFailed
from trimtab.logprobs.reference import sequence_tolerance
from trimtab.tokens.batch import Example
from trimtab.update.trainer import Update

BATCHED = 1e-4  # part of a score by which float32 may differ between a batch and a text alone


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
    Where answers are yet to be sampled there is no loss; the log-ratios are those of any text.
    """
    name, tolerance = "policy equals reference at step 0", sequence_tolerance(precision)
    y = trainer.scored(examples)
    refs = y.ref_token_logps
    worst = y.log_ratio.abs().max().item()
    detail = f"largest |log-ratio| {worst:.2g} nats (allowed {tolerance:.2g})"
    if trainer.rounds is None:
        unmatched = y.with_policy(refs) if "mismatched" in trainer.objective.needs else None
        at_reference = trainer._view(y.with_policy(refs), examples, unmatched)
        expected = float(trainer.objective.loss(at_reference).sum() / trainer.objective.size(at_reference).sum())
        found = trainer._view(y, examples, unmatched)
        loss = float(trainer.objective.loss(found).sum() / trainer.objective.size(found).sum())
        detail += f"; loss {loss:.6g}, closed form {expected:.6g}"
    if not worst <= tolerance:
        assert trainer.reference is not None
        raise CheckFailed(
            f"{name}: {detail}. The reference is: {trainer.reference.identity}. Either it is another model than the policy "
            "starts from, or one of the two is scored in another precision or layout, or dropout is on."
        )
    return Check(name, True, detail)


def scores_stand_alone(folder: Path, examples: Sequence[Example], scores: Tensor, precision: torch.dtype) -> Check:
    """The saved reward model in plain transformers: each text alone, in a batch padded at the right, and at the left.

    ``scores``: [B] what the run itself gives these completions, in its own precision.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = (
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(scores.device).eval()
    )
    texts = [[*e.prompt, *c] for e in examples for c in e.completions]

    def score(batch: list[list[int]], side: str = "right", count: bool = False) -> Tensor:
        padded = tokenizer.pad({"input_ids": batch}, padding_side=side, return_tensors="pt").to(scores.device)
        if count:
            padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found: Tensor = model(**padded).logits[:, 0]
        return found

    alone = torch.cat([score([text]) for text in texts])
    scale, note = alone.abs().max().clamp(min=1), ""
    apart = {side: float((score(texts, side) - alone).abs().max() / scale) for side in ("right", "left")}
    if apart["left"] > BATCHED >= apart["right"]:  # positions that the model counts from the left edge
        apart["left"] = float((score(texts, "left", count=True) - alone).abs().max() / scale)
        note = "; padded at the left it needs position_ids"
    worst, own = max(apart.values()), float((scores.to(alone) - alone).abs().max() / scale)
    allowed = 0.25 if precision in (torch.bfloat16, torch.float16) else 10 * BATCHED
    detail = (
        f"{len(texts)} texts in one batch, padded at the right or at the left, differ from each alone by at most {worst:.1e} "
        f"of the largest score (allowed {BATCHED:g}); from the run's own scores by {own:.1e} (allowed {allowed:g}){note}"
    )
    return Check("scores of the saved model do not depend on the batch", worst <= BATCHED and own <= allowed, detail)
