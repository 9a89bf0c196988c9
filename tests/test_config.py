"""The configuration: one flat list of options, typed, in range, and each with an effect."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.config import OPTIMIZERS, SCHEDULES, RunConfig, load_yaml, resolve, run_options, without_effect
from trimtab.errors import ConfigError
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives import methods

JUDGED = {"judge": "rule:judge.py:brief"}
RECIPES = sorted((Path(__file__).parent.parent / "trimtab" / "recipes").glob("*.yaml"))


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve({"data": "x.jsonl", **values})
    return str(caught.value)


# --- names and types --------------------------------------------------------------------------------------------------


def test_text_becomes_what_the_option_is() -> None:
    """A flag is text; YAML brings numbers. Both give the same configuration."""
    flags = {"beta": "0.2", "seed": "7", "learning_rate": "1e-4", "resume": "true", "output": "r", "holdout": "0.5"}
    numbers = {"beta": 0.2, "seed": 7, "learning_rate": 1e-4, "resume": True, "output": "r", "holdout": 0.5}
    assert resolve({"data": "x", **flags}) == resolve({"data": "x", **numbers})
    found = resolve({"data": "x", **flags})
    assert (found.seed, found.learning_rate, found.resume, found.options) == (7, 1e-4, True, {"beta": 0.2})
    assert found.objective().beta == 0.2


def test_yaml_writes_small_numbers_without_a_point(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text; it is still a number here."""
    file = tmp_path / "run.yaml"
    file.write_text("data: x.jsonl\nlearning_rate: 1e-4\nbeta: 5e-2\n")
    found = resolve({}, str(file))
    assert found.learning_rate == 1e-4 and found.options == {"beta": 0.05}


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: x.jsonl\nmethod: simpo\nbeta: 2.0\nseed: 3\n")
    assert resolve({"seed": 4}, str(file)).seed == 4
    assert resolve({"data": "y"}, str(file)).data == "y"
    found = resolve({"method": "dpo"}, str(file))
    assert found.method == "dpo" and found.options == {"beta": 2.0}


def test_codes_and_columns_may_be_numbers_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: x.jsonl\nlabels: {1: first, 2: second, 0: tie}\ncolumns: {prompt: question}\n")
    found = resolve({}, str(file))
    assert found.labels == {"1": "first", "2": "second", "0": "tie"} and found.columns == {"prompt": "question"}


@pytest.mark.parametrize("method", methods())
def test_the_resolved_configuration_gives_itself_again(method: str, tmp_path: Path) -> None:
    partner = {"partner_mix": 1, "answers": 1} if methods()[method].partner else {}
    online = methods()[method].feedback is Rollouts or bool(partner)
    more: dict[str, Any] = {**JUDGED, **partner} if online else {}
    short = {"rounds": 3} if online else {"max_steps": 3}
    for values in ({}, {"finetune": "full"}, short, {"samples": 0, "holdout": 0}, {"template": "plain"}):
        config = resolve({"data": "x.jsonl", "method": method, **more, **values})
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config.flat()))
        assert resolve({}, str(file)).flat() == config.flat()
        assert {f.name for f in dataclasses.fields(config.objective())} <= config.flat().keys()


def test_the_resolved_configuration_lists_only_what_has_an_effect() -> None:
    """PAINS row 14: the run record lists the options with effect."""
    assert "lora_rank" in resolve({"data": "x"}).flat()
    assert "lora_rank" not in resolve({"data": "x", "finetune": "full"}).flat()
    assert "reference" not in resolve({"data": "x", "method": "simpo"}).flat()
    assert "epochs" not in resolve({"data": "x", "max_steps": 1}).flat()
    assert not {"tie_threshold", "score_threshold"} & resolve({"data": "x"}).flat().keys()


