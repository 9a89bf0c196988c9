"""Reward models: what the head reads, where padding stands, and that a saved folder is an ordinary one of transformers."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests import tiny
from tests.command import done, trimtab
from tests.engine import WHOLE, engine, step
from tests.tiny_folder import feedback_file, tiny_folder, tokenizer
from trimtab.errors import ModelError
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Ranking
from trimtab.logprobs.layout import Mode, cost, lay_out
from trimtab.logprobs.score import Scorer, choose_layout, install
from trimtab.models import FIRST_WINS, PAD, end_tokens, is_reward_model, load_model, load_reward_model, load_tokenizer
from trimtab.objectives import methods
from trimtab.objectives.dpo import DPO
from trimtab.objectives.reward_model import RewardModel
from trimtab.tokens.batch import Example
from trimtab.tokens.template import Template
from trimtab.update.checks import scores_stand_alone
from trimtab.update.weights import save_weights, with_adapter

MODES: tuple[Mode, ...] = get_args(Mode)
REWARDS = [name for name, cls in methods().items() if "score" in cls.needs]
EXAMPLES = [*tiny.examples(Comparison, 4, seed=5), *tiny.examples(Ranking, 1, k=4)]
# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# --- what the head reads ----------------------------------------------------------------------------------------------


def after_each_token(model: nn.Module, example: Example) -> Tensor:
    """transformers' own number for the prompt and the first t tokens of each completion, every t, one text at a time."""
    texts = [[*example.prompt, *c[: t + 1]] for c in example.completions for t in range(len(c))]
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([text])).logits[0, 0] for text in texts])


@pytest.mark.parametrize("mode", MODES)
def test_a_number_after_every_token_in_every_layout(mode: Mode) -> None:
    model = tiny.reward_model()
    wanted = torch.cat([after_each_token(model, e) for e in EXAMPLES])
    install(model, torch.float64, mode)
    for budget in (1, 60, WHOLE):
        scorer = Scorer(model, mode, budget)
        found, length = scorer.score_all(EXAMPLES)
        assert found.shape == (len(wanted), 2) and found[:, 0].isnan().all()
        assert (found[:, 1] - wanted).abs().max() < 1e-10
        assert torch.equal(scorer.completions(EXAMPLES).score, found[length.cumsum(0) - 1, 1])


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_layout_feeds_the_last_token_too(mode: Mode) -> None:
    for closed in (False, True):
        layout = lay_out(EXAMPLES, mode, closed)
        fed = layout.attention_mask.sum() if layout.attention_mask is not None else layout.input_ids.numel()
        assert int(fed) == sum(cost(e, mode, closed) for e in EXAMPLES)
    read_at = layout.input_ids.flatten()[layout.predict]
    assert read_at.tolist() == layout.target.tolist() == [t for e in EXAMPLES for c in e.completions for t in c]


def test_the_layout_is_compared_with_the_models_own_pooling() -> None:
    model = tiny.reward_model(torch.float32)
    choice = choose_layout(model, EXAMPLES)
    assert choice.mode == "shared" and choice.fallback is None and "of the score" in choice.detail
    # padding that ends every answer (PAINS 18): transformers reads the token before, and the comparison sees it
    model.config.pad_token_id = 2
    with pytest.raises(ModelError, match=r"No layout gives this model's own scores"):
        choose_layout(model, EXAMPLES)


def test_low_precision_keeps_scores_in_float32() -> None:
    model = tiny.reward_model(torch.float32)
    wanted = torch.cat([after_each_token(model, e) for e in EXAMPLES])
    install(model, torch.bfloat16, "shared")
    found = Scorer(model, "shared", WHOLE).score_all(EXAMPLES)[0][:, 1]
    assert found.dtype == torch.float32 and 1e-6 < (found - wanted).abs().max() < 0.3
    assert not torch.equal(found, found.bfloat16().float()), "rounded to bfloat16"


def test_policies_and_reward_models_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    examples = tiny.examples(Comparison, 4)
    with pytest.raises(ModelError, match=r"^reward_model needs a reward model, and the model is a language model\.$"):
        engine(tiny.model(), RewardModel(), examples, tmp_path)
    with pytest.raises(ModelError, match=r"^dpo needs log-probs, and the model is a reward model\.$"):
        engine(tiny.reward_model(), DPO(), examples, tmp_path)


