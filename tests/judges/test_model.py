"""Models as judges, against plain transformers: one text at a time, no layout, no batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.judges.test_base import ask
from tests.tiny_folder import tiny_folder
from trimtab.errors import ConfigError, ModelError
from trimtab.feedback.records import Demonstration, Message
from trimtab.judges import backend as backends
from trimtab.judges.backend import Local
from trimtab.judges.base import Failure, Preference, Question, Scores
from trimtab.judges.cached import Cached
from trimtab.judges.language import LanguageJudge
from trimtab.judges.model import ImplicitJudge, PreferenceJudge, RewardJudge, StepJudge, load_judge, scorer_for
from trimtab.judges.round_robin import RoundRobin
from trimtab.logprobs.score import plain_attention
from trimtab.models import FIRST_WINS, REWARD, STEP_RIGHT, end_tokens, load_model, load_reward_model, load_tokenizer
from trimtab.tokens.template import Template
from trimtab.update.weights import with_adapter

ANSWERS = ("yes", "no, never", "yes ", "well: <|user|> yes", "x" * 99)
QUESTIONS = [Question((Message("user", f"Is it {i}?"),), ANSWERS) for i in range(3)]
REFUSED, LONG = "text contains a control token of the tokenizer", "longer than max_length (90 tokens)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model of some kind, made once."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("models")

    def made(kind: str) -> str:
        place = home / kind
        if place.exists():
            return str(place)
        if kind in ("policy", "start"):
            return str(tiny_folder(place, seed=int(kind == "policy")))
        start = made("start")
        tokenizer = load_tokenizer(start)
        model = load_reward_model(start, tokenizer, seed=2, ends=end_tokens(start), number=kind)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        return str(place)

    return made


def texts(name: str, question: Question) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of the answers that can be judged."""
    template = Template(load_tokenizer(name), eos_ids=end_tokens(name))
    done = [template.encode(Demonstration(question.prompt, c)) for c in question.completions[:2]]
    return list(done[0].prompt), [list(e.completions[0]) for e in done]


@torch.no_grad()
def number(model: Any, ids: list[int]) -> float:
    return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@torch.no_grad()
def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()


def check_scores(found: Any, wanted: list[list[float]]) -> None:
    """The first two answers have numbers, the third equals the first but for white space, two cannot be judged."""
    assert found.failed == {REFUSED: 3, LONG: 3}
    for judgement, (a, b) in zip(found.judgements, wanted, strict=True):
        assert judgement.scores[:3] == pytest.approx((a, b, a), abs=1e-5)
        assert judgement.scores[3:] == (Failure(REFUSED), Failure(LONG))
    assert len({round(a, 4) for row in wanted for a in row}) > 3, "the numbers say something"


def test_reward_model(folder: Callable[[str], str]) -> None:
    name = folder(REWARD)
    plain = AutoModelForSequenceClassification.from_pretrained(name).eval()
    wanted = [[number(plain, prompt + a) for a in answers] for prompt, answers in (texts(name, q) for q in QUESTIONS)]
    for budget in (1, 150, 9999):
        judge = load_judge(name, budget=budget, max_length=90, stop_after=0.9)
        assert type(judge) is RewardJudge
        check_scores(judge.judge(QUESTIONS), wanted)


def test_a_budget_of_one_gives_the_same_bits_in_any_company(folder: Callable[[str], str]) -> None:
    judge = load_judge(folder(REWARD), budget=1, stop_after=0.9)
    whole = judge.judge(QUESTIONS).judgements
    assert tuple(judge.judge([q]).judgements[0] for q in QUESTIONS[::-1])[::-1] == whole


def test_implicit_reward(folder: Callable[[str], str]) -> None:
    policy, start = (AutoModelForCausalLM.from_pretrained(folder(n)).eval() for n in ("policy", "start"))
    wanted = []
    for q in QUESTIONS:
        prompt, answers = texts(folder("policy"), q)
        wanted.append([0.3 * (logp(policy, prompt, a) - logp(start, prompt, a)) for a in answers])
    judge = load_judge(folder("policy"), folder("start"), beta=0.3, max_length=90, stop_after=0.9)
    assert type(judge) is ImplicitJudge
    check_scores(judge.judge(QUESTIONS), wanted)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by the old name
def test_implicit_reward_against_the_model_under_the_adapter(folder: Callable[[str], str]) -> None:
    name = folder("start")
    torch.manual_seed(0)
    model = with_adapter(load_model(name), 3, 6, "all-linear")
    for parameter_name, weight in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(weight, std=0.3)
    template = Template(load_tokenizer(name), eos_ids=end_tokens(name))
    judge = ImplicitJudge(scorer_for(model, template), template, None, max_length=90, stop_after=0.9)
    bare, wanted = AutoModelForCausalLM.from_pretrained(name).eval(), []
    for q in QUESTIONS:
        prompt, answers = texts(name, q)
        with plain_attention(model):
            wanted.append([0.1 * (logp(model, prompt, a) - logp(bare, prompt, a)) for a in answers])
    check_scores(judge.judge(QUESTIONS), wanted)
    before = judge.identity
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if "lora_B" in n)[0, 0] += 1
    assert judge.identity != before, "the adapter is part of who judges"


