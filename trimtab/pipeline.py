"""Several runs as one: each stage starts where the one before ended. SFT then any method, sDPO, PAFT, RLHF are such files.

    output: runs/rlhf
    model: smollm2
    stages:
      - {name: sft, method: sft, data: demos.jsonl}
      - {name: reward, method: reward_model, data: prefs.jsonl}                    # starts from "sft"
      - {name: rl, method: rloo, data: prompts.jsonl, from: sft, judge: model:reward}

A stage is a training run (its options are those of ``trimtab train``), or what ``do`` says:

    split      cuts a file of comparisons into parts, easy to hard
    merge      merges the models of earlier stages
    label      lets a judge look at the answers of a file, or at answers that the model gives now
    revise     answers, criticises and revises (Constitutional AI's supervised stage)
    instruct   writes new prompts after a few (self-instruct)

``from: NAME`` or ``from: start`` says which model a stage starts from or asks; the default is that of the last stage that made
one. ``data: NAME`` is what the stage NAME wrote (``OUTPUT/NAME/records.jsonl``), ``data: NAME/FILE`` is
``OUTPUT/NAME/FILE.jsonl``; a list of files is joined. ``judge: model:NAME`` is the stage's model, and a mapping in place of a
judge's name describes a language model. The whole file is checked before the first stage begins, and a stage that is finished
is not done again.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from trimtab import run
from trimtab.config import resolve
from trimtab.errors import ConfigError, DataError, JudgeError, nearest
from trimtab.feedback.convert import convert, settle_ties
from trimtab.feedback.kinds import name_of
from trimtab.feedback.read import read, write
from trimtab.feedback.records import Comparison, Demonstration, Prompt, Record
from trimtab.judges.backend import Backend, unreadable
from trimtab.judges.base import Failure
from trimtab.judges.cached import Cached
from trimtab.judges.human import WAITING
from trimtab.judges.label import label as judged
from trimtab.judges.named import ASKING, HERE, THERE, language_judge, named_judge
from trimtab.judges.prompt import load_prompt
from trimtab.merge import merge
from trimtab.models import ALIASES
from trimtab.online import instruct as instructing
from trimtab.online import revise as revising
from trimtab.prepare import make_template, read_records
from trimtab.report.text import visible
from trimtab.score_file import completion_logps
from trimtab.tokens.template import tokenize

SHIPPED = Path(__file__).parent / "recipes" / "pipelines"
MODELS = ("train", "merge")  # kinds of stages that end with a model
FILES = ("data", "ptx_data")  # options that name feedback files
CARD = "stage.json"  # of a stage that is finished and no run


def run_pipeline(file: Path, command: str, console: Console) -> Path:
    """Run the stages of a YAML file, or of a shipped one by its name, in order; returns the folder of the last one.

    Raises:
        ConfigError: the file says what cannot be: an unknown stage, file, judge or option, before any stage begins.
        KeyboardInterrupt: a stage was interrupted; the same command goes on with it.
    """

    def say(text: str) -> None:
        console.print(Text(visible(text)), soft_wrap=True)

    plan = _read(file)
    output, stages = Path(str(plan.pop("output"))), plan.pop("stages")
    steps = _checked(plan, stages, output)
    output.mkdir(parents=True, exist_ok=True)
    for step in steps:
        say(f"stage {step.name}: {step.kind}")
        if _finished(step.folder):
            say(f"  done before: {step.folder}")
            continue
        step.settle(say)
        match step.kind:
            case "train":
                resumed = any((step.folder / "checkpoints").glob("checkpoint-*"))
                more = {"resume": True} if resumed else {}
                run.train(resolve(step.options | more), command=command, console=console)
                if not _finished(step.folder):
                    raise KeyboardInterrupt
            case "merge":
                say(f"  {merge(step.model, step.models, step.folder, **step.options)}")
            case kind:
                for line in STAGES[kind](step.model, step.folder, **step.options).splitlines():
                    say(f"  {line}")
    return steps[-1].folder


@dataclass
class _Step:
    """A stage with its names resolved: options as the code that runs it takes them, files as lists."""

    name: str
    kind: str
    model: str
    folder: Path
    options: dict[str, Any]
    models: list[str] = field(default_factory=list)
    described: dict[Path, dict[str, Any]] = field(default_factory=dict)  # files to write, that describe language models

    def settle(self, say: Callable[[str], None]) -> None:
        """Make the files that the stage reads: descriptions of language models, and joined feedback."""
        for path, said in self.described.items():
            path.write_text(yaml.safe_dump(said, sort_keys=False))
        for key in FILES:
            if isinstance(files := self.options.get(key), list):
                as_prompts = self.kind == "train" and key == "data" and "judge" in self.options
                joined = self.folder.with_name(f"{self.name}.{key}.jsonl")
                say(f"  {_join(files, joined, as_prompts)}")
                self.options[key] = str(joined)


# --- reading the file, and checking all of it -----------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    shipped = SHIPPED / f"{file}.yaml"
    known = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
    try:
        plan = yaml.safe_load((shipped if str(file) in known and not file.exists() else file).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{file} is not there.{nearest(str(file), known)} Name a YAML file with stages, or one that is shipped: "
            f"{', '.join(known)}."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(e).split())}.") from e
    stages = plan.get("stages") if isinstance(plan, dict) else None
    if not isinstance(stages, list) or not stages or "output" not in plan:
        raise ConfigError(
            f"{file}: expected `output: FOLDER` and `stages:` with one entry or more; see `trimtab pipeline`."
        )
    seen: set[str] = {"start"}
    for i, stage in enumerate(stages, 1):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or name in seen or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"{file}: stage {i} needs a name of its own (letters, digits, - and _), found {name!r}.")
        if stage.get("do", "train") not in KINDS:
            raise ConfigError(f'{file}: stage "{name}" says do: {stage["do"]}; expected one of {", ".join(KINDS)}.')
        seen.add(name)
    return plan  # type: ignore[no-any-return]


def _checked(plan: dict[str, Any], stages: Sequence[dict[str, Any]], output: Path) -> list[_Step]:
    """All stages with their names resolved; what can be known to be wrong before anything is run is said here."""
    start = str(plan.get("model", "smollm2"))
    names = _Names(output, {"start": start}, set(), {s["name"] for s in stages})
    common = {k: v for k, v in plan.items() if k != "model"}
    latest, steps = "start", list[_Step]()
    for stage in stages:
        name, kind, origin = stage["name"], stage.get("do", "train"), str(stage.get("from", latest))
        given = {k: v for k, v in stage.items() if k not in ("name", "do", "from")}
        if "model" in given:
            raise ConfigError(f'stage "{name}": model has no effect; from: NAME says which model it starts from.')
        step = _Step(name, kind, names.model(name, "from", origin), output / name, given)
        for key in FILES:
            if key in given:
                given[key] = names.files(name, key, given[key])
        for key in ("judge", "test_judge"):
            if key in given:
                given[key] = names.language(step, key, given[key])
        match kind:
            case "train":
                step.options = {**common, **given, "model": step.model, "output": str(step.folder)}
                alone = {k: v[0] if k in FILES and isinstance(v, list) else v for k, v in step.options.items()}
                try:
                    resolve(alone)
                except ConfigError as e:
                    raise ConfigError(f'stage "{name}": {e}') from e
            case "merge":
                _refuse_unknown(step, merge, {"start", "models", "out"}, {"models"})
                step.models = [names.model(name, "models", str(m)) for m in given.pop("models")]
            case "split" | "label" | "revise" | "instruct":
                from trimtab.cli import CONVERTING, READING

                more = {"split": None, "label": {*READING, *CONVERTING}}.get(kind, set(READING))
                _refuse_unknown(step, STAGES[kind], {"model", "out"}, more)
                if kind in ("revise", "instruct") or "answers" in given:
                    given["writer"] = names.language(step, "writer", given.get("writer", {}))
                elif "writer" in given:
                    raise ConfigError(f'stage "{name}": writer has no effect without answers: nothing is written.')
        steps.append(step)
        names.seen.add(name)
        if kind in MODELS:
            names.models[name], latest = str(step.folder), name
    return steps


def _refuse_unknown(step: _Step, run_it: Callable[..., str], own: set[str], more: set[str] | None) -> None:
    """Options that the stage does not have, and those that it lacks; ``more`` None: what else there is, it checks itself."""
    named = {k: p for k, p in inspect.signature(run_it).parameters.items() if p.kind is not p.VAR_KEYWORD}
    known = sorted((set(named) - own) | (more or set()))
    for option in step.options:
        if more is not None and option not in known:
            raise ConfigError(
                f'stage "{step.name}": the option "{option}" has no effect on do: {step.kind}.{nearest(option, known)} '
                f"Options there: {', '.join(known)}."
            )
    needed = {k for k, p in named.items() if p.default is p.empty} - own - {"writer"} | (
        {"models"} if step.kind == "merge" else set()
    )
    if lacking := sorted(needed - set(step.options)):
        raise ConfigError(f'stage "{step.name}": do: {step.kind} needs {", ".join(lacking)}.')


@dataclass
class _Names:
    """What a name in the file means: ``models`` of the stages so far, all stages so far, and all there will be."""

    output: Path
    models: dict[str, str]
    seen: set[str]
    all: set[str]

    def model(self, stage: str, what: str, name: str) -> str:
        """The folder of a stage that made a model."""
        if name in self.models:
            return self.models[name]
        where = f'stage "{stage}": {what} is "{name}"'
        self._refuse_stage(where, name)
        known = list(self.models)
        raise ConfigError(f"{where}.{nearest(name, known)} Known: {', '.join(known)}.")

    def any_model(self, stage: str, what: str, name: str) -> str:
        """The folder of a stage, or a model from elsewhere."""
        if name in self.models:
            return self.models[name]
        where, path = f'stage "{stage}": {what} names "{name}"', Path(name).expanduser()
        self._refuse_stage(where, name)
        if path.is_dir():
            if (path / "run.json").is_file() and not _finished(path):
                raise ConfigError(f"{where}, a run that is not finished. Finish it first, or name another.")
        elif "/" not in name and name not in ALIASES and (hint := nearest(name, list(self.models))):
            raise ConfigError(f"{where}, which is no stage and no folder.{hint} Known: {', '.join(self.models)}.")
        return name

    def _refuse_stage(self, where: str, name: str) -> None:
        if name in self.seen:
            raise ConfigError(f"{where}, a stage that makes no model. Known: {', '.join(self.models)}.")
        if name in self.all:
            raise ConfigError(f"{where}, which is not done at that point. Known: {', '.join(self.models)}.")

    def files(self, stage: str, key: str, value: Any) -> Any:
        """Feedback files by path or by stage: one, or a list."""
        if isinstance(value, list) and value:
            return [self.files(stage, key, v) for v in value]
        if not isinstance(value, str):
            raise ConfigError(f'stage "{stage}": {key} is {value!r}; expected a file, a stage, or a list of them.')
        first, _, rest = value.partition("/")
        if value.startswith("hub:") or Path(value).is_file():
            return value
        if first in self.seen:
            return str(self.output / first / f"{(rest or 'records').removesuffix('.jsonl')}.jsonl")
        where = f'stage "{stage}": {key} is "{value}"'
        if first in self.all:
            raise ConfigError(f"{where}, which is not done at that point.")
        if not Path(value).is_relative_to(self.output):  # what is in there may be yet to come
            hint = nearest(first, sorted(self.seen))
            raise ConfigError(f"{where}: no such file, and no stage before it has that name.{hint}")
        return value

    def language(self, step: _Step, key: str, value: Any) -> str:
        """A judge by its name, or a language model by its options: those are written beside the stage's folder."""
        judges = key != "writer"
        if isinstance(value, str) and judges:
            kind, _, rest = value.partition(":")
            if kind != "model" or not rest:
                return value
            return "model:" + ",".join(self.any_model(step.name, key, part) for part in rest.split(","))
        said = {"model": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
        if key == "writer":
            said = {"temperature": 1.0, **({} if "url" in said else {"model": step.model}), **said}
        where = f'stage "{step.name}": {key}'
        if not isinstance(said.get("model"), str):
            raise ConfigError(f"{where} is {value!r}; expected a name, or a mapping with model and its options.")
        known = sorted({"model", "url"} | (ASKING if judges else set()) | (THERE if "url" in said else HERE))
        for option in said:
            if option not in known:
                place = "behind an endpoint" if "url" in said else "in this process (url is not given)"
                hint = nearest(str(option), known)
                raise ConfigError(f'{where}: the option "{option}" has no effect on a language model {place}.{hint}')
        file = self.output / f"{step.name}.{key}.yaml"
        if "url" not in said and said["model"] != step.model:
            said["model"] = self.any_model(step.name, key, said["model"])
        if judges:
            load_prompt(str(said.get("prompt", "pairwise")))
        for option in ("prompt", "principles"):  # the user's own files are named from where the pipeline is started
            if option in said and Path(str(said[option])).is_file():
                said[option] = os.path.relpath(said[option], self.output)
        step.described[file] = said
        return f"language:{file}" if judges else str(file)


def _finished(folder: Path) -> bool:
    card = folder / "run.json"
    if card.is_file():
        return json.loads(card.read_text()).get("status") == "finished"  # type: ignore[no-any-return]
    return any((folder / name).is_file() for name in (CARD, "split.json", "config.json"))


def _join(files: Sequence[str], out: Path, as_prompts: bool) -> str:
    """Several files of one kind as one; ``as_prompts``: of any kind, since only their prompts are read."""
    records, told = list[Record](), list[str]()
    for file in files:
        reading = read(file)
        found = _prompts(reading.records) if as_prompts else reading.records
        if records and type(found[0]) is not type(records[0]):
            raise DataError(
                f"{file} holds {name_of(type(found[0]))} records and {files[0]} {name_of(type(records[0]))} records, which "
                "cannot be joined. Convert one of them: `trimtab data convert`."
            )
        records += found
        told.append(
            f"{len(found):,} of {file}" + "".join(f" (left out {n:,}: {w})" for w, n in reading.dropped.items())
        )
    write(records, out)
    return f"{out}: {' and '.join(told)}"


def _prompts(records: Sequence[Record]) -> list[Prompt]:
    return list(convert(records, to="prompt")[0]) if not isinstance(records[0], Prompt) else list(records)  # type: ignore[arg-type]


# --- stages that are no training runs ---------------------------------------------------------------------------------------


def split(model: str, out: Path, data: str, parts: int = 2, by: str = "margin", **options: Any) -> str:
    """Cut a file of comparisons into ``parts`` files, easy to hard: sDPO's stages (arXiv:2403.19270).

    ``by``: ``margin`` orders by the model's mean log-prob of the chosen minus that of the rejected, so that each part has
    a lower share of pairs that the model already gets right; ``file`` keeps the file's order.
    """
    if parts < 2 or by not in ("margin", "file"):
        raise ConfigError(f'split into {parts} parts by "{by}": expected 2 or more, by margin or file.')
    config = resolve({"data": data, "model": model, "method": "dpo", **options})
    _, records, _ = read_records(config)
    examples, report = tokenize(records, make_template(config), max_length=config.max_length, max_truncated=1.0)
    wrong = [e.record for e in examples if not isinstance(e.record, Comparison)]
    if wrong or len(examples) < parts:
        found = f"{len(wrong)} rows of another kind" if wrong else f"{len(examples)} comparisons"
        raise ConfigError(f"{data}: split needs comparisons, at least {parts}; found {found}.")
    means = iter([t.mean().item() for t in completion_logps(model, examples, config)])
    both = [[next(means) for _ in e.completions] for e in examples]
    margins = [m[0] - m[1] for m in both]
    order = sorted(range(len(examples)), key=lambda i: -margins[i]) if by == "margin" else list(range(len(examples)))
    out.mkdir(parents=True, exist_ok=True)
    shares = []
    for k in range(parts):
        rows = order[k * len(order) // parts : (k + 1) * len(order) // parts]
        write([examples[i].record for i in rows], out / f"{k + 1}.jsonl")
        shares.append(sum(margins[i] > 0 for i in rows) / len(rows))
    told = f"{len(examples):,} comparisons in {parts} parts; the model prefers the chosen in " + ", ".join(
        f"{s:.0%}" for s in shares
    )
    told += f"; left out: {', '.join(f'{n} × {r}' for r, n in report.dropped.items())}" if report.dropped else ""
    (out / "split.json").write_text(
        json.dumps({"data": data, "model": model, "by": by, "accuracy": shares, "told": told})
    )
    return told


def label(
    model: str,
    out: Path,
    data: str,
    judge: str,
    tie_band: float = 0.0,
    ties: Literal["keep", "drop"] = "keep",
    answers: int | None = None,
    writer: str | None = None,
    seed: int = 0,
    **reading: Any,
) -> str:
    """What ``trimtab judge`` does, as a stage: records of what the judge says, agreement with the file, position bias.

    Args:
        ties: ``drop`` leaves the judge's ties out, with a count.
        answers: the file's prompts are answered by the model this many times, and those answers are judged; a judge of pairs
            sees all pairs. None: the file's own answers.
        writer: file that describes the model that answers; in a pipeline the stage's ``from`` at temperature 1 if not said.
    """
    if ties not in ("keep", "drop") or (answers is not None and answers < 1):
        raise ConfigError(f"label with ties: {ties}, answers: {answers}; expected keep or drop, and 1 answer or more.")
    out.mkdir(parents=True, exist_ok=True)
    asked = Cached(named_judge(judge), out / "judgements.jsonl")
    records, told = _records(data, reading)
    if answers is not None and writer is not None:
        if asked.kind == "pairwise" and answers < 2:
            raise ConfigError(f"answers is {answers}, and {judge} compares two answers. Write 2 or more.")
        backend = language_judge(Path(writer)).backend  # it is described as a judge is
        records, more = _answered(_prompts(records), backend, answers, seed, asked.kind == "pairwise")
        told.append(more)
    found = judged(records, asked, tie_band)
    if waiting := found.verdicts.failed[WAITING]:
        raise JudgeError(
            f"{waiting:,} of {found.verdicts.asked:,} questions wait for a person's answer ({judge.partition(':')[2]}). Answer "
            "them there, and run the same command again: it goes on from here."
        )
    made: Sequence[Record] = found.records
    told += str(found).splitlines()
    if ties == "drop" and made and isinstance(made[0], Comparison):
        made, account = settle_ties([r for r in made if isinstance(r, Comparison)], ties="drop")
        told.append(str(account))
    agreement = None if found.agreement is None else vars(found.agreement) | {"compared": found.compared}
    return _done(out, made, told, agreement=agreement, judge=found.verdicts.to_json())


def _answered(prompts: Sequence[Prompt], backend: Backend, n: int, seed: int, pairs: bool) -> tuple[list[Record], str]:
    """Answers of the model as records that say nothing of their worth: pairs as ties, or single answers."""

    def text(reply: str, cut: bool) -> str:
        if not reply.strip():
            raise unreadable(reply)
        return reply

    said = [backend.write([p.prompt for p in prompts], seed + k, text) for k in range(n)]
    failed = [a.reason for row in said for a in row if isinstance(a, Failure)]
    out, alike = list[Record](), 0
    for p, row in zip(prompts, zip(*said, strict=True), strict=True):
        whole = [a for a in row if not isinstance(a, Failure)]
        texts = list(dict.fromkeys(whole))
        alike += len(whole) - len(texts)
        if pairs:
            out += [Comparison(p.prompt, a, b, tie=True, origin=p.origin) for a, b in combinations(texts, 2)]
        else:
            out += [Demonstration(p.prompt, a, origin=p.origin) for a in texts]
    told = f"{n * len(prompts) - len(failed):,} answers to {len(prompts):,} prompts, {alike:,} said before"
    told += "".join(f"; left out {failed.count(why):,}: {why}" for why in dict.fromkeys(failed))
    if not out:
        raise DataError(f"there is nothing to judge: {told}. Raise answers, or the temperature of the writer.")
    return out, told


def revise(
    model: str,
    out: Path,
    data: str,
    writer: str,
    revisions: int = 4,
    keep: Literal["all", "last"] = "all",
    requests: str | None = None,
    few_shots: str | None = None,
    stop_after: float = 0.5,
    seed: int = 0,
    **reading: Any,
) -> str:
    """Answer, criticise and revise the prompts of a file: :func:`trimtab.online.revise.revise`. ``chains.jsonl`` tells all.

    ``writer``: file that describes the model that writes; in a pipeline the stage's ``from`` at temperature 1 if not said.
    """
    records, told = _records(data, reading)
    out.mkdir(parents=True, exist_ok=True)
    backend = language_judge(Path(writer)).backend
    found = revising.revise(
        _prompts(records),
        backend,
        revisions=revisions,
        keep=keep,
        requests=requests or revising.REQUESTS,
        few_shots=few_shots,
        stop_after=stop_after,
        seed=seed,
        file=out / "chains.jsonl",
    )
    return _done(out, found.records, [*told, str(found)], failed=found.failed, left_out=found.left_out)


def instruct(
    model: str,
    out: Path,
    data: str,
    writer: str,
    count: int,
    shots: int = 8,
    overlap: float = 0.7,
    tries: int = 4,
    seed: int = 0,
    **reading: Any,
) -> str:
    """New prompts after the prompts of a file: :func:`trimtab.online.instruct.instruct`.

    ``writer``: file that describes the model that writes; in a pipeline the stage's ``from`` at temperature 1 if not said.
    """
    records, told = _records(data, reading)
    out.mkdir(parents=True, exist_ok=True)
    backend = language_judge(Path(writer)).backend
    options: Any = {"count": count, "shots": shots, "overlap": overlap, "tries": tries, "seed": seed}
    found = instructing.instruct(records, backend, **options)
    return _done(out, found.records, [*told, str(found)], asked=found.asked, refused=found.refused)


def _records(data: str, reading: Mapping[str, Any]) -> tuple[list[Record], list[str]]:
    found, records, told = read_records(resolve({"data": data, "method": "sft", **reading}))
    return records, [*(f"left out {n:,}: {why}" for why, n in found.dropped.items()), *found.notes, *told]


def _done(out: Path, records: Sequence[Record], told: Sequence[str], **card: Any) -> str:
    """Write the records, then the card that says that the stage is finished."""
    if not records:
        raise DataError(f"{out} would be empty. {' '.join(told)}")
    write(records, out / "records.jsonl")
    told = [*told, f"{out / 'records.jsonl'}: {len(records):,} records"]
    (out / CARD).write_text(json.dumps({"told": told, **card}, indent=1))
    return "\n".join(told)


STAGES: dict[str, Callable[..., str]] = {"split": split, "label": label, "revise": revise, "instruct": instruct}
KINDS = ("train", "split", "merge", "label", "revise", "instruct")