@pytest.mark.parametrize("method", methods())
def test_no_option_of_a_method_hides_one_of_the_run(method: str) -> None:
    assert not {f.name for f in dataclasses.fields(methods()[method])} & set(run_options())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": "x"}, 'dpo: beta is "x"; expected a number.'),
        ({"beta": True}, 'dpo: beta is "True"; expected a number.'),
        ({"beta": [1]}, 'dpo: beta is "[1]"; expected a number.'),
        ({"beta": "nan"}, "dpo: beta is nan; expected a number above 0."),
        ({"beta": "inf"}, "dpo: beta is inf; expected a number above 0."),
        ({"beta": 0}, "dpo: beta is 0.0; expected a number above 0."),
        ({"method": "robust_dpo", "flip_rate": 0.5}, "expected a number at least 0 and below 0.5."),
        ({"method": "sft", "normalise": "tokens"}, 'sft: normalise is "tokens"; expected one of token, '),
        ({"seed": -1}, 'seed: input should be greater than or equal to 0, found "-1".'),
        ({"seed": 1.5}, "seed: input should be a valid integer, got a number with a fractional part"),
        ({"holdout": 1}, 'holdout: input should be less than 1, found "1".'),
        ({"max_length": 8}, 'max_length: input should be greater than or equal to 16, found "8".'),
        ({"truncation": "cut"}, "truncation: input should be 'drop', 'prompt' or 'completion', found \"cut\"."),
        ({"resume": "maybe"}, 'resume: input should be a valid boolean, unable to interpret input, found "maybe".'),
        ({"labels": "1"}, 'labels: input should be a valid dictionary, found "1".'),
        ({"max_steps": 0}, "max_steps is 0, which trains nothing."),
        ({"batch_size": 0}, "batch_size: input should be greater than or equal to 1"),
    ],
)
def test_wrong_value(values: dict[str, Any], message: str) -> None:
    assert refusal(**values).startswith(message) or message in refusal(**values)


def test_several_wrong_values_are_told_together() -> None:
    found = refusal(seed=-1, holdout=2, finetune="none")
    assert found.count(", found ") == 3 and "\n" not in found


def test_data_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"^data: field required\.$"):
        resolve({})


@pytest.mark.parametrize(
    ("name", "near"),
    [("betas", "beta"), ("learningrate", "learning_rate"), ("lr_rank", "lora_rank"), ("batchsize", "batch_size")],
)
def test_unknown_option_has_a_nearest(name: str, near: str) -> None:
    assert refusal(**{name: 1}).startswith(f'There is no option "{name}". Did you mean "{near}"?')


def test_unknown_option_without_a_nearest() -> None:
    assert refusal(qqqqq=1) == 'There is no option "qqqqq". See `trimtab train --options` and `trimtab methods dpo`.'


# --- options without effect -------------------------------------------------------------------------------------------

