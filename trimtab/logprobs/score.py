"""The only forward pass that learns: (model, examples) -> log-probabilities of every completion token.

The model's own ``forward`` gets one more keyword, ``trimtab=Layout``, under which it returns token log-probs instead of
logits. That way whatever wraps the model (DDP, FSDP, peft) sees an ordinary forward call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.logprobs import attention
from trimtab.logprobs.chunk import token_logps
from trimtab.logprobs.critic import NAME as CRITIC
from trimtab.logprobs.critic import critic_of
from trimtab.logprobs.extras import Distribution, Extras, Logits, columns
from trimtab.logprobs.last_layer import Read
from trimtab.logprobs.layout import Kept, Layout, Mode, cost, lay_out, lay_out_after
from trimtab.logprobs.pages import keep_few_kernels, keep_pages
from trimtab.logprobs.products import weights_packed
from trimtab.logprobs.rewritten import restore, rewrite
from trimtab.logprobs.scored import Completions
from trimtab.tokens.batch import Example, fill

# Model types for which our attention function was shown equal to plain computation (PERF.md, tests/test_layouts.py).
# The check at the start of every run repeats the comparison on the loaded weights.
ON_THE_INTERFACE = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "minimax_m2", "ministral3",
    "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
STOCK = "_trimtab_stock_attention"  # what the model attended with before: not every model has sdpa
PRECISION = "_trimtab_precision"
# What a layout is compared on: so many tokens of a prompt and of a completion, the gradient of so many weights.
LONGEST, CHECKED = 512, 2**24
# Token budgets of a pass of the reference before learning: it holds the states of one layer at a time.
BEFOREHAND = 2


def unwrapped(model: nn.Module) -> Any:
    """The model inside DDP and the like; still with peft's adapter around it, where it has one."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def base_model(model: nn.Module) -> Any:
    """The transformers model inside whatever wraps it (DDP, peft)."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def reward_head(model: nn.Module) -> nn.Module | None:
    """What turns a hidden state into a reward, ``score`` in transformers; None for a language model."""
    return getattr(base_model(model), "score", None)


def install(model: nn.Module, precision: torch.dtype, mode: Mode) -> None:
    """Teach ``model.forward`` the keyword ``trimtab`` and, where the layout needs it, set our attention function."""
    base = base_model(model)
    uninstall(model)
    keep_pages()
    keep_few_kernels()
    plain = model.forward
    setattr(base, PRECISION, precision)

    def forward(
        *args: Any, trimtab: Layout | None = None, extras: Extras | None = None, states: bool = False, **kwargs: Any
    ) -> Any:
        if trimtab is None:
            return plain(*args, **kwargs)
        if states:  # not the decoder by itself: under FSDP2 weights are there in the forward of the whole model only
            return _hidden(getattr(base, base.base_model_prefix), trimtab, precision)
        return _completion_logps(base, trimtab, precision, extras)

    model.forward = forward
    rewrite(base)
    if mode != "padded":
        setattr(base, STOCK, base.config._attn_implementation)
        base.set_attn_implementation(attention.NAME)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`: the model is again what transformers loaded."""
    vars(model).pop("forward", None)
    base = base_model(model)
    restore(base)
    if base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation(getattr(base, STOCK))


@contextmanager
def uninstalled(model: nn.Module) -> Iterator[None]:
    """The model as transformers loaded it while this lasts: to copy it, to save it."""
    base = base_model(model)
    forward, attending, critic = vars(model).get("forward"), base.config._attn_implementation, critic_of(base)
    uninstall(model)
    if critic is not None:
        delattr(base, CRITIC)
    try:
        yield
    finally:
        if critic is not None:
            base.add_module(CRITIC, critic)
        if forward is not None:
            model.forward = forward
            rewrite(base)
        if attending == attention.NAME:
            base.set_attn_implementation(attending)


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


