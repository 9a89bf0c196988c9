"""The sampler against transformers' own generation, and against the distribution that it samples from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from tests import tiny
from tests.test_layouts import model_of
from trimtab.feedback.records import Demonstration
from trimtab.logprobs.score import Scorer, install
from trimtab.online.sample import choose, sample
from trimtab.tokens.batch import Example

EOS = 5
ENDS = [5, 6, 17, 40, 60, 70, 80, 90]  # a random model must come to an end now and then
TOKENIZER = SimpleNamespace(eos_token_id=EOS)
PROMPTS = [[7, 8, 9], [3, 11, 12, 13, 14, 15, 16], [21], [4, 4, 30, 31]]


def model(**config: object) -> torch.nn.Module:
    made = tiny.model(torch.float64, **config)
    made.generation_config.eos_token_id = ENDS
    return made


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 3}])
def test_greedy_is_what_generate_writes(config: dict[str, object]) -> None:
    policy = model(**config)
    found = sample(policy, TOKENIZER, PROMPTS, per_prompt=2, max_new_tokens=12, seed=0, temperature=0.0, rows=4)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        said = policy.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=ENDS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert [a.ids for a in answers] == [tuple(said)] * 2
        assert all(a.ended == (said[-1] in ENDS) for a in answers)


def test_a_state_space_model_reads_each_prompt_alone() -> None:
    """Its memory knows no padding, and cannot be repeated or thinned out."""
    policy = model_of("mamba")
    policy.generation_config.eos_token_id = ENDS  # type: ignore[union-attr]
    found = sample(policy, TOKENIZER, PROMPTS, per_prompt=2, max_new_tokens=12, seed=0, temperature=0.0)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        said = policy.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=ENDS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert [a.ids for a in answers] == [tuple(said)] * 2


def test_log_probs_are_the_engines() -> None:
    """What the sampler says of its own tokens, the engine says too: rows that leave, padding and cache change nothing."""
    policy = model()
    found = sample(policy, TOKENIZER, PROMPTS, per_prompt=3, max_new_tokens=40, seed=3, rows=64)
    lengths = {len(a.ids) for answers in found for a in answers}
    assert len(lengths) > 3 and any(a.ended for answers in found for a in answers)  # some left before the others
    install(policy, torch.float64, "shared")
    rows = [
        Example(tuple(p), tuple(a.ids for a in answers), Demonstration((), ""))
        for p, answers in zip(PROMPTS, found, strict=True)
    ]
    scored = Scorer(policy, "shared", 4096).score_all(rows)[0]
    told = torch.tensor([v for answers in found for a in answers for v in a.logps], dtype=torch.float64)
    assert torch.allclose(scored, told, atol=1e-5)  # the sampler works in float32


def test_an_answer_depends_on_its_own_prompt_and_place_only() -> None:
    policy = model()
    more = {"max_new_tokens": 10, "seed": 1}
    whole = sample(policy, TOKENIZER, PROMPTS, per_prompt=4, **more)
    turned = sample(policy, TOKENIZER, PROMPTS[::-1], per_prompt=4, rows=4, **more)[::-1]
    assert [[a.ids for a in g] for g in turned] == [[a.ids for a in g] for g in whole]
    fewer = sample(policy, TOKENIZER, PROMPTS, per_prompt=2, **more)
    assert [[a.ids for a in g] for g in fewer] == [[a.ids for a in g[:2]] for g in whole]
    other = sample(policy, TOKENIZER, PROMPTS, per_prompt=4, max_new_tokens=10, seed=2)
    assert [[a.ids for a in g] for g in other] != [[a.ids for a in g] for g in whole]
    assert len({a.ids for a in whole[0]}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_follow_the_distribution(temperature: float) -> None:
    """Chi-square of 20,000 draws against softmax(logits / temperature)."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4], dtype=torch.float64)
    n = 20_000
    noise = torch.rand(n, generator=torch.Generator().manual_seed(0))
    token, logp = choose(logits.expand(n, -1), noise, temperature)
    wanted = (logits / temperature).softmax(0)
    counts = torch.bincount(token, minlength=5).double()
    assert stats.chisquare(counts.numpy(), (wanted / wanted.sum() * n).numpy()).pvalue > 0.01
    assert torch.allclose(logp.exp(), wanted[token])


def test_the_mixture_is_geometric() -> None:
    """One step: normalised pi^(1-b) mu^b, whatever constants the logits of either carry."""
    policy, other = model(), tiny.model(torch.float64, seed=1)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        a, b = (m(ids).logits[0, -1].log_softmax(-1) for m in (policy, other))
    wanted = (0.25 * a + 0.75 * b).log_softmax(-1)
    (found,) = sample(policy, TOKENIZER, PROMPTS[:1], per_prompt=50, max_new_tokens=1, seed=0, mixture=(other, 0.75))
    assert [x.logps[0] for x in found] == pytest.approx([wanted[x.ids[0]].item() for x in found], abs=1e-5)
