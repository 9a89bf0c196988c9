"""The world's judge as one that is asked about answers while they are written: the same score, the same noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from trimtab.errors import ConfigError
from trimtab.judges.base import Judge, Judgement, Kind, Question, Scores
from trimtab.world.judge import Judge as WorldJudge


@dataclass
class AskedJudge(Judge):
    """Scores ``z = s + temperature * Gumbel noise``; the larger z of two wins as in :meth:`trimtab.world.judge.Judge.pairs`.

    Args:
        world: whose score, length bias and temperature count. What it does to pairs and thumbs afterwards (ties, flips, edits,
            prompts without thumbs) cannot be done to scores: :class:`ConfigError`.
        seed: of the noise, which is a function of the seed, the prompt and the answer.
    """

    world: WorldJudge
    seed: int

    def __post_init__(self) -> None:
        plain = WorldJudge(temperature=self.world.temperature, length_bias=self.world.length_bias)
        if self.world != plain:
            more = [f"{k}={v}" for k, v in asdict(self.world).items() if v != asdict(plain)[k]]
            raise ConfigError(
                f"rounds ask the world's judge for scores, and {', '.join(more)} is done to pairs or thumbs. Choose a world that "
                "differs in temperature or length_bias alone."
            )

    @property
    def kind(self) -> Kind:
        return "pointwise"

    @property
    def identity(self) -> str:
        return json.dumps(["controlled world", asdict(self.world), self.seed])

    def judgements(self, questions: Sequence[Question]) -> Iterator[Judgement]:
        for q in questions:
            yield Scores(tuple(self.felt(q.prompt[-1].content, answer) for answer in q.completions))

    def felt(self, prompt: str, answer: str) -> float:
        """z."""
        noise = np.random.default_rng([self.seed, *prompt.encode(), 0, *answer.encode()])
        return float(self.world.score(prompt, answer) + self.world.temperature * noise.gumbel())