@contextmanager
def casts_kept() -> Iterator[None]:
    """Weights that autocast converts are converted once while this lasts, not in every pass. Only for passes that come before
    the weights change, and not for one that learns after one without a graph: not every torch gives its weights one then."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _completion_logps(base: Any, layout: Layout, precision: torch.dtype, extras: Extras | None = None) -> Tensor:
    """[N] log-probs of the completion tokens of one laid-out microbatch; [N, 1 + extras] where extras are asked for.

    A reward model has no log-probs: [N, 2], NaN and its number after each token."""
    if (rewards := reward_head(base)) is not None:
        states = _states(getattr(base, base.base_model_prefix), layout, precision)
        # rounded to 8 bits, two good answers would often have the same reward
        score = rewards(states.to(next(rewards.parameters()).dtype))[:, 0]
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        return torch.stack([torch.full_like(score, torch.nan), score], 1)
    hidden = _hidden(getattr(base, base.base_model_prefix), layout, precision)
    if extras is not None:
        found = columns(hidden, layout.target, logits_of(base, precision), extras)
        if not extras.value:
            return found
        critic = critic_of(base)
        assert critic is not None
        states = hidden.detach() if critic.trunk is None else _hidden(critic.trunk, layout, precision)
        return torch.cat([found, critic(states)[:, None].to(found.dtype)], 1)
    head, (scale, softcap) = base.get_output_embeddings(), _logit_shape(base.config)
    if (
        type(head).forward is nn.Linear.forward
    ):  # FSDP2 makes subclasses that change nothing; others may compute otherwise
        return token_logps(hidden, head.weight, layout.target, bias=head.bias, scale=scale, softcap=softcap)
    # a head with an adapter or a trained copy (peft): rows at a time, recomputed in the backward
    return columns(hidden, layout.target, logits_of(base, precision), Extras(()))[:, 0]


def _hidden(decoder: nn.Module, layout: Layout, precision: torch.dtype) -> Tensor:
    """[N, H] the hidden states that predict the completion tokens, in the precision of the head's product."""
    hidden = _states(decoder, layout, precision)
    return hidden.to(precision) if precision in (torch.bfloat16, torch.float16) else hidden


def _states(decoder: nn.Module, layout: Layout, precision: torch.dtype) -> Tensor:
    """[N, H] the hidden states that the layout reads, as the decoder gives them."""
    low = precision in (torch.bfloat16, torch.float16)
    extra: dict[str, Any] = {"attention_mask": layout.attention_mask}
    read = Read(layout.predict)
    if layout.blocks:
        extra = {"trimtab_blocks": layout.blocks, "trimtab_read": read}
    if layout.kept is not None:
        extra["trimtab_kept"] = layout.kept
    with torch.autocast(layout.input_ids.device.type, dtype=precision if low else None, enabled=low):
        hidden = decoder(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **extra
        ).last_hidden_state
    return hidden[0] if read.taken else hidden.flatten(0, 1).index_select(0, layout.predict)


