"""BCO: binary classifier optimization, for thumbs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Thumbs
from trimtab.objectives.base import option
from trimtab.objectives.bce import BCE

MEANS = {"midpoint": ("desirable", "undesirable"), "running_mean": ("all",)}  # what each shift is the middle of


@dataclass(frozen=True)
class BCO(BCE):
    """Binary cross-entropy of thumbs, its logit shifted to where the bound on DPO's loss is tightest.

    r(y)  = beta log pi(y|x)/pi_ref(y|x)
    delta = (E_D+[r] + E_D-[r]) / 2, moving means without gradient;   w(x) = p(good|x)/p(bad|x), see match_prompts
    L     = -E_D+[log sigma(r - delta)] - E_D-[w(x) log sigma(-(r - delta))]      (equation 11 of the first version)
    """

    shift: str = option(
        "midpoint",
        "delta: middle of the two classes' moving means, or running mean of all rewards",
        source="paper; running_mean: authors' trainer in TRL",
        choices=tuple(MEANS),
    )
    decay: float = option(0.99, "of the classes' means, per step", source="ours; not in the paper", at_least=0, below=1)
    use = "Thumbs, most of all where good and bad answers were given to different prompts (match_prompts)."
    avoid = "You have clean pairs: DPO is what BCO bounds."
    differs = "TRL's delta and loss are means over all rows: the commoner kind decides (running_mean, average: row)."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift != "midpoint" and self.decay != BCO.decay:
            raise ConfigError(f"bco: decay has no effect with shift: {self.shift}. Remove it.")

    def remember(self, batch: Thumbs, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        reward, up = self.reward(batch.y.detach()), batch.desirable
        rows = {"desirable": up, "undesirable": ~up, "all": torch.ones_like(up)}
        seen = memory.get("seen", torch.zeros((), dtype=torch.float64)) + len(up)
        keep = self.decay if self.shift == "midpoint" else 1 - len(up) / seen
        new = {name: reward[rows[name]].mean() for name in MEANS[self.shift] if rows[name].any()}
        # a class that is not in the batch keeps its mean
        return {**memory, **{k: v + keep * (memory.get(k, v) - v) for k, v in new.items()}, "seen": seen}

    def logit(self, batch: Thumbs) -> Tensor:
        return super().logit(batch) - self.delta(batch)

    def delta(self, batch: Thumbs) -> Tensor:
        """One number. A class that was never seen counts with 0, its reward at the reference."""
        means = [batch.memory.get(name, torch.zeros(())).to(batch.y.length) for name in MEANS[self.shift]]
        return torch.stack(means).mean()

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {"delta": self.delta(batch).reshape(1), **self.bound(batch), **super().metrics(batch)}
