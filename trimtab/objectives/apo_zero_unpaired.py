"""APO-zero on single answers: good ones up, bad ones down, without a reference point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.logprobs.scored import Thumbs
from trimtab.objectives.kto import KTO


@dataclass(frozen=True)
class APOZeroUnpaired(KTO):
    """KTO with its reference point held at 0: an answer is good or bad relative to the reference model itself.

    r = beta log pi(y|x)/pi_ref(y|x)
    L = lambda_D (1 - sigma(r)) if desirable, lambda_U sigma(r) if not
    """

    needs = frozenset({"reference"})
    paper = "arXiv:2408.06266"
    use = "Thumbs whose good answers beat what the model would say; or small batches, where KTO's z0 is noise."
    avoid = "The model already answers better than the good answers: they would drag it down to their level."
    differs = (
        "The paper has pairs only; the form for single answers is TRL's. It saves KTO's pass over mismatched rows."
    )

    def baseline(self, batch: Thumbs) -> Tensor:
        return torch.zeros(())

    def metrics(self, batch: Thumbs) -> dict[str, Tensor]:
        return {}
