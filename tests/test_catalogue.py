"""Every method of the catalogue is there, with file, test, recipe and card; nothing is there that is not listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import trimtab
from trimtab.cli import app
from trimtab.config import RunConfig, load_yaml, resolve, run_options
from trimtab.objectives import methods

ROOT = Path(trimtab.__file__).parent
TESTS = Path(__file__).parent / "objectives"
CATALOGUE = {
    "demonstrations": ["sft", "csft"],
    "pairs, with reference": [
        "dpo", "cdpo", "robust_dpo", "ipo", "rso", "dpop", "beta_dpo", "gpo", "f_dpo", "tdpo1", "tdpo2", "r_dpo", "ln_dpo",
        "ld_dpo", "exo", "nca", "apo_zero", "apo_down", "dpo_nll", "wpo", "aot", "aot_unpaired", "sppo", "dno", "mpo", "xpo",
    ],
    "pairs, no reference": ["cpo", "orpo", "simpo", "slic"],
    "ties": ["todo"],
    "lists": ["plackett_luce", "lipo", "rrhf", "pro", "info_nca", "nca_list", "exo_list"],
    "thumbs": [
        "kto", "apo_zero_unpaired", "kto_pair", "bco", "bce", "cringe", "pairwise_cringe", "npo", "d2o", "offline_ppo",
    ],
    "scores": ["dro"],
    "reward models": ["reward_model", "reward_model_ties", "k_wise_reward", "score_model", "preference_model", "process_reward"],
    "rollouts": [
        "rloo", "ppo", "reinforce_pp", "remax", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "nash_md",
    ],
}  # fmt: skip
# every online procedure, by the file that runs it; each file runs in tests/online or tests/test_pipeline.py
PROCEDURES = {
    "pipelines/instructgpt": "RLHF",
    "ppo": "PPO with value model, KL, clipping, whitening, missing-EOS rule, PPO-ptx",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "remax": "ReMax",
    "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "dapo": "DAPO", "gspo": "GSPO", "cispo": "CISPO",
    "pipelines/hh_online": "Anthropic's online training",
    "online/iterative_dpo": "iterative DPO with exploration",
    "online/oaif": "online DPO, OAIF",
    "xpo": "XPO",
    "online/pairwise_cringe": "pairwise CRINGE rounds",
    "online/online_todo": "TODO with judged ties",
    "online/online_kto": "KTO from judged thumbs",
    "online/bco_detector": "BCO from a detector's thumbs",
    "online/sppo": "SPPO", "online/dno": "DNO", "nash_md": "Nash-MD",
    "online/rso": "RSO with its rejection sampler",
    "online/slic_hf": "SLiC-HF sample-rank",
    "online/d2o_self": "D2O with self-samples",
    "pipelines/self_rewarding": "self-rewarding",
    "pipelines/constitutional": "Constitutional AI",
    "pipelines/rlaif_distilled": "RLAIF, distilled", "pipelines/rlaif_direct": "RLAIF, direct",
}  # fmt: skip
EVERY = sorted(name for names in CATALOGUE.values() for name in names)
WITH_ANOTHER = {"tdpo1": "tdpo", "tdpo2": "tdpo", "pairwise_cringe": "cringe"}  # tested in one file


def test_none_is_missing_and_none_is_unlisted() -> None:
    assert sorted(methods()) == EVERY


def test_every_procedure_has_a_recipe_and_every_recipe_is_listed() -> None:
    there = {
        f"{folder}/{f.stem}" for folder in ("online", "pipelines") for f in (ROOT / "recipes" / folder).glob("*.yaml")
    }
    assert there == {name for name in PROCEDURES if "/" in name}
    assert {name for name in PROCEDURES if "/" not in name} <= set(EVERY)


def test_they_are_counted() -> None:
    told = CliRunner().invoke(app, ["methods"]).output
    assert f"{len(EVERY)} methods" in told and "11 procedures" in told and "6 pipelines" in told
    assert all(name.partition("/")[2] in told for name in PROCEDURES)


@pytest.mark.parametrize("name", EVERY)
def test_has_a_test_and_a_recipe_that_resolves(name: str) -> None:
    assert (TESTS / f"test_{WITH_ANOTHER.get(name, name)}.py").is_file()
    recipe = ROOT / "recipes" / f"{name}.yaml"
    assert recipe.read_text().startswith("# "), "the first line says where the values come from"
    assert load_yaml(str(recipe))["method"] == name
    assert isinstance(resolve({"data": "x.jsonl"}, str(recipe)), RunConfig)


@pytest.mark.parametrize("name", EVERY)
def test_no_option_hides_one_of_the_run(name: str) -> None:
    import dataclasses

    assert not {f.name for f in dataclasses.fields(methods()[name])} & set(run_options())


@pytest.mark.parametrize("name", EVERY)
def test_a_file_is_at_most_60_lines(name: str) -> None:
    assert len((ROOT / "objectives" / f"{name}.py").read_text().splitlines()) <= 60