WITHOUT_EFFECT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # (the option, what takes its effect away)
    ({"reference": "copy"}, {"method": "simpo"}),
    ({"cache": "c"}, {"method": "sft"}),
    ({"cache": "c"}, {"reference": "copy"}),
    ({"cache": "c"}, {"finetune": "lora"}),
    ({"lora_rank": 4}, {"finetune": "full"}),
    ({"lora_alpha": 4}, {"finetune": "full"}),
    ({"lora_targets": "q_proj"}, {"finetune": "full"}),
    ({"ties": "drop"}, {"method": "todo"}),
    ({"chat_template": "t"}, {"template": "plain"}),
    ({"eos": "append"}, {"template": "plain"}),
    ({"sample_tokens": 4}, {"samples": 0}),
    ({"eval_every": 4}, {"holdout": 0}),
    ({"keep_checkpoints": 4}, {}),
    ({"epochs": 4}, {"max_steps": 3}),
    ({"warmup": 0.5}, {"schedule": "constant"}),
    ({"tie_threshold": 1}, {}),
    ({"score_threshold": 1}, {}),
    ({"match_prompts": "tfidf"}, {"method": "kto"}),
    ({"min_density_ratio": 1}, {"method": "bco"}),
    ({"max_density_ratio": 1}, {"method": "bco"}),
    ({"samples": 4}, {"method": "reward_model"}),
    ({"l1": 0.1}, {"finetune": "full"}),
    ({"reference_every": 5}, {"method": "simpo"}),
    ({"reference_mix": 0.5}, {}),
    ({"ptx_weight": 2.0}, {}),
    ({"ptx_batch_size": 4}, {}),
    *(({name: value}, {}) for name, value in {
        "rounds": 2, "prompts_per_round": 4, "answers": 2, "passes": 2, "sample_temperature": 0.7, "keep_rounds": "all",
        "redraw": 1, "end_penalty": 1.0, "token_penalty": 0.1, "overlong_buffer": 4, "overlong_penalty": 2.0,
        "largest_gap": 0.2, "correct_sampling": 2.0, "partner_mix": 0.5, "keep_answers": 2, "keep_beta": 1.0,
        "test_judge": "rule:judge.py:other", "watch_every": 2,
        "sampler": "http://127.0.0.1:1/v1", "sampler_model": "m", "sampler_reload": "vllm",
    }.items()),
    *(({name: value}, JUDGED) for name, value in {
        "epochs": 2, "max_steps": 3, "convert": "thumb", "match_prompts": "tfidf", "eval_every": 3, "truncation": "prompt",
        "max_truncated": 0.5, "ties": "drop", "score_threshold": 1, "largest_gap": 0.2, "correct_sampling": 2.0,
        "sampler_model": "m", "sampler_reload": "vllm",
    }.items()),
    ({"pairs": "all"}, {**JUDGED, "method": "kto"}),
    ({"tie_threshold": 0.1}, {**JUDGED, "method": "kto"}),
    ({"overlong_penalty": 2.0}, {**JUDGED, "method": "rloo"}),
    ({"keep_answers": 2}, {**JUDGED, "method": "rloo"}),
    ({"keep_beta": 1.0}, {**JUDGED, "method": "rloo"}),
    ({"keep_beta": 1.0}, JUDGED),
    ({"watch_every": 2}, JUDGED),
]  # fmt: skip


@pytest.mark.parametrize(("option", "other"), WITHOUT_EFFECT)
def test_option_without_effect_is_refused(option: dict[str, Any], other: dict[str, Any]) -> None:
    (name,) = option
    found = refusal(**option, **other)
    assert found.startswith(f'The option "{name}" has no effect here: ') and found.endswith(" Remove it.")
    resolve({"data": "x", **other})  # alone, each is fine


def test_every_option_of_the_table_is_tested() -> None:
    """All that can be without effect: the union over configurations that switch everything off."""
    idle: set[str] = set()
    for values in ({"method": "sft", "finetune": "full", "template": "plain", "samples": 0, "holdout": 0},):
        idle |= set(without_effect(resolve({"data": "x", **values})))
    idle |= set(without_effect(resolve({"data": "x", "method": "todo", "max_steps": 1, "schedule": "constant"})))
    idle |= set(without_effect(resolve({"data": "x", "method": "reward_model"})))
    idle |= set(without_effect(resolve({"data": "x", "method": "kto", **JUDGED})))
    assert idle == {name for option, _ in WITHOUT_EFFECT for name in option}


def test_an_option_of_another_method_names_its_owners() -> None:
    assert refusal(flip_rate=0.1).startswith('The option "flip_rate" has no effect for method dpo; it belongs to ')
    assert "robust_dpo" in refusal(flip_rate=0.1)


def test_null_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: x.jsonl\ntie_threshold: null\nmethod: simpo\ncache: ~\n")
    assert resolve({}, str(file)).tie_threshold is None


def test_what_cannot_be_done() -> None:
    assert refusal(method="mpo", parts="1.0 * dpo + 1.0 * reward_model").startswith(
        "mpo would need a reward model and log-probs at once (reference, score)"
    )
    assert refusal(finetune="full", reference="adapter") == (
        "reference: adapter needs finetune: lora; with full use copy or cache."
    )
    assert refusal(resume=True).startswith("resume needs output: the run folder to go on with")
    assert refusal(method="kto", batch_size=1).startswith("kto compares each answer with another row's in the batch")
    assert resolve({"data": "x", "finetune": "full", "cache": "c"}).cache == "c"