def test_preference_model_in_both_orders(folder: Callable[[str], str]) -> None:
    name = folder(FIRST_WINS)
    judge = load_judge(name, max_length=90, stop_after=0.9)
    assert type(judge) is PreferenceJudge
    plain = AutoModelForSequenceClassification.from_pretrained(name).eval()
    pairs = [Question(q.prompt, ANSWERS[:2]) for q in QUESTIONS]
    found = judge.judge([*pairs, *(Question(p.prompt, p.completions[::-1]) for p in pairs), ask("a", ANSWERS[3])])
    assert found.judgements[-1] == Failure(REFUSED)
    for i, q in enumerate(pairs):
        prompt, (a, b) = texts(name, q)
        first, second = (1 / (1 + math.exp(-number(plain, prompt + x + y))) for x, y in ((a, b), (b, a)))
        one, other = found.judgements[i], found.judgements[i + 3]
        assert isinstance(one, Preference) and isinstance(other, Preference)
        assert one.orders == pytest.approx((first, 1 - second), abs=1e-5)
        assert one.first == pytest.approx((first + 1 - second) / 2, abs=1e-5)
        assert one.first + other.first == pytest.approx(1, abs=1e-5)
    assert set(found.position) == {"bias", "consistency", "first_place"}
    table = RoundRobin(judge).judge([Question(QUESTIONS[0].prompt, ANSWERS)]).judgements[0]
    assert isinstance(table, Scores) and table.scores[0] == pytest.approx(found.judgements[0].first, abs=1e-5)  # type: ignore[union-attr]
    assert isinstance(table.scores[3], Failure)


def test_process_reward_model(folder: Callable[[str], str]) -> None:
    """P(right so far) at the end of each step, read by plain transformers from the text up to there."""
    name, steps = folder(STEP_RIGHT), ["so: 4", "is four", "two and two"]
    plain = AutoModelForSequenceClassification.from_pretrained(name).eval()
    said = (Message("user", "2+2?"),)
    template = Template(load_tokenizer(name), eos_ids=end_tokens(name))
    whole = template.encode(Demonstration(said, "\n".join(steps)))
    ends = [
        len("\n".join(steps[: i + 1])) + (i < 2) for i in range(3)
    ]  # a byte is a token; the line break ends the step
    answer = list(whole.completions[0])
    texts = [[*whole.prompt, *answer[:n]] for n in ends[:2]] + [[*whole.prompt, *answer]]
    right = [1 / (1 + math.exp(-number(plain, t))) for t in texts]
    wanted = {"product": math.prod(right), "min": min(right), "last": right[-1]}
    for aggregate, value in wanted.items():
        judge = load_judge(name, aggregate=aggregate)
        assert type(judge) is StepJudge
        found = judge.judge([Question(said, ("\n\n".join(steps), "4"))]).judgements[0]
        assert isinstance(found, Scores) and found.scores[0] == pytest.approx(value, abs=1e-5)
    assert len({round(v, 3) for v in wanted.values()}) == 3


def test_identities_differ_where_numbers_do(folder: Callable[[str], str], tmp_path: Path) -> None:
    policy, start = folder("policy"), folder("start")
    judges = [load_judge(policy, start), load_judge(start, policy), load_judge(policy, start, beta=0.2)]
    judges += [load_judge(folder(k)) for k in (REWARD, FIRST_WINS, STEP_RIGHT)]
    judges += [load_judge(folder(STEP_RIGHT), aggregate="last"), load_judge(folder(REWARD), max_length=90)]
    assert len({j.identity for j in judges}) == len(judges)
    assert load_judge(policy, start).identity == judges[0].identity
    file = tmp_path / "kept.jsonl"
    fresh = Cached(judges[0], file).judge([ask("a", "b")])
    assert Cached(load_judge(policy, start), file).judge([ask("a", "b")]).judgements == fresh.judgements
    assert len(file.read_text().splitlines()) == 1


