"""FSDP2 with two processes on a CPU, launched with the files that trimtab ships: the numbers of one process, and its folder."""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine import worst
from tests.reliability import every_method
from tests.reliability.every_method import Found, assert_same_run, read
from tests.reliability.launch import HERE, environment, free_port, run, with_accelerate
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.launch import DEEPSPEED, FSDP, check_launch, launched
from trimtab.run import train

FILES = Path(str(resources.files("trimtab"))) / "recipes" / "launch"
ZERO = {
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "offload_param_device": "zero_optimization.offload_param.device",
}
# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def shipped(name: str, *more: str) -> list[str]:
    """``accelerate launch`` with a shipped file, for two processes instead of 8."""
    return with_accelerate(2, "--config_file", str(FILES / name), *more)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("sharded")
    code, told = run([*shipped("8gpu_fsdp2.yaml"), str(HERE / "every_method.py"), str(folder), "few"], folder)
    assert code == 0, told[-4000:]
    return read(folder, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return every_method.run(tmp_path_factory.mktemp("one"), every_method.few())


@pytest.mark.parametrize("name", [name for name, *_ in every_method.few()])
def test_shards_are_one_process(name: str, one: Found, two: list[Found]) -> None:
    assert all(found[name]["held"] < one[name]["held"] for found in two)
    assert_same_run(one[name], [found[name] for found in two])


# --- whole runs -----------------------------------------------------------------------------------------------------------

SHARED = {"model": "./model", "precision": "float64", "learning_rate": 0.01, "threads": 1, "save_every": 2}
DPO = {
    **SHARED, "data": "pairs.jsonl", "method": "dpo", "finetune": "full", "batch_size": 4, "max_steps": 3,
    "samples": 2, "sample_tokens": 6, "holdout": 0.3,
}  # fmt: skip
# an adapter that is also the reference, a critic, rounds, and text beside in microbatches
PPO = {
    **SHARED, "data": "prompts.jsonl", "method": "ppo", "judge": "rule:judge.py:odd", "batch_size": 2, "rounds": 2,
    "prompts_per_round": 5, "answers": 3, "sample_tokens": 6, "samples": 0, "ptx_data": "demos.jsonl", "token_budget": 64,
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "other home"))  # the two fill their reference cache themselves
    tiny_folder(tmp_path / "model")
    for name, kind in (("pairs", "comparison"), ("prompts", "prompt"), ("demos", "demonstration")):
        feedback_file(tmp_path / f"{name}.jsonl", kind, 11)
    (tmp_path / "judge.py").write_text("def odd(prompt, answer):\n    return sum(map(ord, answer)) % 11 / 10\n")
    return tmp_path


def words(values: dict[str, Any], *more: str) -> list[str]:
    flags = [w for k, v in {**values, "output": "both"}.items() if k != "data" for w in (f"--{k}", str(v))]
    return ["train", values["data"], *flags, *more]


def assert_same_folder(both: Path, alone: Path, within: float = 1e-9) -> None:
    assert {p.name for p in both.iterdir()} == {p.name for p in alone.iterdir()}
    files = [p.relative_to(alone) for p in (*alone.glob("*.safetensors"), *alone.glob("adapter/*.safetensors"))]
    assert files
    for file in files:
        assert worst(load_file(both / file), load_file(alone / file)) < within


@pytest.mark.usefixtures("here")
def test_two_machines_write_a_plain_folder() -> None:
    """The file for 2 nodes, started as on two machines, with a process each."""
    alone = train(resolve({**DPO, "output": "alone"}))
    port, script = free_port(), [str(HERE / "late.py"), *words(DPO, "--gradient_checkpointing")]
    started = []
    for rank in range(2):
        command = shipped("2nodes_fsdp2.yaml", "--machine_rank", str(rank))
        command[command.index("--main_process_port") + 1] = str(port)
        started.append(
            subprocess.Popen(
                [*command, *script], env=environment(Path.cwd()), stderr=subprocess.PIPE, text=True,
                stdout=subprocess.DEVNULL,
            )
        )  # fmt: skip
    try:
        told = [p.communicate(timeout=240)[1] for p in started]
    finally:
        for p in started:
            p.kill()
            p.wait()
    assert [p.returncode for p in started] == [0, 0], told[0][-3000:] + told[1][-3000:]
    assert_same_folder(Path("both"), alone)
    assert Path("both/samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained("both")
    assert worst(loaded.state_dict(), AutoModelForCausalLM.from_pretrained(alone).state_dict()) < 1e-9
    assert (Path("both") / "checkpoints" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()


@pytest.mark.usefixtures("here")
def test_kill_and_resume_in_shards() -> None:
    alone = train(resolve({**PPO, "output": "alone"}))
    ours = words(PPO, "--gradient_checkpointing")
    code, told = run([*shipped("8gpu_fsdp2.yaml"), str(HERE / "killed.py"), "learning", "5@1", *ours], Path.cwd())
    assert code != 0 and "process 1 of 2" in told and "go on from checkpoint-4 with --resume" in told, told[-3000:]
    code, told = run([*shipped("8gpu_fsdp2.yaml"), str(HERE / "late.py"), *ours, "--resume"], Path.cwd())
    assert code == 0, told[-3000:]
    assert_same_folder(Path("both"), alone)
    rounds = "rounds/0002/records.jsonl"
    assert (Path("both") / rounds).read_bytes() == (alone / rounds).read_bytes()


@pytest.mark.usefixtures("here")
def test_the_file_for_ddp() -> None:
    alone = train(resolve({**DPO, "output": "alone"}))
    code, told = run([*shipped("8gpu_ddp.yaml"), str(HERE / "late.py"), *words(DPO)], Path.cwd())
    assert code == 0, told[-3000:]
    assert_same_folder(Path("both"), alone)


# --- the files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_takes_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own parser knows every word; what it tells the processes is what trimtab can do; the comment says how to start."""
    config = load_config_from_file(str(file))
    said = yaml.safe_load(file.read_text())
    assert {k: v for k, v in config.to_dict().items() if k in said} == said
    assert f"accelerate launch --config_file {file.name} " in file.read_text()
    assert file.read_text().startswith("# ") and config.num_processes == 8 * config.num_machines
    monkeypatch.setenv("WORLD_SIZE", str(config.num_processes))
    if said["distributed_type"] == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        for name, (_, word, _) in FSDP.items():
            monkeypatch.setenv(name, str(said["fsdp_config"][word]).lower())
    if said["distributed_type"] == "DEEPSPEED":
        monkeypatch.setattr("trimtab.launch.find_spec", lambda name: name)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for word, name in {"zero_stage": "zero_optimization.stage", **ZERO}.items():
            monkeypatch.setenv(DEEPSPEED[name], str(said["deepspeed_config"][word]).lower())
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", str(said["deepspeed_config"]["zero3_init_flag"]).lower())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said["mixed_precision"])
    check_launch(resolve({"data": "pairs.jsonl", "method": "dpo"}))
    assert launched() == {"FSDP": "fsdp2", "MULTI_GPU": "ddp", "DEEPSPEED": "zero"}[said["distributed_type"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "has fsdp_version: 1, and needs 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: true, and needs false: every process checks the weights",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "True"}, "fsdp_offload_params"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16, which would change numbers"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(
    names: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve({"data": "nowhere.jsonl", "method": "dpo", "model": "./nowhere"})
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert launched() == "alone"  # one process: nothing is laid out
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        train(config)


def test_a_reference_that_moves_does_not_lie_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve({"data": "nowhere.jsonl", "method": "dpo", "model": "./nowhere", "reference_every": 2})
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="reference_every moves the reference"):
        train(config)
