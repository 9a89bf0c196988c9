"""What a launcher (``accelerate launch``, ``torchrun``) has asked for, read from what it tells its processes, and refused where
it cannot be had: before anything is loaded."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.config import RunConfig

SHIPPED = Path(__file__).with_name("recipes") / "launch"
WHOLE_FIRST = "every process checks the weights and scores the reference before they are cut into shards"
ON_THE_CPU = "weights on the CPU can neither score nor sample"
# what accelerate tells its processes about FSDP -> (what it must say, its word in the configuration file, why)
FSDP = {
    "FSDP_VERSION": ("2", "fsdp_version", "version 1 is not supported"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading", WHOLE_FIRST),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params", ON_THE_CPU),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "fsdp_activation_checkpointing", "--gradient_checkpointing does that"),
}
# where it tells what a DeepSpeed configuration would say
DEEPSPEED = {
    "zero_optimization.stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "zero_optimization.offload_param.device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}


def launched() -> Literal["alone", "ddp", "fsdp2", "zero"]:
    """How the launcher lays the model on the processes; :class:`ConfigError` for what cannot be had."""
    said = {
        name: os.environ.get(name, "").lower() for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", *FSDP)
    }
    if said["ACCELERATE_USE_DEEPSPEED"] == "true":
        return "zero"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "alone"
    if said["ACCELERATE_USE_FSDP"] != "true":
        return "ddp"
    if not said["FSDP_VERSION"]:  # accelerate's own default
        said["FSDP_VERSION"] = "1"
    for name, (wanted, word, why) in FSDP.items():
        if said[name] not in ("", wanted):
            raise ConfigError(
                f"the launcher has {word}: {said[name]}, and needs {wanted}: {why}. {SHIPPED / '8gpu_fsdp2.yaml'} holds "
                "settings that work."
            )
    return "fsdp2"


def check_launch(config: RunConfig) -> None:
    """Refuse, before anything is loaded, what these processes could not do; :class:`ConfigError`."""
    how, precision = launched(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if how != "alone" and precision != "no":
        raise ConfigError(
            f"the launcher has mixed_precision: {precision}, which would change numbers on top of precision: "
            f"{config.precision}. Set it to 'no' there; precision decides alone."
        )
    stage = _check_zero(config) if how == "zero" else 0
    if (how == "fsdp2" or stage == 3) and config.reference_every is not None:
        raise ConfigError(
            "reference_every moves the reference towards the policy, whose weights lie in shards "
            f"({'ZeRO-3' if stage else 'FSDP2'}). Launch without shards of weights, or remove reference_every."
        )


def _check_zero(config: RunConfig) -> int:
    """The stage of ZeRO, where DeepSpeed can do what this run asks for."""
    if find_spec("deepspeed") is None:
        raise ConfigError("the launcher asks for DeepSpeed, which is not installed: pip install deepspeed.")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ConfigError(
            "the launcher asks for DeepSpeed with one process, which has nobody to share shards with. Start more, or none: "
            "trimtab train without a launcher."
        )
    if config.precision == "float64" or config.weights != "float32":
        told = "precision: float64" if config.precision == "float64" else f"weights: {config.weights}"
        raise ConfigError(
            f"{told} and DeepSpeed: its optimizer holds weights in float32. Remove one of them; FSDP2 "
            f"({SHIPPED / '8gpu_fsdp2.yaml'}) has both."
        )
    file, said = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"), _said()
    stage = int(said.get("zero_optimization.stage", 2))
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"DeepSpeed's stage is {stage}, and needs 1, 2 or 3: without shards, {SHIPPED / '8gpu_ddp.yaml'} is the same."
        )
    alone, whole = "--{} decides alone".format, "batch_size is the whole batch, and token_budget cuts it"
    wanted: dict[str, tuple[tuple[Any, ...], str]] = {
        "zero_optimization.offload_param.device": ((None, "none"), ON_THE_CPU),
        "gradient_clipping": ((None, "auto", config.max_grad_norm), alone("max_grad_norm")),
        "gradient_accumulation_steps": ((None, "auto", 1), whole),
        "train_batch_size": ((None, "auto"), whole),
        "train_micro_batch_size_per_gpu": ((None, "auto"), whole),
        "optimizer.type": ((None,), alone("optimizer")),
        "scheduler.type": ((None,), alone("schedule")),
        "bf16.enabled": ((None, "auto", False), alone("precision")),
        "fp16.enabled": ((None, "auto", False), alone("precision")),
    }
    if stage == 3:
        gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        wanted[gather] = ((True,), "(zero3_save_16bit_model) checkpoints hold the weights whole, too")
        said["zero3_init_flag"] = _value(os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true"))
        wanted["zero3_init_flag"] = ((False,), WHOLE_FIRST)
    for name, (values, why) in wanted.items():
        if (found := said.get(name)) not in values:
            where = f"the launcher ({file})" if file != "none" else "the launcher"
            raise ConfigError(
                f"{where} has {name}: {json.dumps(found)}, and needs {json.dumps(values[-1])}: {why}. "
                f"{SHIPPED / f'8gpu_zero{max(stage, 2)}.yaml'} holds settings that work."
            )
    return stage


def _said() -> dict[str, Any]:
    """Dotted name -> value of the DeepSpeed configuration, from its file where there is one."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return {k: _value(os.environ[name]) for k, name in DEEPSPEED.items() if name in os.environ}
    try:
        return dict(_flat(json.loads(Path(file).read_text())))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"DeepSpeed's configuration {file} cannot be read: {error}. It must be a JSON object."
        ) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _flat(said: Any, before: str = "") -> Any:
    for name, value in said.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value
