"""The only forward pass that learns: (model, examples) -> log-probabilities of every completion token.

The model's own ``forward`` gets one more keyword, ``trimtab=Layout``, under which it returns token log-probs instead of
logits. That way whatever wraps the model (DDP, FSDP, peft) sees an ordinary forward call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.errors import ModelError
from trimtab.logprobs import attention
from trimtab.logprobs.chunk import token_logps
from trimtab.logprobs.layout import Layout, Mode, cost, lay_out
from trimtab.logprobs.scored import Completions
from trimtab.tokens.batch import Example, fill

# Model types for which our attention function was shown equal to plain computation (PERF.md, tests/test_layouts.py).
# The check at the start of every run repeats the comparison on the loaded weights.
ON_THE_INTERFACE = frozenset({
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama",
    "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
})  # fmt: skip
STOCK = "_trimtab_stock_attention"  # what the model attended with before: not every model has sdpa
ROWS_OTHER_HEAD = 256  # rows per chunk where the head is not a plain linear layer


def base_model(model: nn.Module) -> Any:
    """The transformers model inside whatever wraps it (DDP, peft)."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def install(model: nn.Module, precision: torch.dtype, mode: Mode) -> None:
    """Teach ``model.forward`` the keyword ``trimtab`` and, where the layout needs it, set our attention function."""
    base = base_model(model)
    uninstall(model)
    plain = model.forward

    def forward(*args: Any, trimtab: Layout | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if trimtab is None else _completion_logps(base, trimtab, precision)

    model.forward = forward
    if mode != "padded":
        setattr(base, STOCK, base.config._attn_implementation)
        base.set_attn_implementation(attention.NAME)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`: the model is again what transformers loaded."""
    vars(model).pop("forward", None)
    base = base_model(model)
    if base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation(getattr(base, STOCK))


@contextmanager
def uninstalled(model: nn.Module) -> Iterator[None]:
    """The model as transformers loaded it while this lasts: to copy it, to save it."""
    forward, attending = vars(model).get("forward"), base_model(model).config._attn_implementation
    uninstall(model)
    try:
        yield
    finally:
        if forward is not None:
            model.forward = forward
        if attending == attention.NAME:
            base_model(model).set_attn_implementation(attending)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Stock attention for generation and for plain forward calls; ours again afterwards."""
    base = base_model(model)
    ours = base.config._attn_implementation == attention.NAME
    if ours:
        base.set_attn_implementation(getattr(base, STOCK))
    try:
        yield
    finally:
        if ours:
            base.set_attn_implementation(attention.NAME)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no graph, as every number that is not trained must be computed."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()


def _completion_logps(base: Any, layout: Layout, precision: torch.dtype) -> Tensor:
    """[N] log-probs of the completion tokens of one laid-out microbatch."""
    decoder = getattr(base, base.base_model_prefix)
    low = precision in (torch.bfloat16, torch.float16)
    extra = {"trimtab_blocks": layout.blocks} if layout.blocks else {"attention_mask": layout.attention_mask}
    with torch.autocast(layout.input_ids.device.type, dtype=precision if low else None, enabled=low):
        hidden = decoder(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **extra
        ).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, layout.predict)
    if low:
        hidden = hidden.to(precision)
    head, (scale, softcap) = base.get_output_embeddings(), _logit_shape(base.config)
    if type(head) is nn.Linear:
        return token_logps(hidden, head.weight, layout.target, bias=head.bias, scale=scale, softcap=softcap)
    # a head with an adapter or a trained copy (peft): rows at a time, recomputed in the backward
    parts = zip(hidden.split(ROWS_OTHER_HEAD), layout.target.split(ROWS_OTHER_HEAD), strict=True)
    with torch.autocast(hidden.device.type, dtype=precision if low else None, enabled=low):
        return torch.cat([checkpoint(_other_head, head, h, t, scale, softcap, use_reentrant=False) for h, t in parts])


def _other_head(head: nn.Module, hidden: Tensor, target: Tensor, scale: float, softcap: float) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def _logit_shape(config: Any) -> tuple[float, float]:
    """(scale, soft-cap) that the model applies to its logits."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, float(getattr(config, "final_logit_softcapping", None) or 0.0)


@dataclass
class Scorer:
    """Scores examples with one model in one layout and one precision, cut into microbatches of a token budget.

    Args:
        model: on which :func:`install` was called; may be wrapped since (DDP).
        mode: layout, see :mod:`trimtab.logprobs.layout`.
        budget: tokens per forward pass.
    """

    model: nn.Module
    mode: Mode
    budget: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def microbatches(self, examples: Sequence[Example]) -> list[list[int]]:
        """Indices of the examples, cut so that each part fits the budget."""
        return fill([cost(e, self.mode) for e in examples], self.budget)

    def score(self, examples: Sequence[Example], model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """([N] token log-probs, [B] lengths) of one microbatch, with a graph where gradients are on."""
        layout = lay_out(examples, self.mode).to(self.device)
        return (model or self.model)(trimtab=layout), layout.length

    def score_all(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The same for any number of examples, without a graph and with dropout off."""
        if not examples:
            empty = torch.zeros(0, device=self.device)
            return empty, empty.long()
        with evaluating(self.model):
            parts = [self.score([examples[i] for i in part]) for part in self.microbatches(examples)]
        logps, lengths = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(lengths)

    def completions(self, examples: Sequence[Example]) -> Completions:
        """Policy log-probs alone, as an objective would see them."""
        return Completions(*self.score_all(examples))


# --- does the layout hold for this model? -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutChoice:
    """The layout that a run uses, and why it is not a faster one."""

    mode: Mode
    fallback: str | None
    detail: str


def choose_layout(
    model: nn.Module, examples: Sequence[Example], asked: Mode | str = "auto", token_tolerance: float | None = None
) -> LayoutChoice:
    """Pick the fastest layout whose log-probs and gradient equal the model's own plain forward pass on these examples.

    Nothing tells when a layout is wrong for an architecture: the numbers look plausible. So every run compares.
    """
    base = base_model(model)
    kind = base.config.model_type
    ladder: list[Mode] = ["shared", "packed", "padded"] if asked == "auto" else [asked]  # type: ignore[list-item]
    why: list[str] = []
    if kind not in ON_THE_INTERFACE and "padded" not in ladder[:1]:
        why.append(f'model type "{kind}" is not known to keep packed completions apart')
        ladder = [m for m in ladder if m == "padded"]
    tolerance = token_tolerance or {torch.float64: 1e-9, torch.float32: 1e-3}.get(base.dtype, 0.25)
    for mode in ladder:
        try:
            worst, gradient = _compare(model, examples, mode)
        except ModelError as e:
            why.append(f"{mode}: {e}")
            continue
        ok = worst <= tolerance and gradient <= 100 * tolerance
        detail = (
            f"{mode} = plain forward on {len(examples)} rows: largest difference {worst:.1e} nats per token, "
            f"relative gradient difference {gradient:.1e}"
        )
        if ok:
            return LayoutChoice(mode, "; ".join(why) or None, detail)
        why.append(f"{detail} (allowed {tolerance:.0e})")
    raise ModelError(
        f'No layout gives this model\'s own log-probs (model type "{kind}"): {"; ".join(why)}. '
        "Report the model type; until then this model cannot be trained safely."
    )


def _compare(model: nn.Module, examples: Sequence[Example], mode: Mode) -> tuple[float, float]:
    """Largest |log-prob difference| and relative gradient difference of a layout against the plain forward pass."""
    training = model.training
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    try:
        uninstall(model)
        plain = torch.cat([_plain(model, e) for e in examples])
        expected = torch.autograd.grad(plain.sum(), weights, allow_unused=True) if weights else ()
        install(model, base_model(model).dtype, mode)
        layout = lay_out(examples, mode).to(plain.device)
        ours = model(trimtab=layout)
        got = torch.autograd.grad(ours.sum(), weights, allow_unused=True) if weights else ()
    finally:
        uninstall(model)
        model.train(training)
    difference = norm = 0.0
    for a, b in zip(expected, got, strict=True):
        if a is not None:
            norm += a.double().pow(2).sum().item()
            difference += (a - (b if b is not None else 0)).double().pow(2).sum().item()
    return (ours - plain).abs().max().item(), (difference / max(norm, 1e-30)) ** 0.5


def _plain(model: nn.Module, example: Example) -> Tensor:
    """The model's own logits, one completion at a time: slow, obvious, right."""
    device = next(model.parameters()).device
    parts = []
    for c in example.completions:
        ids = torch.tensor([[*example.prompt, *c]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts.append(logits.log_softmax(-1).gather(1, ids[0, len(example.prompt) :, None])[:, 0])
    return torch.cat(parts)
