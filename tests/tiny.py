"""A tiny random Llama, a byte-level tokenizer with a chat template, and random feedback: what most tests run on."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trimtab.feedback.records import Comparison, Demonstration, Message, Prompt, Ranking, Record, Score, Solution, Thumb
from trimtab.logprobs.critic import add_critic
from trimtab.logprobs.scored import EXTRAS, Completions, Rollouts
from trimtab.objectives.base import Objective
from trimtab.tokens.batch import Example

VOCAB = 97


def model(dtype: torch.dtype = torch.float64, seed: int = 0, **config: object) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, weights large enough that every token matters."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    llama = LlamaForCausalLM(LlamaConfig(**{**values, **config}))
    for module in list(llama.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                # transformers' own norm computes in float32, which shows as 6e-8 in a float64 gradient
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                setattr(module, name, norm)
    return llama.to(dtype).eval()


def reward_model(dtype: torch.dtype = torch.float64, seed: int = 0, **config: object) -> LlamaForSequenceClassification:
    """The same decoder under a head that gives one number; padding is token 0."""
    language = model(dtype, seed, **config)
    language.config.num_labels, language.config.pad_token_id = 1, 0
    rewards = LlamaForSequenceClassification(language.config)
    rewards.model = language.model
    torch.manual_seed(seed + 1)
    torch.nn.init.normal_(rewards.score.weight, std=0.3)
    return rewards.to(dtype).eval()


def model_for(
    objective: Objective, dtype: torch.dtype = torch.float64
) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """What the method trains: a policy, with a critic where it needs one, or a reward model."""
    if "score" in objective.needs:
        return reward_model(dtype)
    policy = model(dtype)
    if "value" in objective.needs:
        critic(policy, objective.critic)
    return policy


def critic(model: LlamaForCausalLM, kind: str) -> None:
    """A critic that is not 0, in the model's precision."""
    added = add_critic(model, kind, seed=3)  # type: ignore[arg-type]
    torch.manual_seed(4)
    torch.nn.init.normal_(added.head[-1].weight, std=0.3)
    if added.trunk is not None:
        for p in added.trunk.parameters():  # not the policy's
            p.data.add_(0.1 * torch.randn_like(p))


def examples(kind: type[Record], n: int = 6, k: int = 2, seed: int = 0, ties: bool = False) -> list[Example]:
    """``n`` examples of mixed lengths over random tokens, labels drawn too."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randrange(2, 14)))
        count = {Comparison: 2, Ranking: k, Prompt: k}.get(kind, 1)
        answers = tuple((*(rng.randrange(3, VOCAB) for _ in range(rng.randrange(0, 9))), 2) for _ in range(count))
        said = (Message("user", f"prompt {i}"),)
        record: Record
        if kind is Comparison:
            record = Comparison(said, "a", "b", tie=ties and rng.random() < 0.4)
        elif kind is Thumb:
            record = Thumb(said, "a", desirable=rng.random() < 0.5)
        elif kind in (Ranking, Prompt):  # of a prompt's own answers, what they are worth is known
            worth = tuple(sorted((rng.random() for _ in range(k)), reverse=True))
            record = Ranking(said, tuple("abcdefgh"[:k]), tuple(range(1, k + 1)), worth)
        elif kind is Score:
            record = Score(said, "a", rng.gauss(0, 1))
        elif kind is Solution:
            ends = sorted(
                {*rng.sample(range(len(answers[0])), rng.randint(0, min(3, len(answers[0])))), len(answers[0]) - 1}
            )
            labels = tuple(rng.choice((0.0, 0.25, 1.0)) for _ in ends)
            out.append(Example(prompt, answers, Solution(said, ("a",) * len(ends), labels), marks=tuple(ends)))
            continue
        else:
            record = Demonstration(said, "a")
        out.append(Example(prompt, answers, record))
    return out


def sampled(objective: Objective, examples: list[Example], seed: int = 0) -> list[Example]:
    """The same as a round would leave them: with constants of the policy that sampled (not the one that learns)."""
    noise = torch.Generator().manual_seed(seed)
    length = torch.tensor([len(c) for e in examples for c in e.completions])
    counts = [sum(map(len, e.completions)) for e in examples]
    total = int(length.sum())

    def drawn() -> torch.Tensor:
        return -4 * torch.rand(total, generator=noise, dtype=torch.float64)

    extras = {need: drawn() for need in objective.needs & EXTRAS.keys()}
    columns = {"behaviour": drawn()}
    if "reference" in objective.needs:
        columns["reference"] = drawn()
    if "greedy" in objective.needs:
        base = torch.rand(len(examples), generator=noise, dtype=torch.float64)
        columns["baseline"] = base.repeat_interleave(torch.tensor(counts))
    y = Completions(columns["behaviour"], length, columns.get("reference"), extras)
    batch = replace(Rollouts.of(y, examples), columns=columns)
    columns |= {k: v.detach() for k, v in objective.credit(batch, {})[0].items()}
    parts = {k: v.split(counts) for k, v in columns.items()}
    return [replace(e, columns={k: v[i] for k, v in parts.items()}) for i, e in enumerate(examples)]
