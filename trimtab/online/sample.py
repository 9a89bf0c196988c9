"""Several answers to each prompt: the prompt is read once for all of them, and finished answers leave the batch.

Every answer has random numbers of its own, which depend on the seed, the prompt and the answer's place alone: a restart
samples the same, and two models are compared under the same noise.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from trimtab.logprobs.reference import adapter_off
from trimtab.logprobs.score import base_model, evaluating, plain_attention, uninstalled
from trimtab.update.weights import is_quantised

LEAVE = 0.75  # finished rows are taken out when no more than this share is still being written


@dataclass(frozen=True)
class Answer:
    """Token ids, end-of-sequence included where the answer came to its end, and the sampler's own log-prob of each."""

    ids: tuple[int, ...]
    ended: bool
    logps: tuple[float, ...]


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    per_prompt: int = 1,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    mixture: tuple[nn.Module, float] | None = None,
    rows: int = 64,
) -> list[list[Answer]]:
    """``per_prompt`` answers to each prompt, from the model's own distribution (no top-k, no top-p).

    Args:
        prompts: token ids of each, as :meth:`Template.prompt_ids` gives them.
        temperature: logits are divided by it; 0 is greedy.
        mixture: another model and its share b: tokens are drawn from the normalised pi^(1-b) other^b (Nash-MD).
        rows: answers written at a time; memory only.

    Returns:
        Per prompt, in order, its answers.
    """
    stop = stop_ids(model, tokenizer)
    found: dict[int, list[Answer]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    models = [(model, 1.0)] if mixture is None else [(model, 1 - mixture[1]), mixture]
    # a state-space layer's memory knows no padding
    at_once = max(1, rows // per_prompt) if all(_divides(m) for m, _ in models) else 1
    with ExitStack() as ready:
        for m, _ in models:
            ready.enter_context(evaluating(m))
            ready.enter_context(plain_attention(m))
        for start in range(0, len(order), at_once):
            part = order[start : start + at_once]
            group = [prompts[i] for i in part]
            answers = _write(models, group, per_prompt, max_new_tokens, seed, temperature, stop)
            found |= {i: answers[j * per_prompt : (j + 1) * per_prompt] for j, i in enumerate(part)}
    return [found[i] for i in range(len(prompts))]


def _write(
    models: Sequence[tuple[nn.Module, float]],
    prompts: Sequence[Sequence[int]],
    per_prompt: int,
    longest: int,
    seed: int,
    temperature: float,
    stop: set[int],
) -> list[Answer]:
    device = next(models[0][0].parameters()).device
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long, device=device) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    noise = torch.stack([_noise(p, k, seed, longest) for p in prompts for k in range(per_prompt)]).to(device)
    ends = torch.tensor(sorted(stop), device=device)
    rows = [_Row(model, share) for model, share in models]
    place = (mask.cumsum(1) - 1).clamp(min=0)
    logits = sum(r.read(ids, mask, place, per_prompt) for r in rows)
    place = place[:, -1:].repeat_interleave(per_prompt, 0)
    mask = mask.repeat_interleave(per_prompt, 0)
    written: list[tuple[list[int], list[float]]] = [([], []) for _ in noise]
    here = torch.arange(len(noise), device=device)  # which answer each row of the batch writes
    live = torch.ones_like(here, dtype=torch.bool)
    for t in range(longest):
        assert isinstance(logits, Tensor)
        token, logp = choose(logits, noise[here, t], temperature)
        for i, on, word, value in zip(here.tolist(), live.tolist(), token.tolist(), logp.tolist(), strict=True):
            if on:
                written[i][0].append(word)
                written[i][1].append(value)
        live &= ~torch.isin(token, ends)
        if t + 1 == longest or not live.any():
            break
        if live.sum() <= LEAVE * len(live) and all(r.divides for r in rows):
            kept = live.nonzero()[:, 0]
            here, live, token, mask, place = here[kept], live[kept], token[kept], mask[kept], place[kept]
            for r in rows:
                r.cache.batch_select_indices(kept)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        place = place + 1
        logits = sum(r.step(token[:, None], mask, place) for r in rows)
    return [Answer(tuple(words), words[-1] in stop, tuple(values)) for words, values in written]


def _divides(model: nn.Module) -> bool:
    """Whether rows of the model's cache can be repeated and taken out; a state-space layer's cannot."""
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=base_model(model).config).layers)


