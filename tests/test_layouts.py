"""Every layout gives the model's own numbers, for every architecture that is promised; the others fall back and say why.

``python -m tests.test_layouts`` prints the table of docs/performance.md.
"""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from trimtab.errors import ModelError
from trimtab.feedback.records import Comparison, Ranking
from trimtab.logprobs import attention, layout, score
from trimtab.logprobs.layout import Block, Mode, Part, cost, lay_out
from trimtab.logprobs.score import Scorer, base_model, choose_layout, install, plain_attention

WINDOW: dict[str, object] = {"sliding_window": 5}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HEAD = {"head_dim": 8}
GEMMA = {**WINDOW, **HEAD, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SHARED: dict[str, dict[str, object]] = {  # model type, perhaps with a word on the variant: what differs from SIZES
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**WINDOW, "sliding_window_pattern": 2},
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT},
    "dots1": {**ROUTED, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": {**WINDOW, "sliding_window_pattern": 2},
    "gemma": HEAD,
    "gemma2": GEMMA,  # soft-cap in attention and head; no sdpa of its own
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "gemma4_text": {
        **ALTERNATING,
        **HEAD,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": tiny.VOCAB,
        "hidden_size_per_layer_input": 8,
    },
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": {**ROUTED, **HEAD},
    "gpt2": {},
    "gpt_bigcode": {"multi_query": True},
    "gpt_neox": {},
    "gpt_oss": {**WINDOW, **HEAD, **MIXTURE},  # attention sinks
    "granite": {"logits_scaling": 2.0},
    "granitemoe": MIXTURE,
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "llama": {},
    "llama tied multi-query": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "minimax_m2": {**MIXTURE, **HEAD},
    "ministral3": {**WINDOW, **HEAD, "max_position_embeddings": 32768},
    "mistral": WINDOW,
    "mixtral": MIXTURE,
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi": {},
    "phi3": {},
    "phimoe": MIXTURE,
    "qwen2": {},
    "qwen2 window": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3": HEAD,
    "qwen3_moe": {**EXPERTS, **HEAD, "num_experts": 4},
    "seed_oss": HEAD,
    "smollm3": {},
    "starcoder2": {},
}
FALLS_BACK: dict[str, dict[str, object]] = {
    "falcon": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "stablelm": {},
}
MODES: tuple[Mode, ...] = ("shared", "packed", "padded")
OPENING = (5, 9, 2, 6, 5, 3, 5, 8, 9)  # what all prompts begin with, longer than a window
EXAMPLES = [
    replace(e, prompt=OPENING + e.prompt)
    for e in (*tiny.examples(Comparison, 3, seed=5), *tiny.examples(Ranking, 1, k=4))
]
LENGTHS = [len(c) for e in EXAMPLES for c in e.completions]
TOLERANCE = 2e-5  # nats per token in float32


def model_of(kind: str) -> nn.Module:
    """Two random layers. Token ids are small: some configs' defaults lie outside a tiny vocabulary."""
    sizes = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **{**sizes, **{**SHARED, **FALLS_BACK}[kind]})
    return AutoModelForCausalLM.from_config(config).eval()