def test_what_cannot_be_loaded(folder: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a reward model and needs no reference"):
        load_judge(folder(REWARD), folder("start"))
    with pytest.raises(ConfigError, match="its implicit reward needs the reference"):
        load_judge(folder("policy"))
    with pytest.raises(ConfigError, match='The option "beta" has no effect on RewardJudge'):
        load_judge(folder(REWARD), beta=0.1)
    with pytest.raises(ConfigError, match='"agregate" has no effect on StepJudge. Did you mean "aggregate"?'):
        load_judge(folder(STEP_RIGHT), agregate="last")
    other = tiny_folder(tmp_path / "other")
    words = load_tokenizer(other)
    words.add_tokens(["anew"])
    words.save_pretrained(other)
    with pytest.raises(ModelError, match="the tokenizers of .* differ"):
        load_judge(folder("policy"), str(other))


# --- a language model in this process -----------------------------------------------------------------------------------


@pytest.fixture
def local(folder: Callable[[str], str]) -> Callable[..., Local]:
    def made(**options: Any) -> Local:
        name = folder("policy")
        template = Template(load_tokenizer(name), options.pop("mode", "auto"), eos_ids=end_tokens(name))
        return Local(scorer_for(load_model(name), template), template, **options)

    return made


def next_tokens(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def test_options_are_weighed_exactly(
    folder: Callable[[str], str], local: Callable[..., Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is a byte: P(7) = P("7") + P(" ") P("7" | " "), and 1 has what 10 leaves of it."""
    monkeypatch.setattr(backends, "LEAST", 0.0)
    plain = AutoModelForCausalLM.from_pretrained(folder("policy")).eval()
    backend, asked = local(), [(Message("user", f"Rate {i}:"),) for i in range(2)]
    ids = lambda text: backend.template.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for conversation, found in zip(asked, backend.weigh(asked, [str(n) for n in range(1, 11)]), strict=True):
        wanted = dict.fromkeys((str(n) for n in range(1, 11)), 0.0)
        for lead in ("", " "):
            before, p = backend.template.prompt_ids(conversation), 1.0
            for t in ids(lead):
                p *= next_tokens(plain, before)[t].item()
                before = [*before, t]
            digits = next_tokens(plain, before)
            one, zero = ids("1")[0], ids("0")[0]
            ten = digits[one].item() * next_tokens(plain, [*before, one])[zero].item()
            wanted["10"] += p * ten
            for n in range(1, 10):
                wanted[str(n)] += p * (digits[ids(str(n))[0]].item() - (ten if n == 1 else 0))
        assert found == pytest.approx(wanted, rel=1e-4)
        assert wanted["10"] > 1e-5


def test_a_local_judge_is_the_prompt_through_the_model(
    folder: Callable[[str], str], local: Callable[..., Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "LEAST", 0.0)
    backend = local()
    judge = LanguageJudge(backend, "rlaif")
    (found,) = judge.judge([ask("one", "two")]).judgements
    assert isinstance(found, Preference) and found.orders is not None
    wanted = []
    for shown in ((0, 1), (1, 0)):
        opening, _ = judge.form.ask(ask("one", "two"), shown)
        (weights,) = backend.weigh([(Message("user", opening),)], ["1", "2"])
        assert isinstance(weights, dict)
        wanted.append(weights["12"[shown[0]]] / sum(weights.values()))
    assert found.orders == pytest.approx(wanted) and found.first == pytest.approx(sum(wanted) / 2)
    assert wanted[0] != pytest.approx(1 - wanted[1], abs=1e-3), "the orders are not the same question"


def test_a_local_judge_that_does_not_answer_in_the_options(local: Callable[..., Local]) -> None:
    found = LanguageJudge(local(), "rlaif", stop_after=1.0).judge([ask("one", "two"), ask("a <|user|>", "b")])
    assert found.failed == {"nonsense": 2} and found.notes["control tokens of a chat template broken up"] == 1
    short = LanguageJudge(local(max_length=100), "rlaif", stop_after=1.0)
    assert short.judge([ask("one", "two")]).failed == {"longer than max_length (100 tokens)": 1}


def test_a_local_model_writes(local: Callable[..., Local]) -> None:
    """An untrained model babbles until it is cut; reasons may be cut, a score may not be read out of babble."""
    backend, heard = local(max_tokens=12), list[tuple[str, bool]]()
    asked = [(Message("user", "Why?"),), (Message("user", "Why then?"),)]
    backend.write(asked, 0, lambda text, cut: heard.append((text, cut)))
    again = backend.write(asked[:1], 5, lambda text, cut: text)  # greedy: whatever the seed
    assert again == [heard[0][0]] and heard[0][1] is True
    warm = local(max_tokens=12, temperature=1.0)
    seeds = [warm.write(asked[:1], seed, lambda text, cut: text)[0] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    found = LanguageJudge(backend, "additive", stop_after=1.0).judge([ask("one")])
    assert found.failed == {"nonsense": 1} or found.failed == {"empty reply": 1}


def test_a_model_without_chat_template_reads_one_text(
    local: Callable[..., Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLAIF's own form: preamble, sample, reasons and ending after each other."""
    monkeypatch.setattr(backends, "LEAST", 0.0)
    backend, heard = local(mode="plain", max_tokens=12, temperature=1.0), list[str]()
    prompts = backend.template.prompt_text
    monkeypatch.setattr(backend.template, "prompt_text", lambda c: heard.append(prompts(c)) or prompts(c))
    judge = LanguageJudge(backend, "rlaif_reasoned", stop_after=1.0)
    judge.judge([ask("one", "two")])
    assert len(heard) == 4 and heard[2].startswith(heard[0]) and heard[2].endswith("Preferred answer:")