def test_adapter_trains_the_whole_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_adapter(tiny.reward_model(), 3, 6, "all-linear")
    _, slopes = step(engine(model, RewardModel(), tiny.examples(Comparison, 4), tmp_path))
    heads = [n for n in slopes if "score" in n]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    assert slopes[heads[0]].abs().max() > 1e-3 and any("lora_B" in n for n in slopes)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rewards")
    tiny_folder(folder / "tiny")
    for kind in ("comparison", "ties", "score", "ranking", "solution"):
        feedback_file(folder / f"{kind}.jsonl", kind, 12)
    return folder


@pytest.fixture(autouse=True)
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def test_a_language_model_becomes_a_reward_model() -> None:
    words = load_tokenizer("tiny")
    assert words.pad_token_id == words.eos_token_id, "else this proves nothing"
    model = load_reward_model("tiny", words, seed=1)
    source = AutoModelForCausalLM.from_pretrained("tiny")
    vocabulary = source.config.vocab_size
    for name, weight in source.model.named_parameters():
        assert torch.equal(model.model.get_parameter(name)[: len(weight)], weight), name
    # padding has a token of its own, in the model and in the tokenizer, with an embedding
    assert (
        words.pad_token == PAD and words.pad_token_id == model.config.pad_token_id == vocabulary != words.eos_token_id
    )
    assert model.config.vocab_size == vocabulary + 1 and model.get_input_embeddings().weight[vocabulary].eq(0).all()
    assert not model.training and model.config.num_labels == 1 and model.config.id2label == {0: "reward"}


