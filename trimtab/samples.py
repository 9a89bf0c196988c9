"""Answers before and after training: what changed, by how much, and how far the policy has moved from its start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from trimtab.feedback.records import Demonstration, Message
from trimtab.logprobs.reference import adapter_off
from trimtab.logprobs.score import Scorer, install
from trimtab.models import grow_vocabulary, load_model
from trimtab.online.sample import sample, sampler
from trimtab.prepare import Prepared
from trimtab.report import mean_interval, paired_gain
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template

Reward = Callable[[str, str], float]  # (prompt, answer) -> the true reward, where it is known


@dataclass
class Probe:
    """A fixed set of prompts that is answered before and after training with the same seed.

    Args:
        test_prompts: texts to answer instead of held-out prompts of the data.
    """

    template: Template
    data: InitVar[Prepared]
    count: InitVar[int]
    max_new_tokens: int
    seed: int
    precision: torch.dtype
    test_prompts: InitVar[Sequence[str]] = ()
    prompts: list[tuple[str, tuple[int, ...]]] = field(init=False)  # text, token ids

    def __post_init__(self, data: Prepared, count: int, test_prompts: Sequence[str]) -> None:
        ids = self.template.prompt_ids
        self.prompts = [(p, tuple(ids((Message("user", p),)))) for p in test_prompts]
        if not test_prompts:
            distinct = list({e.prompt: e for e in data.held_out or data.train}.values())
            asked = [tuple(ids(e.record.prompt)) if self.template.opened else e.prompt for e in distinct[:count]]
            self.prompts = [(self.template.tokenizer.decode(list(p)), p) for p in asked]

    def answer(self, model: Any) -> list[tuple[int, ...]]:
        """Token ids of one sampled answer per prompt."""
        if not self.prompts:
            return []
        with sampler(model, self.precision) as writer:
            found = sample(
                writer,
                self.template.tokenizer,
                [ids for _, ids in self.prompts],
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
            )
        return [answer.ids for (answer,) in found]

    def compare(
        self, before: Sequence[tuple[int, ...]], after: Sequence[tuple[int, ...]], reward: Reward | None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(rows for the report, intervals of lengths in tokens and of the true reward where it is known)."""
        rows: list[dict[str, Any]] = [
            {"prompt": p, "before": self._text(b), "after": self._text(a)}
            for (p, _), b, a in zip(self.prompts, before, after, strict=True)
        ]
        found = {
            "length_before": interval([len(b) for b in before]),
            "length_after": interval([len(a) for a in after]),
        }
        if reward:
            for row in rows:
                row |= {f"reward_{when}": reward(row["prompt"], row[when]) for when in ("before", "after")}
            old, new = [r["reward_before"] for r in rows], [r["reward_after"] for r in rows]
            found |= {
                "reward_before": interval(old),
                "reward_after": interval(new),
                "reward_name": reward.__doc__ or "",
            }
            if len(rows) > 1:
                found["reward_gain"] = paired_gain(old, new).to_json()
        return rows, found

    def kl(self, after: Sequence[tuple[int, ...]], scorer: Scorer, start: str) -> Any:
        """KL(policy || start) in nats per answer: the mean log-ratio of the policy's own samples (estimator k1).

        ``start``: the name of the model that training started from; loaded where it is not under the adapter.
        """
        examples = [Example(ids, (a,), Demonstration((), "")) for (_, ids), a in zip(self.prompts, after, strict=True)]
        policy, lengths = scorer.score_all(examples)
        if hasattr(scorer.model, "disable_adapter"):
            with adapter_off(scorer.model):
                first = scorer.score_all(examples)[0]
        else:
            model = load_model(start, dtype=next(scorer.model.parameters()).dtype).to(policy.device)
            grow_vocabulary(model, len(self.template.tokenizer))
            install(model, self.precision, scorer.mode)
            first = Scorer(model, scorer.mode, scorer.budget).score_all(examples)[0]
        return interval([part.sum().item() for part in (policy - first).split(lengths.tolist())])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.template.tokenizer.decode(list(ids), skip_special_tokens=True))


def interval(values: Sequence[float]) -> Any:
    """Mean with its t interval as JSON, or None for fewer than two values."""
    return mean_interval(list(values)).to_json() if len(values) > 1 else None