def own_numbers(model: nn.Module) -> torch.Tensor:
    """Log-probs of every completion token from the model's own logits, one completion at a time."""
    parts = []
    for e in EXAMPLES:
        for c in e.completions:
            logits = model(input_ids=torch.tensor([[*e.prompt, *c]]), use_cache=False).logits[0]
            parts.append(logits[len(e.prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0])
    return torch.cat(parts)


def scored(model: nn.Module, mode: Mode) -> torch.Tensor:
    install(model, torch.float32, mode)
    return Scorer(model, mode, 60).score_all(EXAMPLES)[0]


@pytest.mark.parametrize("kind", SHARED)
def test_other_completions_go_on_from_the_prompts_of_a_pass(kind: str) -> None:
    """Each prompt read once, for a completion with a graph and for another one without: the model's own numbers for both."""
    model = model_of(kind)
    own = own_numbers(model).split([sum(map(len, e.completions)) for e in EXAMPLES])
    first, other = ([replace(e, completions=e.completions[k : k + 1]) for e in EXAMPLES] for k in (0, 1))
    lengths = [[len(c) for c in e.completions] for e in EXAMPLES]
    wanted = [torch.cat([row.split(n)[k] for row, n in zip(own, lengths, strict=True)]) for k in (0, 1)]
    install(model, torch.float32, "shared")
    found, more = Scorer(model, "shared", 0).score_with(first, other)
    assert found.requires_grad and not more.requires_grad
    assert (found - wanted[0]).abs().max() < TOLERANCE and (more - wanted[1]).abs().max() < TOLERANCE


def test_the_data_reaches_beyond_the_window() -> None:
    assert len(OPENING) > 5 and 1 in {len(c) for e in EXAMPLES for c in e.completions}
    assert {kind.split()[0] for kind in SHARED} == score.ON_THE_INTERFACE


@pytest.mark.parametrize("kind", SHARED)
def test_prompt_is_shared_where_that_holds(kind: str) -> None:
    model = model_of(kind)
    stock, own = base_model(model).config._attn_implementation, own_numbers(model)
    model.train()
    choice = choose_layout(model, EXAMPLES)
    assert choice.mode == "shared" and choice.fallback is None
    assert base_model(model).config._attn_implementation == stock and "forward" not in vars(model) and model.training
    model.eval()
    for mode in MODES:
        assert (scored(model, mode) - own).abs().max() < TOLERANCE, mode
    # and the model still is what transformers loaded, for generation and once uninstalled
    install(model, torch.float32, "shared")
    with plain_attention(model):
        assert (own_numbers(model) - own).abs().max() < TOLERANCE
    score.uninstall(model)
    assert torch.equal(own_numbers(model), own)


def twin(kind: str) -> dict[Mode, tuple[float, float, float]]:
    """Float64, each layout against the model's own numbers: largest difference of a token's log-prob in nats, of DPO's loss, and
    of its gradient by all weights, relative to that gradient's norm."""
    model = model_of(kind).double()
    model.set_experts_implementation("eager")  # grouped products know no float64
    weights = [p for p in model.parameters() if p.requires_grad]

    def learn(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.stack([part.sum() for part in logps.split(LENGTHS)])
        loss = -logsigmoid(y[::2] - y[1::2]).mean()
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        zeros = (torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))
        return loss, torch.cat([g.flatten() for g in zeros])

    own = own_numbers(model)
    loss, gradient = learn(own)
    found: dict[Mode, tuple[float, float, float]] = {}
    for mode in [m for m in MODES if kind in SHARED or m == "padded"]:
        install(model, torch.float64, mode)
        ours = model(trimtab=lay_out(EXAMPLES, mode))
        our_loss, our_gradient = learn(ours)
        score.uninstall(model)
        away = (our_gradient - gradient).norm() / gradient.norm()
        found[mode] = ((ours - own).abs().max().item(), (our_loss - loss).abs().item(), away.item())
    return found


@pytest.mark.parametrize("kind", [*SHARED, *FALLS_BACK])
def test_loss_and_gradient_are_those_of_the_twin(kind: str) -> None:
    """As far as the model's own float32 goes: transformers' norms and routers compute in it whatever the weights are."""
    for mode, (logps, loss, gradient) in twin(kind).items():
        if (kind, mode) == ("gemma2", "padded"):
            assert isnan(logps)  # its own attention at padding, in float64 alone; float32 is tested above
            continue
        limit = 2e-6 if kind == "mamba" else max(1e-7, logps)  # its own float32 may move the loss as far as a token
        assert logps < 2e-6 and loss < limit and gradient < 1e-6, mode


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma4_text", "gpt_oss", "llama tied multi-query"])
def test_a_group_in_parts_is_the_group(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long completions of a short prompt: each is a product of its own, and no number knows it."""
    taken = []
    cut = Block._parts

    def spy(self: Block, *words: Any) -> list[Part]:
        taken.append(cut(self, *words))
        return taken[-1]

    monkeypatch.setattr(Block, "_parts", spy)
    monkeypatch.setattr(layout, "APART", -(10**9))
    logps, loss, gradient = twin(kind)["shared"]
    assert logps < 2e-6 and loss < 1e-7 and gradient < 1e-6
    assert max(map(len, taken)) == 5  # the ranking: its prompt and four completions


def test_what_all_prompts_begin_with_is_read_once() -> None:
    """And nothing else is: a beginning of one or two tokens, of some prompts, of prompts that differ, or in another layout."""
    prompts = {
        "all": ([(*OPENING, 7, 8), (*OPENING, 7, 7), (*OPENING, 8, 7)], 9),
        "one has only that": ([(*OPENING, 7, 8), OPENING, (*OPENING, 8)], 8),
        "too few": ([(*OPENING[:7], 1), (*OPENING[:7], 2)], 0),
        "one begins otherwise": ([(*OPENING, 7), (1, *OPENING, 7)], 0),
        "twice the same": ([(*OPENING, 7, 8)] * 2, 10),
        "one row": ([(*OPENING, 7)], 0),
    }
    for name, (rows, common) in prompts.items():
        examples = [replace(EXAMPLES[0], prompt=p) for p in rows]
        for mode in ("shared", "packed"):
            found = lay_out(examples, mode)
            first, fed = found.blocks[0], sum(cost(e, mode) for e in examples)
            less = common if mode == "shared" else 0
            assert found.input_ids.shape == (1, fed - less * (len(rows) - 1)), (name, mode)
            assert (not first.lengths, all(b.seen == less for b in found.blocks[1:] or [first])) == (less > 0, True)
            assert less == 0 or (first.prompt == less and len(found.blocks) == 1 + len(rows))


def test_only_groups_that_gain_are_cut() -> None:
    device = torch.device("cpu")
    sizes = {(149, (42, 52)): 1, (32, (512,) * 8): 9, (32, (512, 0, 512)): 3, (32, (512, 0)): 1, (500, (50, 60)): 3}
    for (prompt, lengths), number in sizes.items():
        parts = Block(7, prompt, list(lengths)).parts(device)
        assert len(parts) == number
        assert [part.rows for part in parts] in ([prompt + sum(lengths)], [prompt, *filter(None, lengths)])
        assert [part.after for part in parts] == [False, *[True] * (number - 1)]


@pytest.mark.parametrize("kind", FALLS_BACK)
def test_others_fall_back_and_say_why(kind: str) -> None:
    model = model_of(kind)
    choice = choose_layout(model, EXAMPLES)
    assert choice.mode == "padded"
    assert choice.fallback == f'model type "{kind}" is not known to keep packed completions apart'
    assert (scored(model, "padded") - own_numbers(model)).abs().max() < TOLERANCE


@pytest.mark.parametrize(("kind", "reason"), [("falcon", "largest difference"), ("stablelm", "got no layout")])
def test_a_wrong_promise_is_found_out(kind: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon takes the setting and goes its own way, stablelm loses the layout: the comparison at the start sees both."""
    monkeypatch.setattr(score, "ON_THE_INTERFACE", frozenset({kind}))
    choice = choose_layout(model_of(kind), EXAMPLES)
    assert choice.mode == "padded" and choice.fallback is not None
    assert choice.fallback.count(reason) == 2  # shared and packed


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_a_wrong_gradient_is_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right log-probs, and keys that learn nothing: the comparison looks at few weights, but at some in every layer."""
    right = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda q, k, *more: right(q, k.detach(), *more))
    choice = choose_layout(model_of(kind), EXAMPLES)
    assert choice.mode == "padded" and choice.fallback is not None and choice.fallback.count("relative gradient") == 2


def test_a_layout_asked_for_is_given_or_refused() -> None:
    assert choose_layout(model_of("llama"), EXAMPLES, "packed").mode == "packed"
    with pytest.raises(ModelError, match=r'No layout gives this model\'s own log-probs \(model type "falcon"\)'):
        choose_layout(model_of("falcon"), EXAMPLES, "shared")


def test_our_attention_without_a_layout_is_refused() -> None:
    model = model_of("llama")
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ModelError, match="got no layout"):
        model(input_ids=torch.tensor([[3, 4]]))


def table() -> str:
    """Markdown: every architecture, its layouts, and how far each is from the twin in float64: log-prob, relative gradient."""
    lines = ["| architecture | " + " | ".join(MODES) + " |", "|---" * (1 + len(MODES)) + "|"]
    for kind in [*SHARED, *FALLS_BACK]:
        found = twin(kind)
        cells = [f"{found[m][0]:.0e}, {found[m][2]:.0e}" if m in found else "" for m in MODES]
        lines.append(f"| {kind} | " + " | ".join(cells).replace("nan, nan", "float64: not a number") + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