def test_a_new_head_is_small_random_and_seeded() -> None:
    heads = [load_reward_model("tiny", load_tokenizer("tiny"), seed=s).score.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    big = LlamaConfig(vocab_size=300, hidden_size=4096, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    LlamaForCausalLM(big).save_pretrained("big")
    head = load_reward_model("big", load_tokenizer("tiny")).score.weight
    assert head.std().item() == pytest.approx(4097**-0.5, rel=0.05) and abs(head.mean().item()) < 1e-3


def test_padding_that_is_already_apart_is_kept() -> None:
    words = tokenizer()
    words.add_special_tokens({"unk_token": "<unk>"})
    vocabulary = len(words)
    model = load_reward_model("tiny", words)  # SmolLM2's case: the unknown token is another one
    assert words.pad_token == "<unk>" and model.config.pad_token_id == words.unk_token_id and len(words) == vocabulary
    again = load_reward_model("tiny", words)
    assert words.pad_token == "<unk>" and again.config.pad_token_id == words.unk_token_id


def test_every_token_that_ends_an_answer_is_no_padding() -> None:
    """Qwen's generation config ends answers with <|endoftext|> too, which is its padding."""
    words = tokenizer()
    words.pad_token = "<|system|>"
    load_reward_model("tiny", words, ends=[words.convert_tokens_to_ids("<|system|>")])
    assert words.pad_token == PAD


def saved(folder: Path, **changes: Any) -> Path:
    """A reward model as somebody else would have saved it."""
    words = tokenizer()
    words.add_special_tokens({"pad_token": PAD})
    config = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_labels": 1, "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(3)
    LlamaForSequenceClassification(LlamaConfig(**{**config, **changes})).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_saved_reward_model_is_loaded_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "rm")
    words = load_tokenizer(folder)
    model, plain = load_reward_model(folder, words, seed=9), AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert is_reward_model(folder) and not is_reward_model("tiny") and not is_reward_model("nowhere/at-all")


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    words = tokenizer()
    with pytest.raises(ModelError, match=r"it has 2 numbers, and one number at the last token is expected"):
        load_reward_model(saved(tmp_path / "two", num_labels=2), words)
    with pytest.raises(ModelError, match=r"saved with a padding token that ends answers \(id 1\)"):
        load_reward_model(saved(tmp_path / "eos", pad_token_id=1), words)
    folder = saved(tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]  # of a reward model it is no new head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: 1 parameter.*score\.weight"):
        load_reward_model(folder, words)
    with pytest.raises(ModelError, match=r"is a reward model: it scores answers and cannot write"):
        load_model(folder)
    assert "is a reward model" in trimtab("generate", "Hi", "--model", folder).error
    assert (
        "is a reward model" in trimtab("train", "comparison.jsonl", "--model", folder, "--output", tmp_path / "x").error
    )


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Callable[..., tuple[Path, str]]:
    """(run folder, what was printed) of a method, trained once for all tests of this file."""
    runs: dict[tuple[str, str], tuple[Path, str]] = {}

    def train(method: str, finetune: str = "lora") -> tuple[Path, str]:
        if (method, finetune) not in runs:
            folder = workspace / "trained" / f"{method}-{finetune}"
            words = (
                "--method",
                method,
                "--model",
                "./tiny",
                "--max_steps",
                3,
                "--batch_size",
                4,
                "--precision",
                "float32",
            )
            more = ("--learning_rate", 0.01, "--holdout", 0.4, "--finetune", finetune, "--output", folder)
            runs[method, finetune] = folder, done("train", data_of(method), *words, *more)
        return runs[method, finetune]

    return train


def data_of(method: str) -> str:
    kind = methods()[method].feedback.record.__name__.lower()
    return "ties.jsonl" if methods()[method].ties else f"{kind}.jsonl"


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("method", REWARDS)
def test_every_reward_model_trains_and_is_checked_when_it_is_saved(
    method: str, finetune: str, trained: Callable[..., tuple[Path, str]]
) -> None:
    folder, told = trained(method, finetune)
    assert told.splitlines()[-1] == f"done: {folder}"
    card = json.loads((folder / "run.json").read_text())
    assert card["status"] == "finished" and card["steps"] == 3 and card["reference"] is None
    checks = {check["name"]: check for check in card["checks"]}
    assert list(checks) == [
        "layouts agree with the plain forward pass",
        "scores of the saved model do not depend on the batch",
    ]
    assert all(check["ok"] for check in checks.values()) and "in one batch, padded at the right or at the left" in told
    assert not {"samples", "sample_tokens"} & card["config"].keys() and "samples" not in card
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert not any(key.startswith("logps/") for line in lines for key in line)
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert (folder / "adapter").exists() == (finetune == "lora")
    assert "finished" in (folder / "report.html").read_text()
    if method not in ("score_model", "process_reward"):
        assert "rewards/accuracies" in card["evaluation"]["after"]


PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
out = {}
for folder in sys.argv[3:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = json.load(open(sys.argv[2]))
    found = {"pad": model.config.pad_token_id, "eos": tokenizer.eos_token_id, "same": tokenizer.pad_token_id,
             "attention": model.config._attn_implementation}
    with torch.no_grad():
        for side in ("right", "left"):
            batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
            found[side] = model(**batch).logits[:, 0].tolist()
        alone = [tokenizer(t, return_tensors="pt", add_special_tokens=False) for t in texts]
        found["alone"] = [model(**one).logits[0, 0].item() for one in alone]
    out[folder] = found
assert not [m for m in sys.modules if m.split(".")[0] in ("trimtab", "peft")]
json.dump(out, open(sys.argv[1], "w"))
"""


def test_run_folders_load_in_plain_transformers(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    """In a process that has never heard of trimtab: a score does not depend on the batch, nor on the padding's side, and
    is the one that ``trimtab score`` writes."""
    folders = [trained(method, finetune)[0] for method in REWARDS for finetune in ("lora", "full")]
    records = read("comparison.jsonl").records
    template = Template(AutoTokenizer.from_pretrained(folders[0]))
    texts = [
        template.prompt_text(r.prompt) + template._tail(r.prompt, template.prompt_text(r.prompt), c)
        for r in records
        for c in r.completions
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PLAIN, str(tmp_path / "out.json"), str(tmp_path / "texts.json"), *map(str, folders)]
    subprocess.run(words, check=True, env=environment, capture_output=True, cwd=tmp_path)
    out = json.loads((tmp_path / "out.json").read_text())
    for folder in folders:
        found = out[str(folder)]
        assert found["pad"] == found["same"] != found["eos"] and found["attention"] == "sdpa"
        for side in ("left", "right"):
            assert found[side] == pytest.approx(found["alone"], abs=1e-5)
        assert max(found["alone"]) - min(found["alone"]) > 1e-3
        if "preference_model" in folder.name:
            continue  # it judges pairs, see below
        done("score", "comparison.jsonl", "--policy", folder, "--out", tmp_path / "scores.jsonl")
        assert [s.score for s in read(tmp_path / "scores.jsonl").records] == pytest.approx(found["alone"], abs=1e-5)


def test_something_was_learned_and_the_head_with_it(trained: Callable[..., tuple[Path, str]]) -> None:
    start = load_reward_model("tiny", load_tokenizer("tiny"))
    for finetune in ("lora", "full"):
        model = AutoModelForSequenceClassification.from_pretrained(trained("reward_model", finetune)[0])
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))]
        assert "score.weight" in moved and any("q_proj" in n for n in moved)


def test_a_reward_model_is_trained_further(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    first, _ = trained("reward_model")
    words = ("--method", "reward_model", "--model", first, "--batch_size", 4, "--precision", "float32")
    more = ("--max_steps", 1, "--learning_rate", 1e-9, "--output", tmp_path / "run")
    done("train", "comparison.jsonl", *words, *more)
    old, new = (AutoModelForSequenceClassification.from_pretrained(f) for f in (first, tmp_path / "run"))
    for name, weight in old.named_parameters():
        assert torch.allclose(weight, new.get_parameter(name), atol=1e-6), name
    assert end_tokens(tmp_path / "run") == end_tokens(first) == {1}


def test_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    words = ("comparison.jsonl", "--method", "reward_model", "--model", "./tiny", "--batch_size", 4, "--max_steps", 4)
    more = ("--precision", "float32", "--learning_rate", 0.01, "--save_every", 2, "--keep_checkpoints", 9)
    done("train", *words, *more, "--output", tmp_path / "whole")
    again = shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "checkpoint-4")
    card = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(card | {"status": "interrupted"}))
    done("train", *words, *more, "--output", again, "--resume")
    whole, resumed = (AutoModelForSequenceClassification.from_pretrained(tmp_path / n) for n in ("whole", "again"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_check_finds_padding_that_ends_answers(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    folder = shutil.copytree(trained("reward_model")[0], tmp_path / "broken")
    template = Template(AutoTokenizer.from_pretrained(folder))
    examples = [template.encode(r) for r in read("comparison.jsonl").records[:4]]
    model = load_reward_model(folder, template.tokenizer)
    install(model, torch.float32, "shared")
    scores = Scorer(model, "shared", WHOLE).completions(examples).score
    assert scores_stand_alone(folder, examples, scores, torch.float32).ok
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    found = scores_stand_alone(folder, examples, scores, torch.float32)
    assert not found.ok and "from the run's own scores by" in found.detail
    # a model that does not mask what it pads with depends on the batch
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        scores_stand_alone(folder, examples, scores, torch.float32)


def test_the_saved_adapter_is_the_merged_model(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    folder, _ = trained("reward_model")
    base = load_reward_model("tiny", load_tokenizer("tiny"))
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 9, 30, 12, 1]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load_reward_model("tiny", load_tokenizer("tiny"))
    install(model, torch.float32, "shared")
    before = Scorer(model, "shared", WHOLE).score_all(EXAMPLES)[0][:, 1]
    save_weights(model, tmp_path)
    assert torch.equal(Scorer(model, "shared", WHOLE).score_all(EXAMPLES)[0][:, 1], before)


# --- trimtab score ----------------------------------------------------------------------------------------------------


def test_score_takes_no_reference_and_no_beta(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    folder, _ = trained("reward_model")
    words = ("score", "comparison.jsonl", "--policy", folder, "--out", tmp_path / "r.jsonl")
    for name, value in (("beta", 0.1), ("reference", "./tiny")):
        assert trimtab(*words, f"--{name}", value).error == (
            f'The option "{name}" has no effect here: {folder} is a reward model, which gives the reward itself. Remove it.'
        )
    told = done(*words)
    assert "24 completions scored; the preferred one has the higher reward in " in told
    assert trimtab("score", "comparison.jsonl", "--policy", "./tiny", "--out", tmp_path / "r.jsonl").code == 2


def test_token_rewards_add_up_to_the_score(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    """Spec 32: the sum of token rewards is the sequence reward; here in float64, from float32 numbers."""
    folder, _ = trained("reward_model")
    whole, parts, page = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.html"
    for out, flags in ((whole, ()), (parts, ("--tokens",)), (page, ())):
        done("score", "comparison.jsonl", "--policy", folder, "--out", out, *flags)
    with gzip.open(parts, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [line["score"] for line in lines] == pytest.approx([s.score for s in read(whole).records], abs=1e-12)
    for line in lines:
        assert sum(line["credit"]) == pytest.approx(line["score"], abs=1e-12)
        assert len(line["credit"]) == len(line["tokens"]) > 1
    text = page.read_text()
    assert "what it adds to the number of the reward model" in text and "against" not in text.split("</h1>")[0]
    assert text.count('class="answer"') == 24


def test_a_preference_model_judges_pairs_in_both_orders(
    trained: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    """Against plain transformers: prompt, one answer, its end token, the other answer, its end token."""
    folder, out = trained("preference_model")[0], tmp_path / "judged.jsonl"
    told = done("score", "comparison.jsonl", "--policy", folder, "--out", out)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: FIRST_WINS}
    template = Template(AutoTokenizer.from_pretrained(folder))
    wins, agreed = [], 0
    for record in read("comparison.jsonl").records:
        e = template.encode(record)
        a, b = e.completions
        with torch.no_grad():
            first, second = (
                model(input_ids=torch.tensor([[*e.prompt, *x, *y]])).logits[0, 0] for x, y in ((a, b), (b, a))
            )
        wins.append(((torch.sigmoid(first) + 1 - torch.sigmoid(second)) / 2).item())
        agreed += int((first > 0) != (second > 0))
    judged = read(out).records
    assert [r.strength for r in judged] == pytest.approx(wins, abs=1e-5)
    assert [(r.chosen, r.rejected) for r in judged] == [
        (r.chosen, r.rejected) for r in read("comparison.jsonl").records
    ]
    assert f"the preferred one wins in {sum(w > 0.5 for w in wins)} of 12; both orders agree in {agreed} of 12" in told
    # its judgements are soft labels
    more = ("--max_steps", 1, "--batch_size", 4, "--precision", "float32", "--output", tmp_path / "run")
    done("train", out, "--method", "reward_model", "--strength", "probability", "--model", "./tiny", *more)
    refused = trimtab("score", "score.jsonl", "--policy", folder, "--out", out).error
    assert "holds records of kind score" in refused and "which compares two answers" in refused
    assert trimtab("score", "comparison.jsonl", "--policy", folder, "--out", out, "--tokens").error.startswith(
        "tokens: "
    )


def test_a_process_reward_model_judges_every_step(trained: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    """The label of a step is what plain transformers gives for the text up to its end; their product is at most their
    minimum (spec B.2)."""
    folder, out = trained("process_reward")[0], tmp_path / "judged.jsonl"
    done("score", "solution.jsonl", "--policy", folder, "--out", out)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    template = Template(AutoTokenizer.from_pretrained(folder))
    for said, judged in zip(read("solution.jsonl").records, read(out).records, strict=True):
        e = template.encode(said)
        texts = [[*e.prompt, *e.completions[0][: m + 1]] for m in e.marks]
        with torch.no_grad():
            wanted = [torch.sigmoid(model(input_ids=torch.tensor([t])).logits[0, 0]).item() for t in texts]
        assert judged.steps == said.steps and judged.labels == pytest.approx(wanted, abs=1e-5)
        assert math.prod(judged.labels) <= min(judged.labels)


def test_the_doctor_examines_reward_models_too() -> None:
    told = done("doctor", "ranking.jsonl", "--model", "./tiny", "--method", "k_wise_reward")
    assert "ok: scores of the saved model do not depend on the batch: " in told and "one optimiser step ran; " in told
