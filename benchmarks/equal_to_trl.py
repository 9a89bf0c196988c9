"""DPO here and in TRL 1.16 give the same loss and the same gradient on one HH batch (4 pairs, float32, SmolLM2).

    python benchmarks/equal_to_trl.py

Checked twice: where policy = reference (loss log 2), and with the policy moved off the reference by seeded noise, where
the loss depends on all four log-probs. Gradient: within 5e-5 of its norm. Loss: within 1e-6 of each other where policy =
reference; where it moved, each within 1e-6 of the same loss in plain float64, because there the difference of the two is
float32's own (1.5e-6 when this was written: ours 6e-7 above the float64 value, TRL's 9e-7 below). Exit code 1 where not.
The "+cp" patch that vs_trl.py applies to TRL is checked to change neither loss nor gradient.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from against_trl import completions_only, trl_trainer
from engine import frozen_reference, hh_examples, load, run_config, trimtab_trainer

from trimtab.logprobs.score import _plain

LOSS, GRADIENT, SEED, PAIRS = 1e-6, 5e-5, 0, 4


def main() -> int:
    torch.manual_seed(SEED)
    folder = Path(tempfile.mkdtemp(prefix="equal-to-trl-"))
    config = run_config(PAIRS, SEED, precision="float32")
    examples = hh_examples(run_config(limit=64))
    batch = [examples[i] for i in torch.randperm(len(examples))[:PAIRS].tolist()]
    told_tokens(batch)
    good = True
    for name, noise in (("policy = reference", 0.0), ("policy moved", 0.02)):
        theirs = trl(noise, batch, folder)
        good &= compare(name, trimtab(config, noise, batch, folder), theirs, exact(noise, batch) if noise else None)
    with completions_only():
        good &= compare("policy moved, TRL +cp against TRL", trl(noise, batch, folder), theirs)
    print("equal" if good else "NOT EQUAL")
    return 0 if good else 1


def policy_of(noise: float) -> Any:
    """The model with every weight matrix off by ``noise`` of its own standard deviation."""
    model = load()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=generator) * (noise * p.std()))
    return model


def told_tokens(batch: list[Any]) -> None:
    """How TRL would have tokenised the rows itself: said, not compared; both sides get trimtab's ids."""
    from trimtab.models import load_tokenizer

    tokenizer, same, shorter = load_tokenizer("smollm2"), 0, 0
    for e in batch:
        prompt = [{"role": m.role, "content": m.content} for m in e.record.prompt]
        for ids, text in zip(e.completions, e.record.completions, strict=True):
            whole = [*prompt, {"role": "assistant", "content": text}]
            theirs = list(tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"])
            same += theirs == [*e.prompt, *ids]
            shorter += theirs[:-1] == [*e.prompt, *ids]
    print(
        f"{len(batch)} pairs, {sum(e.tokens for e in batch)} tokens. Of {2 * len(batch)} sequences TRL's own tokenisation "
        f"equals ours in {same}, and has one token more (the template's line break after the end token) in {shorter}."
    )


def trl(noise: float, batch: list[Any], folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = policy_of(noise)
    options = {"bf16": False, "gradient_checkpointing": False}
    trainer = trl_trainer(model, batch, folder / "trl", batch_size=PAIRS, ref_model=load(), **options)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
    model.train()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item(), gradients(model)


def trimtab(config: Any, noise: float, batch: list[Any], folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    start = load()
    trainer = trimtab_trainer(config, start, batch, folder / "trimtab")
    trainer.reference = frozen_reference(trainer, torch.float32)
    start.load_state_dict(policy_of(noise).state_dict())
    loss = trainer.training_step(start, batch)
    return loss.item(), gradients(start)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradient, and nothing else of the model left in memory."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad, p.data = None, torch.empty(0)
    gc.collect()
    return found


def exact(noise: float, batch: list[Any]) -> float:
    """The loss in float64, from the model's own logits, one sequence at a time."""

    def logps(model: Any) -> torch.Tensor:
        model.double()
        with torch.no_grad():
            sums = [p.sum() for e in batch for p in _plain(model, e).split([len(c) for c in e.completions])]
        return torch.stack(sums).view(-1, 2)

    ratio = logps(policy_of(noise)) - logps(load())
    return -torch.nn.functional.logsigmoid(run_config().objective().beta * (ratio[:, 0] - ratio[:, 1])).mean().item()


def compare(name: str, ours: tuple[float, Any], theirs: tuple[float, Any], exact: float | None = None) -> bool:
    (a, g), (b, h) = ours, theirs
    norm = sum(t.double().pow(2).sum().item() for t in h.values()) ** 0.5
    off = sum((g[n].double() - h[n].double()).pow(2).sum().item() for n in g.keys() & h.keys()) ** 0.5 / norm
    gaps = [a - b] if exact is None else [a - exact, b - exact]
    good = g.keys() == h.keys() and max(map(abs, gaps)) <= LOSS and off <= GRADIENT
    told = "" if exact is None else f"; from float64's {exact:.8f} they are off by {gaps[0]:.1e} and {gaps[1]:.1e}"
    print(
        f"{name}: loss {a:.8f} and {b:.8f}, difference {abs(a - b):.1e}{told} (allowed {LOSS:.0e}); gradient norm "
        f"{norm:.4g}, relative difference {off:.1e} (allowed {GRADIENT:.0e}), {len(g)} tensors: {'good' if good else 'BAD'}",
        flush=True,
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