def logits_of(base: Any, precision: torch.dtype) -> Logits:
    """hidden states [n, H] -> logits [n, V] as the model would give them, in at least float32."""
    head, (scale, softcap) = base.get_output_embeddings(), _logit_shape(base.config)
    low = precision in (torch.bfloat16, torch.float16)

    def logits(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=precision if low else None, enabled=low):
            found = head(hidden)
        found = found.to(torch.promote_types(found.dtype, torch.float32)) * scale
        return softcap * torch.tanh(found / softcap) if softcap else found

    return logits


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

    @property
    def closed(self) -> bool:
        """Whether the state after the last token is read too: there stands the number of a reward model."""
        return reward_head(self.model) is not None

    def microbatches(self, examples: Sequence[Example], budgets: int = 1) -> list[list[int]]:
        """Indices of the examples, cut so that each part fits so many budgets."""
        return fill([cost(e, self.mode, self.closed) for e in examples], budgets * self.budget)

    def score(self, examples: Sequence[Example], model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """([N] token log-probs, [B] lengths) of one microbatch, with a graph where gradients are on.

        A reward model gives [N, 2]: NaN, and its number after each token."""
        layout = lay_out(examples, self.mode, self.closed).to(self.device)
        return (model or self.model)(trimtab=layout), layout.length

    def score_with(
        self, examples: Sequence[Example], others: Sequence[Example], model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """([N] token log-probs of one microbatch in the shared layout, with a graph; [M] those of one other completion of each of
        its prompts, without one and with dropout off): each prompt is read once."""
        scored, layout = model or self.model, lay_out(examples, "shared").to(self.device)
        layout.kept = kept = Kept()
        found = scored(trimtab=layout)
        kept.closed = True
        with evaluating(self.model):
            more = scored(trimtab=lay_out_after(layout, others).to(self.device))
        kept.layers.clear()
        return found, more

    def columns(self, examples: Sequence[Example], extras: Extras, model: nn.Module | None = None) -> Tensor:
        """[N, 1 + extras] of one microbatch: the log-probs and what else was asked for."""
        layout = lay_out(examples, self.mode).to(self.device)
        return (model or self.model)(trimtab=layout, extras=extras)  # type: ignore[no-any-return]

    def distribution(self, examples: Sequence[Example]) -> Distribution:
        """This model's next-token distributions at the completion tokens of one microbatch, without a graph."""
        base, layout = base_model(self.model), lay_out(examples, self.mode).to(self.device)
        precision = getattr(base, PRECISION)
        with evaluating(self.model):
            return Distribution(self.model(trimtab=layout, states=True), logits_of(base, precision))

    def score_all(self, examples: Sequence[Example], budgets: int = 1) -> tuple[Tensor, Tensor]:
        """The same for any number of examples, without a graph and with dropout off; rows with one prompt share it.

        Args:
            budgets: token budgets of a pass. With one, passes are cut as in learning, whose numbers are then the same to the
                last bit.
        """
        if not examples:
            empty = torch.zeros(0, device=self.device)
            return empty, empty.long()
        joined = self._joined(examples, budgets)
        merged = [
            replace(examples[rows[0]], completions=tuple(c for i in rows for c in examples[i].completions))
            for rows in joined
        ]
        with evaluating(self.model), casts_kept(), weights_packed(sum(cost(e, self.mode, self.closed) for e in merged)):
            parts = [self.score([merged[i] for i in part]) for part in self.microbatches(merged, budgets)]
        order = [i for rows in joined for i in rows]
        rows = torch.cat([logps for logps, _ in parts]).split([sum(map(len, examples[i].completions)) for i in order])
        lengths = torch.tensor([len(c) for e in examples for c in e.completions], device=self.device)
        return torch.cat([rows[j] for j in np.argsort(order)]), lengths

    def _joined(self, examples: Sequence[Example], budgets: int) -> list[list[int]]:
        """Indices of the examples that are scored as one: the same prompt, no more tokens together than a pass takes."""
        groups: list[list[int]] = []
        last: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> its last group, and that group's tokens
        for i, e in enumerate(examples):
            tokens = cost(e, self.mode, self.closed)
            group, used = last.get(e.prompt, (-1, 0))
            more = tokens - len(e.prompt)
            if self.mode == "shared" and group >= 0 and used + more <= budgets * self.budget:
                groups[group].append(i)
                last[e.prompt] = (group, used + more)
            else:
                groups.append([i])
                last[e.prompt] = (len(groups) - 1, tokens)
        return groups

    def completions(self, examples: Sequence[Example]) -> Completions:
        """The policy's log-probs alone, or the numbers of a reward model, as an objective would see them."""
        found, length = self.score_all(examples)
        return (
            Completions(found[:, 0], length, extras={"score": found[:, 1]})
            if self.closed
            else Completions(found, length)
        )


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
    examples = [
        replace(e, prompt=e.prompt[-LONGEST:], completions=tuple(c[:LONGEST] for c in e.completions)) for e in examples
    ]
    ladder: list[Mode] = ["shared", "packed", "padded"] if asked == "auto" else [asked]  # type: ignore[list-item]
    why: list[str] = []
    if kind not in ON_THE_INTERFACE and "padded" not in ladder[:1]:
        why.append(f'model type "{kind}" is not known to keep packed completions apart')
        ladder = [m for m in ladder if m == "padded"]
    tolerance = token_tolerance or {torch.float64: 1e-9, torch.float32: 1e-3}.get(base.dtype, 0.25)
    what, unit = ("scores", "of the score") if reward_head(model) is not None else ("log-probs", "nats per token")
    for mode in ladder:
        try:
            worst, gradient = _compare(model, examples, mode)
        except ModelError as e:
            why.append(f"{mode}: {e}")
            continue
        ok = worst <= tolerance and gradient <= min(100 * tolerance, 0.5)
        detail = (
            f"{mode} = plain forward on {len(examples)} rows: largest difference {worst:.1e} {unit}, "
            f"relative gradient difference {gradient:.1e}"
        )
        if ok:
            return LayoutChoice(mode, "; ".join(why) or None, detail)
        why.append(f"{detail} (allowed {tolerance:.0e})")
    raise ModelError(
        f'No layout gives this model\'s own {what} (model type "{kind}"): {"; ".join(why)}. '
        "Report the model type; until then this model cannot be trained safely."
    )


def _compare(model: nn.Module, examples: Sequence[Example], mode: Mode) -> tuple[float, float]:
    """Largest |log-prob difference| and relative gradient difference of a layout against the plain forward pass."""
    training = model.training
    model.eval()
    weights = _checked(model)
    try:
        uninstall(model)
        # a row at a time: only one graph of whole logits is alive
        plain, expected = zip(*(_with_gradient(_plain(model, e), weights) for e in examples), strict=True)
        install(model, base_model(model).dtype, mode)
        ours, got = _with_gradient(_laid_out(model, examples, mode), weights)
        apart = _goes_on(model, examples) if mode == "shared" else 0.0
    finally:
        uninstall(model)
        model.train(training)
    difference = norm = 0.0
    for b, *rows in zip(got, *expected, strict=True):
        a = sum(row.double() for row in rows)
        norm += a.pow(2).sum().item()
        difference += (a - b).pow(2).sum().item()
    logps = torch.cat(plain)
    scale = logps.abs().max().clamp(min=1).item() if reward_head(model) is not None else 1.0
    return max((ours - logps).abs().max().item() / scale, apart), (difference / max(norm, 1e-30)) ** 0.5


def _goes_on(model: nn.Module, examples: Sequence[Example]) -> float:
    """Largest difference of a log-prob between a pass and one that goes on from its prompts with the same completions."""
    if reward_head(model) is not None:
        return 0.0
    rows = [replace(e, completions=e.completions[:1]) for e in examples]
    with torch.no_grad():
        found, again = Scorer(model, "shared", 0).score_with(rows, rows)
    return (found - again).abs().max().item()


def _checked(model: nn.Module) -> list[nn.Parameter]:
    """The smallest weights, norms first, then projections to few heads: every layer has some, and what is wrong in the gradient
    of one layer goes on into all below it. All weights would take twice the memory of the model."""
    weights = sorted(
        (p for p in model.parameters() if p.requires_grad and p.is_floating_point()), key=lambda p: p.numel()
    )
    sums = accumulate(p.numel() for p in weights)
    return [p for n, (p, so_far) in enumerate(zip(weights, sums, strict=True)) if so_far <= CHECKED or not n]


def _with_gradient(found: Tensor, weights: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """What was found, and the gradient of its sum: 0 where a weight has no part in it."""
    slopes = torch.autograd.grad(found.sum(), weights, allow_unused=True) if weights else ()
    return found.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(weights, slopes, strict=True)]


def _laid_out(model: nn.Module, examples: Sequence[Example], mode: Mode) -> Tensor:
    """What the layout gives: [N] log-probs, or [B] scores of a reward model."""
    closed = reward_head(model) is not None
    layout = lay_out(examples, mode, closed).to(next(model.parameters()).device)
    found: Tensor = model(trimtab=layout)
    return found[layout.length.cumsum(0) - 1, 1] if closed else found


def _plain(model: nn.Module, example: Example) -> Tensor:
    """The model's own logits, one completion at a time: slow, obvious, right."""
    device = next(model.parameters()).device
    parts = []
    for c in example.completions:
        ids = torch.tensor([[*example.prompt, *c]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.ndim == 1:  # a reward model: one number, at the last token that is no padding
            parts.append(logits)
            continue
        logits = logits[len(example.prompt) - 1 : -1]
        parts.append(logits.log_softmax(-1).gather(1, ids[0, len(example.prompt) :, None])[:, 0])
    return torch.cat(parts)
