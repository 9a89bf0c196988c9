"""The command line: ``trimtab train FILE`` and what belongs around it."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from trimtab.errors import ConfigError, TokenError, TrimtabError, nearest

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
app = typer.Typer(
    help="Align language models with feedback: pairs, ties, thumbs, rankings, scores or demonstrations.",
    epilog="Exit codes: 0 done; 1 a bug in trimtab (with a traceback); 2 something to correct, said in one message; "
    "130 interrupted (during training the model and the report are saved first).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Look at a feedback file before a model sees it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console(highlight=False, emoji=False)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


class Flags(TyperCommand):
    """A command that takes any ``--name value``: files may stand before, between or after them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        alone = {name for p in self.params if getattr(p, "is_flag", False) for name in p.opts} | {"--help"}
        files, options = files_and_options(args, alone)
        places = [p for p in self.params if p.param_type_name == "argument"]
        # a file that is not named must not be taken from the options
        files += [""] * sum(not p.required for p in places[len(files) :])
        if len(files) < len(places):
            known = {name for p in self.params for name in p.opts} | {"--help"}
            options = [word for word in options if word.partition("=")[0] in known]
        return super().parse_args(ctx, files + options)


def files_and_options(words: list[str], alone: set[str]) -> tuple[list[str], list[str]]:
    """The words apart, each option as ``--name=value``. Options in ``alone`` take no value."""
    from trimtab.config import RunConfig

    switches = {name for name, f in RunConfig.model_fields.items() if f.annotation is bool}
    rest, files, options = list(words), list[str](), list[str]()
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        following = rest[0] if rest and not rest[0].startswith("--") else None
        if word[2:].replace("-", "_") in switches and following not in ("true", "false"):
            following = None
        if "=" not in word and word not in alone and following is not None:
            word = f"{word}={rest.pop(0)}"
        options.append(word)
    return files, options


def main() -> None:
    """Entry point: errors that the user can act on are one message, without a traceback."""
    try:
        _quiet()
        app(prog_name="trimtab")
    except SystemExit as e:
        if not e.code:
            _leave_group()
        raise
    except TrimtabError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as e:
        if e.errno in DISK_FULL:
            _fail(
                f"the disk is full ({e.filename or 'no file named'}). Free space, or choose another place (--output)."
            )
        if e.errno not in NOT_WRITABLE or not e.filename:
            raise
        _fail(
            f"{e.filename}: {(e.strerror or 'cannot be used').lower()}. Choose another place, or change its permissions."
        )


def _leave_group() -> None:
    """End this process's part in a group of processes, after a run that went well.

    gloo's threads let go of tensors at their leisure, which needs the interpreter's lock: one that is late meets an
    interpreter that is closing, and aborts the process. DDP's cycles keep the group alive, hence the collection, which
    joins the threads. After a failure nothing is ended: it may wait for the others, and the launcher must hear of it.
    What FSDP2 and DeepSpeed keep outside of Python's sight holds the group for good: there the interpreter is not closed,
    but left.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from trimtab.launch import launched

        distributed.destroy_process_group()
        gc.collect()
        if launched() in ("fsdp2", "zero"):
            atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)


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
    from trimtab.report.text import visible

    text = Text.assemble(("error: ", "bold red"), visible(message))
    Console(stderr=True, highlight=False, emoji=False).print(text, soft_wrap=True)
    raise SystemExit(code)


def _say(text: object) -> None:
    """Print a text that may hold anything: no markup is read in it, and no control character reaches the terminal."""
    from trimtab.report.text import visible

    console.print(Text(visible(text)), soft_wrap=True)


def parse_flags(words: list[str]) -> dict[str, Any]:
    """``--beta 0.1 --resume --labels '{"1": "tie"}'`` as a dictionary; values stay text where they are no YAML structure."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f'Unexpected "{word}": this takes one file, and options are written --name value.')
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        name = name.replace("-", "_")
        if name in found:
            raise ConfigError(f'The option "{name}" is given twice.')
        found[name] = _structure(name, value) if value[:1] in ("{", "[") else value
    return found