class _Row:
    """One model with its cache, and its share of the mixture."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share, self.divides = model, share, _divides(model)
        taken = inspect.signature(base_model(model).forward).parameters
        self.cache_name = "cache_params" if "cache_params" in taken else "past_key_values"
        self.cache = DynamicCache(config=base_model(model).config)
        self.cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]

    def read(self, ids: Tensor, mask: Tensor, place: Tensor, per_prompt: int) -> Tensor:
        if not self.divides:
            return self._forward(*(x.repeat_interleave(per_prompt, 0) for x in (ids, mask, place)))
        logits = self._forward(ids, mask, place)
        self.cache.batch_repeat_interleave(per_prompt)
        return logits.repeat_interleave(per_prompt, 0)

    def step(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        return self._forward(ids, mask, place)

    def _forward(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        where: dict[str, Any] = {"attention_mask": mask, "position_ids": place} if self.divides else {}
        out = self.model(
            input_ids=ids,
            **where,
            **{self.cache_name: self.cache},
            use_cache=True,
            logits_to_keep=1,
        )
        # a mixture of log-probs, each normalised: raw logits have constants of their own
        return self.share * out.logits[:, -1].float().log_softmax(-1)


class Roomy(DynamicLayer):
    """transformers' cache layer with room to grow: a token is written in place where the whole was copied for each."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: Any = (self.keys, self.values)  # type: ignore[has-type]
        old, new = self.get_seq_length(), key_states.shape[-2]
        if self.room is None or self.room[0].shape[0] != len(key_states) or self.room[0].shape[-2] < old + new:
            shape = (*key_states.shape[:2], 2 * (old + new), key_states.shape[-1])
            self.room = (key_states.new_empty(shape), value_states.new_empty((*shape[:3], value_states.shape[-1])))
            if old:
                self.room[0][:, :, :old], self.room[1][:, :, :old] = held
        for room, fresh in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, old : old + new] = fresh
        self.keys, self.values = (room[:, :, : old + new] for room in self.room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def choose(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """([B] token, [B] its log-prob): the token where the cumulated probability passes ``noise`` [B] in [0, 1)."""
    if not temperature:
        logps = logits.log_softmax(-1)
        token = logps.argmax(-1)
    else:
        logps = (logits / temperature).log_softmax(-1)
        passed = logps.exp().double().cumsum(-1)
        token = torch.searchsorted(passed, (noise.double() * passed[:, -1])[:, None], right=True)[:, 0]
    return token, logps.gather(1, token[:, None])[:, 0]


def _noise(prompt: Sequence[int], answer: int, seed: int, n: int) -> Tensor:
    """[n] uniform numbers of one answer."""
    said = array("q", [seed, answer, *prompt]).tobytes()
    mixed = hashlib.blake2b(said, digest_size=7).digest()
    return torch.rand(n, generator=torch.Generator().manual_seed(int.from_bytes(mixed, "little")))


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    stated = base_model(model).generation_config.eos_token_id
    ids = stated if isinstance(stated, list) else [stated]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


@contextmanager
def sampler(model: nn.Module, precision: torch.dtype, bare: bool = False) -> Iterator[nn.Module]:
    """The model to sample from: itself in float32 (and in 4 bits); a copy with weights of low precision and the adapter merged
    in.

    Weights that autocast would convert for every token are converted once.

    Args:
        bare: a copy without the adapter.
    """
    low = precision in (torch.bfloat16, torch.float16)
    if is_quantised(model):  # it cannot be converted
        with adapter_off(model) if bare else nullcontext():
            yield model
        return
    if not low and not bare:
        yield model
        return
    with uninstalled(model):
        twin: Any = copy.deepcopy(model)
    if hasattr(twin, "merge_and_unload"):
        twin = twin.unload() if bare else twin.merge_and_unload()
    yield (twin.to(precision) if low else twin).eval()
