"""A judge by its name on the command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError, nearest
from trimtab.judges.backend import Backend, Endpoint, Local
from trimtab.judges.base import Judge
from trimtab.judges.human import HumanJudge
from trimtab.judges.language import LanguageJudge
from trimtab.judges.model import load_judge, scorer_for
from trimtab.judges.rule import RuleJudge
from trimtab.models import end_tokens, load_model, load_tokenizer
from trimtab.tokens.template import Template

HERE = {"temperature", "max_tokens", "max_length"}  # options of a language model in this process
THERE = {f.name for f in fields(Endpoint) if f.init} - {"url", "model", "sleep"}
ASKING = {f.name for f in fields(LanguageJudge) if f.init} - {"backend"}


def named_judge(name: str) -> Judge:
    """``rule:FILE.py:FUNCTION``, ``rule:MODULE:FUNCTION``, ``model:FOLDER``, ``model:FOLDER,REFERENCE``, ``language:FILE.yaml``,
    ``human:FILE.jsonl``."""
    kind, _, rest = name.partition(":")
    match kind if rest else "":
        case "rule":
            return RuleJudge(rest)
        case "model":
            folder, _, reference = rest.partition(",")
            return load_judge(folder, reference or None)
        case "language":
            return language_judge(Path(rest))
        case "human":
            return HumanJudge(Path(rest), stop_after=1.0)  # an answer that is yet to come is no fault of the judge
        case _:
            raise ConfigError(
                f'judge is "{name}"; expected rule:FILE.py:FUNCTION, rule:MODULE:FUNCTION, model:FOLDER (a reward model), '
                "model:FOLDER,REFERENCE (the implicit reward of an aligned model), language:FILE.yaml (a language model), or "
                "human:FILE.jsonl (a person)."
            )


def language_judge(file: Path) -> LanguageJudge:
    """The language model that a flat YAML file describes: ``model``, ``url`` where it is served, and their options."""
    try:
        said = yaml.safe_load(file.read_text())
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}. Name a YAML file that describes the judge.") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{file}: no YAML ({str(e).splitlines()[0]}).") from e
    if not isinstance(said, dict) or not isinstance(said.get("model"), str):
        raise ConfigError(f"{file}: expected options with their values, and among them model.")
    known = {"model", "url"} | ASKING | (THERE if "url" in said else HERE)
    for option in said:
        if option not in known:
            where = "behind an endpoint" if "url" in said else "in this process (url is not given)"
            hint = nearest(str(option), sorted(known))
            raise ConfigError(f'{file}: the option "{option}" has no effect on a language model {where}.{hint}')
    asking: dict[str, Any] = {k: v for k, v in said.items() if k in ASKING}
    if "clamp" in asking:
        asking["clamp"] = tuple(asking["clamp"])
    more: dict[str, Any] = {k: v for k, v in said.items() if k not in ASKING | {"model", "url"}}
    if "prompt" in asking and asking["prompt"].endswith((".yaml", ".yml")):
        asking["prompt"] = file.parent / asking["prompt"]
    if "principles" in asking:
        asking["principles"] = file.parent / asking["principles"]
    backend: Backend
    if "url" in said:
        backend = Endpoint(said["url"], said["model"], **more)
    else:
        template = Template(load_tokenizer(said["model"]), eos_ids=end_tokens(said["model"]))
        backend = Local(scorer_for(load_model(said["model"]), template), template, **more)
    return LanguageJudge(backend, **asking)