def _structure(name: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(
            f'--{name} {value} is not a mapping. Write it in one pair of quotes: --{name} \'{{"1": "first"}}\'.'
        ) from None


def _options_help() -> str:
    from trimtab.config import RunConfig

    lines = []
    for name, f in RunConfig.model_fields.items():
        if name not in ("data", "options"):
            default = "" if f.default is None else f" (default: {f.default})"
            lines.append(f"- `--{name}` {f.description}{default}")
    return "\n".join(lines)


@app.command(cls=Flags, context_settings=EXTRA)
def train(
    ctx: typer.Context,
    data: str = typer.Argument("", help="feedback file (jsonl, json, csv, parquet, .gz) or hub:org/name"),
    config: str = typer.Option(
        None, "--config", help="flat YAML file with the same names as the flags, or a recipe: ppo, online/oaif"
    ),
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
    if data and "data" in flags:
        raise ConfigError(f'The feedback file is named twice: "{data}" and --data "{flags["data"]}". Remove one.')
    if data:
        flags["data"] = data
    elif not config and "data" not in flags:
        raise ConfigError(
            "Name a feedback file: trimtab train FILE --method dpo (or --config FILE.yaml with data: in it)."
        )
    folder = run.train(resolve(flags, config), command=_command(), console=console)
    if json.loads((folder / "run.json").read_text())["status"] == "interrupted":
        _say(f"interrupted: {folder}")
        raise SystemExit(130)
    _say(f"done: {folder}")


def _command() -> str:
    return shlex.join(["trimtab", *sys.argv[1:]])


READING = ("shape", "columns", "labels", "split", "bad_rows", "limit")
CONVERTING = ("convert", "tie_threshold", "score_threshold")
TEMPLATE = ("template", "chat_template", "eos")
LENGTHS = ("max_length", "truncation")


def _config(ctx: typer.Context, file: str, known: tuple[str, ...], **more: Any) -> Any:
    """A configuration for a command that takes the options in ``known``: any method will do, its kind is not enforced."""
    from trimtab.config import resolve

    flags = parse_flags(ctx.args)
    for name in flags:
        if name not in known:
            hint = nearest(name, list(known))
            raise ConfigError(
                f'The option "{name}" has no effect on `trimtab {ctx.command_path.split(" ", 1)[-1]}`.{hint} '
                f"Options there: {', '.join(known)}."
            )
    return resolve({"data": file, "method": "sft", **flags, **more})


@data_app.command("check", cls=Flags, context_settings=EXTRA)
def data_check(ctx: typer.Context, file: str) -> None:
    """Read a file and count: rows, kinds, what would be left out and why.

    Example: `trimtab data check prefs.jsonl`
    """
    from collections import Counter

    from trimtab.prepare import read_records

    reading, records, told = read_records(_config(ctx, file, (*READING, *CONVERTING)))
    kinds = Counter(type(r).__name__.lower() for r in records)
    prompts = len({r.prompt for r in records})
    _say(f"{file}: {reading.shape}")
    _say(f"{reading.rows:,} rows, {', '.join(f'{n:,} of kind {k}' for k, n in kinds.items())}, {prompts:,} prompts")
    ties = sum(bool(getattr(r, "tie", False)) for r in records)
    if ties:
        _say(f"{ties:,} ties")
    up = [r.desirable for r in records if hasattr(r, "desirable")]
    if up:
        _say(f"{sum(up):,} thumbs up, {len(up) - sum(up):,} down")
    for reason, n in reading.dropped.items():
        rows = ", ".join(f"{r:,}" for r in reading.examples.get(reason, [])[:5])
        _say(f"left out {n:,}: {reason} (rows {rows})")
    for note in [*reading.notes, *told]:
        _say(note)


@data_app.command("show", cls=Flags, context_settings=EXTRA)
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

    config = _config(ctx, file, (*READING, *CONVERTING, *TEMPLATE), model=model)
    template = make_template(config)
    for record in read_records(config)[1][:rows]:
        try:
            console.print(show(template.encode(record), template.tokenizer))
        except RowRefused as e:
            _say(f"{record.origin}: left out: {e}")


@data_app.command("convert", cls=Flags, context_settings=EXTRA)
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

    known = (*READING, *CONVERTING[1:])
    reading, records, told = read_records(_config(ctx, file, known, convert=to))
    write(records, out)
    for reason, n in reading.dropped.items():
        _say(f"left out {n:,}: {reason}")
    for line in told:
        _say(line)
    _say(f"{out}: {len(records):,} records")


@app.command()
def methods(name: str = typer.Argument("", help="one method, in full")) -> None:
    """List the methods, or one with equation, options and when not to use it.

    Example: `trimtab methods dpo`
    """
    from trimtab.config import recipes
    from trimtab.objectives import methods as known
    from trimtab.objectives import objective_class
    from trimtab.report.card import axes

    if name:
        cls = objective_class(name)
        console.print(Text.assemble((name, "bold"), f" ({cls.__name__}, {cls.paper})"), soft_wrap=True)
        _say(cls.equation())
        _say(f"\nlearns from: {cls.feedback.record.__name__.lower()}{' and ties' if cls.ties else ''}")
        _say(f"needs: {', '.join(sorted(cls.needs)) or 'nothing but the policy'}")
        for f in dataclasses.fields(cls):
            source = f" [{f.metadata['source']}]" if f.metadata.get("source") else ""
            _say(f"  --{f.name} {f.default}: {f.metadata['help']}{source}")
        _say(f"when to use it: {cls.use}")
        _say(f"when not to use it: {cls.avoid}")
        if cls.differs:
            _say(f"differs: {cls.differs}")
        _say(f"axes: {'; '.join(f'{k}: {v}' for k, v in axes(cls).items())}")
        return
    table = Table("method", "learns from", "needs", "what it is")
    for n, cls in known().items():
        kind = cls.feedback.record.__name__.lower() + (" + ties" if cls.ties else "")
        table.add_row(n, kind, ", ".join(sorted(cls.needs)) or "-", (cls.__doc__ or "").splitlines()[0])
    console.print(table)
    _say(
        f"{len(known())} methods. `trimtab methods NAME`: equation, paper, options, axes, when to use it and when not."
    )
    for folder, what in (
        ("online", "procedures in rounds (--config NAME)"),
        ("pipelines", "pipelines (trimtab pipeline NAME)"),
    ):
        names = recipes(folder)
        shown = [n.removeprefix("pipelines/") for n in names]
        _say(f"{len(names)} {what}: {', '.join(shown)}")


@app.command(cls=Flags, context_settings=EXTRA)
def score(
    ctx: typer.Context,
    file: str,
    policy: str = typer.Option(..., help="aligned model or reward model: run folder or model name"),
    reference: str = typer.Option(None, help="the model that it started from (default: what the run folder says)"),
    out: Path = typer.Option(
        ..., help="file to write: .jsonl with one line per completion, or an .html page in colour"
    ),
    beta: float = typer.Option(None, help="scale of the implicit reward (default: 0.1)"),
    tokens: bool = typer.Option(False, "--tokens", help="write each token's part of the reward too"),
) -> None:
    """Implicit reward beta * log(policy/reference) of every completion in a file, or of every token of it.

    A reward model needs no reference: its number is the reward.

    Example: `trimtab score prefs.jsonl --policy runs/dpo-prefs-1 --out rewards.jsonl`
    """
    from trimtab.score_file import score_file

    known = (*READING, *CONVERTING, *TEMPLATE, *LENGTHS, "layout", "token_budget")
    _say(score_file(_config(ctx, file, known, model=policy), reference, out, beta, tokens))


@app.command(cls=Flags, context_settings=EXTRA)
def judge(
    ctx: typer.Context,
    file: str,
    judge: str = typer.Option(..., help="rule:, model:, language: or human:, see `trimtab train --options`"),
    out: Path = typer.Option(..., help="canonical feedback file to write (.jsonl or .jsonl.gz)"),
    cache: Path = typer.Option(None, help=".jsonl of judgements: what is in it is not asked again"),
    tie_band: float = typer.Option(
        0.0, "--tie_band", "--tie-band", min=0.0, help="preferences within this of 1/2 are ties"
    ),
) -> None:
    """Let a judge look at the answers of a file, and write what it says as feedback.

    Example: `trimtab judge prefs.jsonl --judge rule:judge.py:brief --out labels.jsonl`
    """
    from trimtab.feedback.read import write
    from trimtab.judges.cached import Cached
    from trimtab.judges.label import label
    from trimtab.judges.named import named_judge
    from trimtab.prepare import read_records

    asked = named_judge(judge)
    _, records, told = read_records(_config(ctx, file, (*READING, *CONVERTING)))
    found = label(records, Cached(asked, cache) if cache else asked, tie_band)
    written = "nothing was judged, and nothing written"
    if found.records:
        write(found.records, out)
        written = f"{len(found.records):,} records"
    for line in (*told, *str(found).splitlines(), f"{out}: {written}"):
        _say(line)


@app.command()
def pipeline(file: Path = typer.Argument(..., help="YAML file with stages")) -> None:
    """Several runs as one, each starting where the one before ended: SFT then any method, sDPO, PAFT, RLHF, RLAIF and others.

    Example: `trimtab pipeline sdpo.yaml`
    """
    from trimtab.pipeline import run_pipeline

    _say(f"done: {run_pipeline(file, _command(), console)}")


@app.command()
def merge(
    models: list[str] = typer.Argument(..., help="models that were trained from the same start"),
    start: str = typer.Option(..., help="the model that they were trained from"),
    out: Path = typer.Option(..., help="folder to write"),
    how: str = typer.Option("ties", help="linear, task_arithmetic, ties, dare_ties, dare_linear or slerp"),
    weights: str = typer.Option(None, help="one number per model, separated by commas"),
    density: float = typer.Option(None, help="share of the changes that is kept (ties 0.2, dare 0.5)"),
    scale: float = typer.Option(1.0, help="multiplies the merged change"),
    seed: int = typer.Option(0, help="what dare drops"),
) -> None:
    """Merge models that started from one.

    Example: `trimtab merge runs/sft runs/dpo --start smollm2 --out runs/merged --how ties`
    """
    from trimtab.merge import merge as merged

    try:
        shares = [float(w) for w in weights.split(",")] if weights else None
    except ValueError:
        raise ConfigError(f'weights is "{weights}"; expected numbers separated by commas, such as 0.5,1.') from None
    _say(merged(start, models, out, how=how, weights=shares, density=density, scale=scale, seed=seed))  # type: ignore[arg-type]


@app.command()
def generate(
    prompt: list[str] = typer.Argument(..., help="one or more prompts"),
    model: str = typer.Option("smollm2", help="run folder or model name"),
    max_new_tokens: int = typer.Option(
        128, "--max_new_tokens", "--max-new-tokens", min=1, help="longest answer, in tokens"
    ),
    temperature: float = typer.Option(None, min=0.0, help="0 is greedy (default: 0, and 1 with best_of)"),
    seed: int = typer.Option(0, help="seed of sampling, where temperature is above 0"),
    best_of: int = typer.Option(
        None, "--best_of", "--best-of", min=2, help="sample this many answers, print the one that the judge likes best"
    ),
    judge: str = typer.Option(None, help="rule:, model: or language:, see `trimtab train --options`; for best_of"),
) -> None:
    """Answer prompts with a model, or with the best of several answers.

    Example: `trimtab generate "How do I boil an egg?" --model runs/dpo-prefs-1`
    """
    if (best_of is None) != (judge is None):
        raise ConfigError("best_of says how many answers are sampled and judge who chooses: pass both, or neither.")
    if best_of and temperature == 0:
        raise ConfigError(
            "temperature 0 gives the same answer each time, and best_of nothing to choose from. Raise it."
        )
    from trimtab.feedback.records import Message
    from trimtab.models import end_tokens, load_model, load_tokenizer
    from trimtab.online.sample import sample
    from trimtab.tokens.template import RowRefused, Template

    tokenizer = load_tokenizer(model)
    template = Template(tokenizer, eos_ids=end_tokens(model))
    try:
        ids = [template.prompt_ids((Message("user", p),)) for p in prompt]
    except RowRefused as e:
        raise TokenError(f"the prompt cannot be put to {model}: {e}.") from e
    answers = sample(
        load_model(model),
        tokenizer,
        ids,
        per_prompt=best_of or 1,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature if temperature is not None else float(bool(best_of)),
    )
    texts = [tuple(tokenizer.decode(list(a.ids), skip_special_tokens=True) for a in row) for row in answers]
    if not best_of:
        for (text,) in texts:
            _say(text)
        return
    from trimtab.judges.base import Question
    from trimtab.judges.named import named_judge
    from trimtab.judges.round_robin import RoundRobin
    from trimtab.online.select import best, best_of_kl

    asked = named_judge(judge)
    asked = RoundRobin(asked) if asked.kind == "pairwise" else asked
    verdicts = asked.judge([Question((Message("user", p),), row) for p, row in zip(prompt, texts, strict=True)])
    for row, chosen in zip(texts, best(verdicts), strict=True):
        _say("(no answer could be judged)" if chosen is None else row[chosen[0]])
        told = "" if chosen is None else f"score {chosen[1]:.4g}, the "
        _say(f"  [{told}best of {best_of} by {judge}]")
    _say(f"{verdicts} KL from the model's own answers: at most log n - (n - 1)/n = {best_of_kl(best_of):.3f} nats.")


@app.command()
def compare(
    ctx: typer.Context,
    world: str = typer.Option("plain", help="a world's name, or one with changes: ties,flip=0.2"),
    methods: str = typer.Option(
        "all",
        help="dpo,cdpo:label_smoothing=0.2,rloo:rounds=32; all: every method that a file of feedback is enough for",
    ),
    seeds: int = typer.Option(5, min=2, help="replicates: own prompts, answers, judgements, held-out prompts"),
    steps: int = typer.Option(48, min=1, help="of the optimiser, the same for all"),
    against: str = typer.Option("dpo", help="the method that all others are compared with"),
    promises: bool = typer.Option(
        False,
        "--promises",
        help="also check what each method (or only what each of these) promises, in a world made for it",
    ),
    workers: int = typer.Option(2, min=1, help="processes, one thread each"),
    output: Path = typer.Option(Path("runs/compare"), help="folder of results: one file per trial, never run twice"),
) -> None:
    """Methods against each other in a controlled world: same data, same budget, paired by seed.

    Example: `trimtab compare --methods dpo,kto,simpo --seeds 5`
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers
    from trimtab.compare.command import check_promises, parse_arms, told
    from trimtab.compare.command import compare as compared
    from trimtab.compare.promises import PROMISES
    from trimtab.compare.trial import Budget

    more: dict[str, Any] = {"output": output, "workers": workers, "command": _command(), "tell": _progress}
    if promises:
        given = [
            n
            for n in ("world", "steps", "against")
            if (source := ctx.get_parameter_source(n)) and source.name != "DEFAULT"
        ]
        if given:
            raise ConfigError(
                f"promises name their own worlds and budgets: {', '.join(given)} would have no effect. Leave it out."
            )
        arms = [] if methods == "all" else parse_arms(methods)
        chosen = [p for p in PROMISES if p.ours in arms or not arms]
        if not chosen:
            raise ConfigError(
                f"methods: nothing is promised of {methods} with these options. `trimtab compare --promises` has all."
            )
        verdicts = check_promises(seeds, promises=chosen, **more)
        if not arms:  # every method: its gain beside what it promised
            typer.echo(compared("plain", parse_arms("all"), seeds, verdicts=verdicts, **more) + "\n")
        typer.echo(told(chosen, verdicts))
        return
    typer.echo(
        compared(
            world,
            parse_arms(methods),
            seeds,
            against=against,
            budget=dataclasses.replace(Budget(), steps=steps),
            **more,
        )
    )


def _progress(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
def report(folder: Path) -> None:
    """Write a run folder's HTML report again.

    Example: `trimtab report runs/dpo-prefs-1`
    """
    from trimtab.report import write_report

    _say(f"report: {write_report(folder)}")


@app.command(cls=Flags, context_settings=EXTRA)
def plan(
    ctx: typer.Context,
    data: str = typer.Argument("", help="feedback file; without one, state lengths"),
    config: str = typer.Option(None, "--config", help="as for train"),
    device: str = typer.Option(None, help="a GPU instead of this machine, such as h100-80"),
    memory_gb: float = typer.Option(None, "--memory_gb", "--memory-gb", min=0.01, help="memory that there is"),
    tflops: float = typer.Option(None, min=0.001, help="its rate of matrix products, with memory_gb"),
    prompt_tokens: int = typer.Option(256, "--prompt_tokens", "--prompt-tokens", min=1, help="without a file"),
    completion_tokens: int = typer.Option(
        128, "--completion_tokens", "--completion-tokens", min=1, help="without a file"
    ),
    completions: int = typer.Option(4, min=2, help="answers to a prompt of a ranking, without a file"),
    rows: int = typer.Option(1000, min=1, help="examples, without a file"),
) -> None:
    """Say what memory and time a run would need, before any weight is loaded, and which setting fits.

    Takes every option of train. The model needs no weights: a folder with config.json is enough where no file is given.

    Example: `trimtab plan prefs.jsonl --method dpo --model smollm2 --device l4-24`
    """
    from trimtab.config import resolve
    from trimtab.planner import Stated, place, tell

    flags = parse_flags(ctx.args)
    lengths = None
    if data:
        flags["data"] = data
    if "data" not in flags and not config:
        lengths, flags["data"] = Stated(prompt_tokens, completion_tokens, completions, rows), "stated lengths"
    else:
        _refuse_given(ctx, ("prompt_tokens", "completion_tokens", "completions", "rows"), "the file has its own")
    tell(resolve(flags, config), lengths, place(device, memory_gb, tflops), console)


def _refuse_given(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if (source := ctx.get_parameter_source(name)) and source.name != "DEFAULT":
            raise ConfigError(f'The option "{name}" has no effect here: {why}. Remove it.')


@app.command(cls=Flags, context_settings=EXTRA)
def doctor(
    ctx: typer.Context, data: str = typer.Argument("", help="feedback file to try (default: the demo's)")
) -> None:
    """Perform one real optimiser step with this machine, model and file, and say what was seen.

    Example: `trimtab doctor prefs.jsonl --model smollm2 --method dpo`
    """
    from trimtab.doctor import examine

    examine({**parse_flags(ctx.args), **({"data": data} if data else {})}, console)


@app.command(cls=Flags, context_settings=EXTRA)
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
