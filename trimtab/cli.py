"""The command line: ``trimtab train FILE`` and what belongs around it."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.errors import ConfigError, TrimtabError

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
app = typer.Typer(
    help="Align language models with feedback: pairs, ties, thumbs, rankings, scores or demonstrations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Look at a feedback file before a model sees it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console(highlight=False)


def main() -> None:
    """Entry point: errors that the user can act on are one message, without a traceback."""
    _quiet()
    try:
        app()
    except TrimtabError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"the disk is full ({e.filename or 'no file named'}). Free space; a run goes on with --resume.")


def _quiet() -> None:
    """The progress bars and deprecation notes of the libraries underneath are not for the user of this command."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if sys.argv[1:2] not in ([], ["methods"], ["report"]) and "--help" not in sys.argv:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _fail(message: str, code: int = 2) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)


def parse_flags(words: list[str]) -> dict[str, Any]:
    """``--beta 0.1 --resume --labels '{"1": "tie"}'`` as a dictionary; values stay text where they are no YAML structure."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f'Unexpected "{word}": options are written --name value.')
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        name = name.replace("-", "_")
        if name in found:
            raise ConfigError(f'The option "{name}" is given twice.')
        found[name] = yaml.safe_load(value) if value[:1] in "{[" else value
    return found


def _options_help() -> str:
    from trimtab.config import RunConfig

    lines = []
    for name, f in RunConfig.model_fields.items():
        if name not in ("data", "options"):
            default = "" if f.default is None else f" (default: {f.default})"
            lines.append(f"- `--{name}` {f.description}{default}")
    return "\n".join(lines)


@app.command(context_settings=EXTRA)
def train(
    ctx: typer.Context,
    data: str = typer.Argument("", help="feedback file (jsonl, json, csv, parquet, .gz) or hub:org/name"),
    config: str = typer.Option(None, "--config", help="flat YAML file with the same names as the flags"),
    options: bool = typer.Option(False, "--options", help="list every option and stop"),
) -> None:
    """Align a model with a feedback file.

    Example: `trimtab train prefs.jsonl --method dpo --beta 0.1 --finetune lora`

    `trimtab train --options` lists every option; `trimtab methods NAME` those of a method.
    """
    if options:
        from rich.markdown import Markdown

        console.print(Markdown(_options_help()))
        return
    from trimtab import run
    from trimtab.config import resolve

    flags = parse_flags(ctx.args)
    if data:
        flags["data"] = data
    elif not config:
        raise ConfigError(
            "Name a feedback file: trimtab train FILE --method dpo (or --config FILE.yaml with data: in it)."
        )
    folder = run.train(resolve(flags, config), command=_command(), console=console)
    console.print(f"done: {folder}", soft_wrap=True)


def _command() -> str:
    return shlex.join(["trimtab", *sys.argv[1:]])


def _config(ctx: typer.Context, file: str, **more: Any) -> Any:
    """A configuration for the data commands: any method will do, its kind of feedback is not enforced."""
    from trimtab.config import resolve

    return resolve({"data": file, "method": "sft", **parse_flags(ctx.args), **more})


@data_app.command("check", context_settings=EXTRA)
def data_check(ctx: typer.Context, file: str) -> None:
    """Read a file and count: rows, kinds, what would be left out and why.

    Example: `trimtab data check prefs.jsonl`
    """
    from collections import Counter

    from trimtab.prepare import read_records

    reading, records, told = read_records(_config(ctx, file))
    kinds = Counter(type(r).__name__.lower() for r in records)
    prompts = len({r.prompt for r in records})
    console.print(f"{file}: {reading.shape}", markup=False)
    console.print(
        f"{reading.rows:,} rows, {', '.join(f'{n:,} of kind {k}' for k, n in kinds.items())}, {prompts:,} prompts"
    )
    ties = sum(bool(getattr(r, "tie", False)) for r in records)
    if ties:
        console.print(f"{ties:,} ties")
    up = [r.desirable for r in records if hasattr(r, "desirable")]
    if up:
        console.print(f"{sum(up):,} thumbs up, {len(up) - sum(up):,} down")
    for reason, n in reading.dropped.items():
        rows = ", ".join(f"{r:,}" for r in reading.examples.get(reason, [])[:5])
        console.print(f"left out {n:,}: {reason} (rows {rows})", markup=False)
    for note in [*reading.notes, *told]:
        console.print(str(note), markup=False)


@data_app.command("show", context_settings=EXTRA)
def data_show(
    ctx: typer.Context,
    file: str,
    model: str = typer.Option("smollm2", help="whose tokenizer and template"),
    rows: int = 3,
) -> None:
    """Show in colour exactly which tokens are trained.

    Example: `trimtab data show prefs.jsonl --model smollm2 --rows 2`
    """
    from trimtab.prepare import make_template, read_records
    from trimtab.tokens.show import show
    from trimtab.tokens.template import RowRefused

    config = _config(ctx, file, model=model)
    template = make_template(config)
    for record in read_records(config)[1][:rows]:
        try:
            console.print(show(template.encode(record), template.tokenizer))
        except RowRefused as e:
            console.print(f"{record.origin}: left out: {e}", markup=False)


@data_app.command("convert", context_settings=EXTRA)
def data_convert(
    ctx: typer.Context,
    file: str,
    to: str = typer.Option(..., help="kind to convert to: comparison, thumb, demonstration, ranking"),
    out: Path = typer.Option(..., help="canonical feedback file to write (.jsonl or .jsonl.gz)"),
) -> None:
    """Convert feedback to another kind; says how many and what is lost.

    Example: `trimtab data convert scores.jsonl --to comparison --tie_threshold 0.1 --out pairs.jsonl`
    """
    from trimtab.feedback.read import write
    from trimtab.prepare import read_records

    _, records, told = read_records(_config(ctx, file, convert=to))
    write(records, out)
    for line in told:
        console.print(line, markup=False)
    console.print(f"{out}: {len(records):,} records", soft_wrap=True)


@app.command()
def methods(name: str = typer.Argument("", help="one method, in full")) -> None:
    """List the methods, or one with equation, options and when not to use it.

    Example: `trimtab methods dpo`
    """
    from trimtab.objectives import methods as known
    from trimtab.objectives import objective_class

    if name:
        cls = objective_class(name)
        console.print(f"[bold]{name}[/] ({cls.__name__}, {cls.paper})")
        console.print(cls.equation(), markup=False)
        console.print(f"\nlearns from: {cls.feedback.record.__name__.lower()}{' and ties' if cls.ties else ''}")
        console.print(f"needs: {', '.join(sorted(cls.needs)) or 'nothing but the policy'}")
        for f in dataclasses.fields(cls):
            source = f" [{f.metadata['source']}]" if f.metadata.get("source") else ""
            console.print(f"  --{f.name} {f.default}: {f.metadata['help']}{source}", markup=False)
        console.print(f"when not to use it: {cls.avoid}", markup=False)
        return
    table = Table("method", "learns from", "needs", "paper")
    for n, cls in known().items():
        kind = cls.feedback.record.__name__.lower() + (" + ties" if cls.ties else "")
        table.add_row(n, kind, ", ".join(sorted(cls.needs)) or "-", cls.paper)
    console.print(table)


@app.command(context_settings=EXTRA)
def score(
    ctx: typer.Context,
    file: str,
    policy: str = typer.Option(..., help="aligned model: run folder or model name"),
    reference: str = typer.Option("smollm2", help="the model that it started from"),
    out: Path = typer.Option(..., help="file to write: one line per completion"),
    beta: float = typer.Option(0.1, help="scale of the implicit reward"),
) -> None:
    """Implicit reward beta * log(policy/reference) of every completion in a file.

    Example: `trimtab score prefs.jsonl --policy runs/dpo-prefs-1 --out rewards.jsonl`
    """
    from trimtab.score_file import score_file

    told = score_file(_config(ctx, file, model=policy), reference, out, beta)
    console.print(told, markup=False, soft_wrap=True)


@app.command()
def generate(
    prompt: list[str] = typer.Argument(..., help="one or more prompts"),
    model: str = typer.Option("smollm2", help="run folder or model name"),
    max_new_tokens: int = 128,
    temperature: float = typer.Option(0.0, help="0 is greedy"),
    seed: int = 0,
) -> None:
    """Answer prompts with a model.

    Example: `trimtab generate "How do I boil an egg?" --model runs/dpo-prefs-1`
    """
    from trimtab.feedback.records import Message
    from trimtab.models import load_model, load_tokenizer
    from trimtab.online.sample import sample
    from trimtab.tokens.template import Template

    tokenizer = load_tokenizer(model)
    template = Template(tokenizer)
    ids = [template.prompt_ids((Message("user", p),)) for p in prompt]
    answers = sample(
        load_model(model), tokenizer, ids, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature
    )
    for answer in answers:
        console.print(tokenizer.decode(list(answer), skip_special_tokens=True), markup=False, soft_wrap=True)


@app.command()
def report(folder: Path) -> None:
    """Write a run folder's HTML report again.

    Example: `trimtab report runs/dpo-prefs-1`
    """
    from trimtab.report import write_report

    console.print(f"report: {write_report(folder)}", soft_wrap=True)


@app.command(context_settings=EXTRA)
def doctor(
    ctx: typer.Context, data: str = typer.Argument("", help="feedback file to try (default: the demo's)")
) -> None:
    """Perform one real optimiser step with this machine, model and file, and say what was seen.

    Example: `trimtab doctor prefs.jsonl --model smollm2 --method dpo`
    """
    from trimtab.doctor import examine

    examine({**parse_flags(ctx.args), **({"data": data} if data else {})}, console)


@app.command(context_settings=EXTRA)
def demo(
    ctx: typer.Context,
    seeds: int = typer.Option(1, min=1, help="how many seeds"),
    output: Path = typer.Option(Path("runs/demo"), help="folder of the demo; a number is added where it exists"),
) -> None:
    """Align SmolLM2 on the feedback that ships with trimtab and measure the true reward on held-out prompts.

    Example: `trimtab demo --seeds 3`
    """
    from trimtab.demo.run import run_demo

    run_demo(seeds, output, parse_flags(ctx.args), _command(), console)