def test_a_test_judge_that_cannot_be() -> None:
    assert refusal(**JUDGED, test_judge=JUDGED["judge"]).startswith(
        "test_judge is rule:judge.py:brief, too: it is fooled"
    )
    assert refusal(**JUDGED, test_judge="rule:a:b", samples=1).startswith(
        "samples is 1, and test_judge looks at that many"
    )
    found = resolve({"data": "x", "test_judge": "rule:a:b", "watch_every": 3, **JUDGED}).flat()
    assert found["test_judge"] == "rule:a:b" and found["watch_every"] == 3


def test_a_choice_among_answers_that_cannot_be() -> None:
    assert refusal(**JUDGED, keep_answers=4) == (
        "keep_answers is 4 of 4 answers: there is nothing to choose. Raise answers, or remove it."
    )
    assert refusal(**JUDGED, keep_answers=1) == (
        "keep_answers is 1, and dpo compares answers with each other. Keep at least 2."
    )
    assert refusal(**JUDGED, keep_answers=2, partner_mix=0.5).startswith(
        "keep_answers chooses among answers of the policy"
    )
    assert refusal(**JUDGED, keep_answers=3, keep_beta=0).startswith("keep_beta: input should be greater than 0")
    assert resolve({"data": "x", "method": "kto", "keep_answers": 1, **JUDGED}).keep_answers == 1
    assert resolve({"data": "x", "keep_answers": 3, "keep_beta": 2, **JUDGED}).flat()["keep_beta"] == 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_one_of_transformers(name: str) -> None:
    from torch.nn import Linear
    from torch.optim import SGD
    from transformers import get_scheduler

    optimizer = SGD(Linear(1, 1).parameters(), lr=1.0)
    get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
    assert resolve({"data": "x", "schedule": name}).schedule == name


def test_names_that_transformers_owns() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {str(o.value) for o in OptimizerNames}
    assert refusal(schedule="cosin").startswith('schedule is "cosin". Did you mean "cosine"? Known: linear, ')
    assert refusal(optimizer="adam").startswith('optimizer is "adam".')
    for option, package in (("optimizer", "bitsandbytes"), ("report_to", "wandb")):
        if importlib.util.find_spec(package) is None:
            value = "adamw_8bit" if option == "optimizer" else package
            assert refusal(**{option: value}) == (
                f"{option}: {value} needs a package that is not installed: pip install {package}."
            )


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_configuration(recipe: Path) -> None:
    config = resolve({"data": "x.jsonl"}, str(recipe))
    assert config.method == recipe.stem
    assert set(load_yaml(str(recipe))) <= config.flat().keys(), "an option without effect"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "{}: expected a flat list of `option: value`, found list."),
        ("", "{}: expected a flat list of `option: value`, found NoneType."),
        ("model:\n  name: x\n", '{}: "model" holds a dict, expected one value. The file is flat: write each option '),
        ("beta: [0.1, 0.2]\n", '{}: "beta" holds a list, expected one value.'),
        ("a: b: c\n", "{} is not YAML: mapping values are not allowed here in "),
        ("data: x\nbetta: 1\n", 'There is no option "betta". Did you mean "beta"?'),
    ],
)
def test_yaml_that_is_not_a_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve({}, str(file))
    assert str(caught.value).startswith(message.format(file)) and "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not text\."):
        load_yaml(str(tmp_path / "binary.yaml"))
    with pytest.raises(ConfigError, match=r"none\.yaml is not a file, and no recipe has that name\. Pass --config"):
        load_yaml(str(tmp_path / "none.yaml"))


def test_every_option_is_described() -> None:
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert name == name.lower() and "-" not in name


def test_a_recipe_is_named_and_the_users_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve({"data": "x.jsonl"}, "online/oaif").judge == "language:judge.yaml"
    with pytest.raises(ConfigError, match='no recipe has that name. Did you mean "online/oaif"'):
        resolve({"data": "x.jsonl"}, "online/oaf")
    monkeypatch.chdir(tmp_path)
    Path("simpo").write_text("method: dpo\nbeta: 0.7\n")
    assert resolve({"data": "x.jsonl"}, "simpo").method == "dpo"
