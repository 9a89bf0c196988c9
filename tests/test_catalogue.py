"""Every method of the catalogue is there, with file, test, recipe and card; nothing is there that is not listed."""

from __future__ import annotations

from pathlib import Path

import pytest

import trimtab
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
EVERY = sorted(name for names in CATALOGUE.values() for name in names)
WITH_ANOTHER = {"tdpo1": "tdpo", "tdpo2": "tdpo", "pairwise_cringe": "cringe"}  # tested in one file


def test_none_is_missing_and_none_is_unlisted() -> None:
    assert sorted(methods()) == EVERY


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
