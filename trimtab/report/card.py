"""The card of a method, generated from its class: nothing on it can disagree with the code."""

from __future__ import annotations

import dataclasses
from typing import Any

from trimtab.logprobs.scored import EXTRAS, Demonstrations, Pairs, Rankings, Rollouts, Scores, Solutions, Thumbs
from trimtab.objectives.base import Objective

SHAPES = {
    Pairs: ("preference", "preference", "pair"),
    Rankings: ("preference", "preference", "list"),
    Thumbs: ("pointwise", "binary", "single"),
    Scores: ("pointwise", "score", "single"),
    Solutions: ("pointwise", "binary", "single"),
    Demonstrations: ("pointwise", "demonstration", "single"),
    Rollouts: ("pointwise", "score", "list"),
}
NEEDS = {
    "reference": "log pi_ref of every token (copy, switched-off adapter, or cache)",
    "mismatched": "answers of the batch after other rows' prompts",
    "greedy": "the score of the greedy answer to each prompt",
    **EXTRAS,
}
GLOSSARY = {
    "rewards/chosen": "mean implicit reward of preferred (desirable) answers, in the method's own unit",
    "rewards/rejected": "the same of the others",
    "rewards/margins": "mean difference of the two",
    "rewards/accuracies": "share of pairs whose preferred answer has the strictly higher reward; ties are left out",
    "logps/accuracies": "the same by the policy's mean log-prob alone: comparable before and after",
    "logps/chosen": "summed log-prob of preferred answers, nats",
    "logps/rejected": "summed log-prob of the others, nats",
    "length/chosen": "tokens of preferred answers",
    "length/rejected": "tokens of the others",
}


def axes(cls: type[Objective]) -> dict[str, str]:
    """Where the method lies on the thirteen axes of the alignment survey (arXiv:2407.16216, table 1)."""
    reward, feedback, shape = SHAPES[cls.feedback]
    referenced, sampled = "reference" in cls.needs, cls.feedback is Rollouts
    return {
        "reward": "explicit" if sampled or {"value", "score"} & cls.needs else "implicit",
        "reward of": reward,
        "level": cls.level,
        "negatives only": _yes(cls.negatives_only),
        "feedback": feedback,
        "answers": shape,
        "labels from": "people or models",
        "reference": "based" if referenced else "free",
        "length control": _yes(cls.length_control),
        "divergence": cls.divergence if referenced else "none",
        "policy": "on" if sampled else "off",
        "iterative": _yes(sampled),
        "merged with SFT": _yes(cls.with_sft),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def card(cls: type[Objective]) -> str:
    """Markdown: equation, data, options with their sources, axes, metrics, when to use it and when not."""
    lines = [f"## {cls.name()}", "", "```text", cls.equation(), "```", ""]
    lines += [f"Paper: {cls.paper}. Learns from: {cls.feedback.record.__name__.lower()} ({cls.feedback.__name__})", ""]
    if cls.use:
        lines.append(f"- Use it when: {cls.use}")
    lines.append(f"- Do not use it when: {cls.avoid}")
    if cls.differs:
        lines.append(f"- Differs: {cls.differs}")
    needs = [f"`{n}`: {NEEDS[n]}" for n in sorted(cls.needs)]
    lines.append(f"- Needs: {'; '.join(needs) or 'nothing but the policy'}")
    kept = [w for w, on in (("ties are learned from", cls.ties), ("rows are coupled", cls.coupled)) if on]
    if cls().has_memory():
        kept.append("keeps statistics over steps")
    if kept:
        lines.append(f"- Also: {', '.join(kept)}")
    fields = dataclasses.fields(cls)
    if fields:
        lines += ["", "| option | default | meaning | source of the default |", "|---|---|---|---|"]
        lines += [
            f"| `{f.name}` | {f.default} | {_cell(_meaning(f))} | {_cell(f.metadata['source'])} |" for f in fields
        ]
    lines += ["", "Axes: " + "; ".join(f"{k}: {v}" for k, v in axes(cls).items()) + ".", ""]
    return "\n".join(lines)


def _meaning(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata.get("choices")
    return str(field.metadata["help"]) + (f" ({', '.join(map(str, choices))})" if choices else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page(known: dict[str, type[Objective]]) -> str:
    """docs/methods.md: all cards, a table before them."""
    head = [
        "# Methods",
        "",
        "Written by `python -m trimtab.report.card > docs/methods.md`; a test compares it with the code.",
        "",
        "| method | learns from | reference | level | paper |",
        "|---|---|---|---|---|",
    ]
    for name, cls in known.items():
        place = axes(cls)
        head.append(f"| [{name}](#{name}) | {cls.feedback.record.__name__.lower()} | {place['reference']} | {place['level']} | {cls.paper} |")  # fmt: skip  # noqa: E501
    glossary = ["## Metrics", "", *(f"- `{k}`: {v}" for k, v in GLOSSARY.items()), ""]
    return "\n".join([*head, "", *glossary, *(card(cls) for cls in known.values())])


if __name__ == "__main__":
    from trimtab.objectives import methods

    print(page(methods()), end="")
