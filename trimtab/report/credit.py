"""Which token earned what: the implicit reward of each token of each answer, as numbers and as a page in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.report.text import inert, number, visible
from trimtab.tokens.batch import Example
from trimtab.tokens.show import spans
from trimtab.tokens.template import sides

SHOWN = 50  # records on the page


@dataclass(frozen=True)
class Credit:
    """An answer, cut into pieces of text, and the reward of each in nats; they add up to ``reward``."""

    side: str
    pieces: tuple[str, ...]
    rewards: tuple[float, ...]

    @property
    def reward(self) -> float:
        return sum(self.rewards)


def credits(example: Example, rewards: Sequence[Sequence[float]], tokenizer: Any) -> Iterator[Credit]:
    """One per completion; ``rewards[k][t]`` belongs to token t of completion k. Tokens that are parts of one character
    are one piece, and their rewards are added."""
    for side, ids, values in zip(sides(example), example.completions, rewards, strict=True):
        cut = list(spans(ids, tokenizer))
        yield Credit(side, tuple(text for text, _, _ in cut), tuple(sum(values[a:b]) for _, a, b in cut))


def credit_page(rows: Sequence[tuple[Example, Sequence[Credit]]], tokenizer: Any, **about: Any) -> str:
    """One HTML page without scripts. ``about``: policy, reference and beta, both None for a reward model."""
    shown = rows[:SHOWN]
    sizes = sorted(abs(r) for _, answers in shown for c in answers for r in c.rewards)
    full = sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0  # a few large ones would leave the rest pale
    page = Environment(
        loader=PackageLoader("trimtab.report", "."), autoescape=True, finalize=inert, undefined=StrictUndefined
    )
    told = [
        {
            "origin": str(example.record.origin),
            "prompt": visible(tokenizer.decode(list(example.prompt))),
            "answers": [
                {
                    "side": c.side,
                    "reward": number(c.reward),
                    "pieces": [
                        (visible(p), number(r), _colour(r, full)) for p, r in zip(c.pieces, c.rewards, strict=True)
                    ],
                }
                for c in answers
            ],
        }
        for example, answers in shown
    ]
    return page.get_template("credit.html.j2").render(
        rows=told, full=number(full), shown=len(shown), total=len(rows), **about
    )


def _colour(reward: float, full: float) -> str:
    strength = min(abs(reward) / full, 1.0) if full else 0.0
    return f"rgba({'38,160,83' if reward > 0 else '214,60,60'},{0.75 * strength:.2f})"
