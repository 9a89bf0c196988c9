"""DeepSpeed's ZeRO with two processes on a CPU: the numbers of one process to the rounding of float32, in which its optimizer
holds the weights, and the same folder."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.reliability import every_method
from tests.reliability.every_method import Found, assert_same_run, read
from tests.reliability.launch import HERE, ROOT, run, with_accelerate
from tests.reliability.test_sharded import DPO, FILES, PPO, assert_same_folder, here, words  # noqa: F401
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.launch import check_launch, launched
from trimtab.run import train

APART = Path(sys.prefix) / "deepspeed"  # where the Makefile installs it
# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
needs_it = pytest.mark.skipif(
    not APART.exists() and find_spec("deepspeed") is None, reason="deepspeed is not installed: make install"
)
WITH_IT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{APART}", "PATH": f"{APART / 'bin'}{os.pathsep}{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
}  # fmt: skip
# by default a tiny model would be held whole, and reduced at once
SMALL = {
    "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000,
    "stage3_max_live_parameters": 3000, "stage3_max_reuse_distance": 0,
}  # fmt: skip
AUTO = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1,
    "gradient_clipping": "auto",
}  # fmt: skip


def zero(stage: int, folder: Path) -> list[str]:
    """``accelerate launch`` of two processes with a DeepSpeed configuration of the user's own."""
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **SMALL}
    (folder / "zero.json").write_text(json.dumps({**AUTO, "zero_optimization": zero}))
    shipped = yaml.safe_load((FILES / "8gpu_zero3.yaml").read_text())
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero.json"), "zero3_init_flag": False}
    del shipped["mixed_precision"]  # the file's, for accelerate
    (folder / "zero.yaml").write_text(yaml.safe_dump(shipped))
    return with_accelerate(2, "--config_file", str(folder / "zero.yaml"))


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["ZeRO-1", "ZeRO-2", "ZeRO-3"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Found]]:
    folder = tmp_path_factory.mktemp("zero")
    script = [str(HERE / "every_method.py"), str(folder), "few", "float32"]
    # the first start compiles for a minute where there is a compiler
    code, told = run([*zero(request.param, folder), *script], folder, seconds=600, more=WITH_IT)
    assert code == 0, told[-4000:]
    return request.param, read(folder, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return every_method.run(tmp_path_factory.mktemp("one"), every_method.few(), torch.float32)


@needs_it
@pytest.mark.parametrize("name", [name for name, *_ in every_method.few()])
def test_zero_is_one_process(name: str, one: Found, two: tuple[int, list[Found]]) -> None:
    stage, each = two
    assert all(found[name]["zero"] == stage for found in each)
    assert all((found[name]["held"] == 0) == (stage == 3) for found in each)  # between steps
    assert_same_run(one[name], [found[name] for found in each], within=1e-5)


# --- whole runs -----------------------------------------------------------------------------------------------------------


@needs_it
@pytest.mark.usefixtures("here")
def test_the_shipped_file_writes_a_plain_folder() -> None:
    ours = {**DPO, "precision": "float32"}
    alone = train(resolve({**ours, "output": "alone"}))
    command = with_accelerate(2, "--config_file", str(FILES / "8gpu_zero2.yaml"))
    code, told = run([*command, str(HERE / "late.py"), *words(ours)], Path.cwd(), more=WITH_IT)
    assert code == 0, told[-3000:]
    assert_same_folder(Path("both"), alone, within=1e-4)
    assert Path("both/samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


@needs_it
@pytest.mark.usefixtures("here")
def test_kill_and_resume_in_zero_3() -> None:
    """An adapter that is also the reference, a critic, rounds, text beside in microbatches."""
    ours = {**PPO, "precision": "float32"}
    alone = train(resolve({**ours, "output": "alone"}))
    said, command = words(ours, "--gradient_checkpointing"), zero(3, Path.cwd())
    code, told = run([*command, str(HERE / "killed.py"), "learning", "5@1", *said], Path.cwd(), more=WITH_IT)
    assert code != 0 and "process 1 of 2" in told and "go on from checkpoint-4 with --resume" in told, told[-3000:]
    command = zero(3, Path.cwd())
    code, told = run([*command, str(HERE / "late.py"), *said, "--resume"], Path.cwd(), more=WITH_IT)
    assert code == 0, told[-3000:]
    assert_same_folder(Path("both"), alone, within=1e-4)
    rounds = "rounds/0002/records.jsonl"
    assert (Path("both") / rounds).read_bytes() == (alone / rounds).read_bytes()


@needs_it
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_no_number_changes_nothing(stage: int) -> None:
    ours = {**DPO, "precision": "float32", "learning_rate": 1e3, "warmup": 0, "max_grad_norm": 0}
    command = zero(stage, Path.cwd())
    code, told = run([*command, str(HERE / "late.py"), *words(ours)], Path.cwd(), more=WITH_IT)
    assert code != 0 and "step 2: the gradient norm is inf although every loss is finite" in told, told[-3000:]
    assert "Nothing was updated in this step" in told


# --- what is refused ------------------------------------------------------------------------------------------------------

PLAIN = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ({"WORLD_SIZE": "1"}, {}, "DeepSpeed with one process, which has nobody to share shards with"),
        ({}, {"precision": "float64"}, "precision: float64 and DeepSpeed: its optimizer holds weights in float32"),
        ({}, {"weights": "bfloat16"}, "weights: bfloat16 and DeepSpeed"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "stage is 0, and needs 1, 2 or 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, 'offload_param.device: "cpu", and needs "none"'),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping: 0.5, and needs 1.0: --max_grad_norm decides"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation_steps: 4, and needs 1: batch_size"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "has mixed_precision: bf16"),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
            {},
            r"on_model_save: false, and needs true: \(zero3_save_16bit_model\) checkpoints hold",
        ),
        (
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            },
            {},
            "zero3_init_flag: true, and needs false: every process checks the weights",
        ),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
            {"reference_every": 2},
            r"reference_every moves the reference towards the policy, whose weights lie in shards \(ZeRO-3\)",
        ),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, {}, "configuration nowhere.json cannot be read"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused_before_anything_is_loaded(
    names: dict[str, str], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve({"data": "nowhere.jsonl", "method": "dpo", "model": "./nowhere", **options})
    monkeypatch.setattr("trimtab.launch.find_spec", lambda name: name)
    for name, value in {**PLAIN, **names}.items():
        monkeypatch.setenv(name, value)
    assert launched() == "zero"
    with pytest.raises(ConfigError, match=message):
        train(config)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, r'has optimizer.type: "AdamW", and needs null: --optimizer decides alone'),
        ({"scheduler": {"type": "WarmupLR"}}, "--schedule decides alone"),
        ({"bf16": {"enabled": True}}, "has bf16.enabled: true, and needs false: --precision decides alone"),
        ({"train_batch_size": 32}, 'has train_batch_size: 32, and needs "auto": batch_size is the whole batch'),
    ],
)
def test_a_deepspeed_file_that_decides_what_trimtab_decides(
    more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.launch.find_spec", lambda name: name)
    file = tmp_path / "zero.json"
    for name, value in {**PLAIN, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    config = resolve({"data": "pairs.jsonl", "method": "dpo"})
    file.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 2}}))
    check_launch(config)
    file.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 2}, **more}))
    with pytest.raises(ConfigError, match=message):
        check_launch(config)


def test_deepspeed_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.launch.find_spec", lambda name: None)
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="DeepSpeed, which is not installed: pip install deepspeed"):
        check_launch(resolve({"data": "pairs.jsonl", "method": "dpo"}))
