"""CSFT's control tokens in a whole run: before every answer once, learned, and asked for by whoever loads the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command import done
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.config import resolve
from trimtab.objectives.csft import CSFT
from trimtab.prepare import make_template, prepare

GOOD, BAD = CSFT.control_tokens


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny")
    feedback_file(tmp_path / "thumbs.jsonl", "thumb", 12)


def test_every_answer_has_its_token_once() -> None:
    """HALOs puts it before an answer again each time the answer occurs (spec 30); here even a repeated row has one."""
    rows = Path("thumbs.jsonl").read_text()
    first = json.loads(rows.splitlines()[0])
    again = {**first, "prompt": [{"role": "user", "content": "another"}]}
    Path("thumbs.jsonl").write_text(rows + json.dumps(again) + "\n")
    config = resolve({"data": "thumbs.jsonl", "model": "./tiny", "method": "csft", "holdout": 0.2})
    template = make_template(config)
    data = prepare(config, CSFT(), template)
    good, bad = template.tokenizer.convert_tokens_to_ids([GOOD, BAD])
    assert len(data.train) + len(data.held_out) == 13
    for e in [*data.train, *data.held_out]:
        first_id, *rest = e.completions[0]
        assert first_id == (good if e.record.desirable else bad)  # type: ignore[attr-defined]
        assert good not in rest and bad not in rest and good not in e.prompt
    assert template.prompt_ids(data.train[0].record.prompt) == [*data.train[0].prompt, good]


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_a_run_learns_the_tokens_and_the_saved_model_asks_for_good(finetune: str) -> None:
    flags = ("--max_steps", 3, "--batch_size", 4, "--precision", "float32", "--learning_rate", 0.05)
    done("train", "thumbs.jsonl", "--method", "csft", "--model", "./tiny", "--finetune", finetune, *flags, "--output", "out", "--samples", 2, "--sample_tokens", 4)  # fmt: skip  # noqa: E501
    tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForCausalLM.from_pretrained("out")
    good, bad = tokenizer.convert_tokens_to_ids([GOOD, BAD])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert asked[-1] == good
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert good not in tokenizer.apply_chat_template(said)["input_ids"]
    rows = model.get_input_embeddings().weight.detach()
    assert len(rows) > max(good, bad)
    # the new rows start as the mean of the old ones; training has moved them apart
    assert not torch.allclose(rows[good], rows[bad], atol=1e-3)
    if finetune == "lora":
        old = AutoModelForCausalLM.from_pretrained("tiny").get_input_embeddings().weight.detach()
        assert torch.allclose(rows[: len(old)], old)
