"""Several runs as one: each stage starts where the one before ended. SFT then any method, sDPO, PAFT are such files.

    output: runs/sdpo
    model: smollm2
    stages:
      - {name: parts, do: split, data: prefs.jsonl, parts: 2}      # easy to hard, by the margins of the model
      - {name: easy, method: dpo, data: parts/1}
      - {name: hard, method: dpo, data: parts/2}                   # starts from "easy", which is its reference too

A stage is a training run (its options are those of ``trimtab train``), a ``split`` of a file of comparisons, or a
``merge`` of earlier stages. ``from: NAME`` or ``from: start`` says what it starts from; the default is the stage before.
A stage that is finished is not done again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from trimtab import run
from trimtab.config import resolve
from trimtab.errors import ConfigError, nearest
from trimtab.feedback.read import write
from trimtab.feedback.records import Comparison
from trimtab.merge import merge
from trimtab.prepare import make_template, read_records
from trimtab.score_file import completion_logps
from trimtab.tokens.template import tokenize

KINDS = ("train", "split", "merge")


def run_pipeline(file: Path, command: str, console: Console) -> Path:
    """Run the stages of a YAML file in order; returns the folder of the last one."""
    plan = _read(file)
    output = Path(str(plan.pop("output")))
    start, stages = str(plan.get("model", "smollm2")), plan.pop("stages")
    known = {"start": start}
    latest, last = "start", output
    for stage in stages:
        stage = dict(stage)
        name, kind, origin = stage.pop("name"), stage.pop("do", "train"), stage.pop("from", latest)
        folder = output / name
        stage = {k: _place(v, known, output) for k, v in stage.items()}
        console.print(f"stage {name}: {kind}", markup=False)
        if origin not in known:
            raise ConfigError(
                f'stage "{name}": from is "{origin}".{nearest(origin, list(known))} Known: {", ".join(known)}.'
            )
        if _finished(folder):
            console.print(f"  done before: {folder}", markup=False)
        else:
            match kind:
                case "train":
                    common = {k: v for k, v in plan.items() if k != "model"}
                    values = {**common, **stage, "model": known[origin], "output": str(folder)}
                    run.train(resolve(values), command=command, console=console)
                case "split":
                    told = split(model=known[origin], out=folder, **stage)
                    console.print(f"  {told}", markup=False)
                case "merge":
                    models = [known[m] for m in stage.pop("models")]
                    console.print(f"  {merge(known[origin], models, folder, **stage)}", markup=False)
        if kind != "split":
            known[name], latest = str(folder), name
        last = folder
    return last


def _read(file: Path) -> dict[str, Any]:
    try:
        plan = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as e:
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


def _place(value: Any, known: dict[str, str], output: Path) -> Any:
    """``parts/1`` is the first file that the stage ``parts`` wrote."""
    if isinstance(value, str) and (output / value).with_suffix(".jsonl").is_file() and not Path(value).exists():
        return str((output / value).with_suffix(".jsonl"))
    return value


def _finished(folder: Path) -> bool:
    card = folder / "run.json"
    if card.is_file():
        return json.loads(card.read_text()).get("status") == "finished"  # type: ignore[no-any-return]
    return (folder / "split.json").is_file() or (folder / "config.json").is_file()


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
