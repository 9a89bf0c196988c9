"""One flat configuration: a YAML file or flags with the same names. Every option has an effect, or the run is refused."""

from __future__ import annotations

import dataclasses
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import ConfigError, nearest
from trimtab.feedback.convert import Pairs
from trimtab.feedback.records import Comparison, Ranking, Thumb
from trimtab.logprobs.scored import Rollouts
from trimtab.objectives import Objective, objective_class
from trimtab.objectives.base import typed

# of transformers': the schedules that need no further arguments, and the optimizers with the package each needs
RECIPES = Path(__file__).with_name("recipes")
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
OPTIMIZERS = dict.fromkeys(("adamw_torch_fused", "adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd"), "")
OPTIMIZERS |= dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"), "bitsandbytes")


class RunConfig(BaseModel):
    """Options of a run that do not belong to the method. The method's own are in :attr:`options`."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    data: str = Field(description="feedback file, or hub:org/name")
    method: str = Field("dpo", description="see `trimtab methods`")
    model: str = Field("smollm2", description="folder, hub name, or smollm2 (SmolLM2-135M-Instruct from PyPI)")
    output: str | None = Field(None, description="run folder (default: runs/METHOD-DATA-N)")
    seed: int = Field(0, ge=0, description="seed of everything random")

    shape: str = Field("auto", description="layout of the file, where detection is not wanted")
    columns: dict[str, str] | None = Field(None, description='columns under other names: {"prompt": "question"}')
    labels: dict[str, str] | None = Field(
        None, description='meaning of label codes: {"1": "first", "2": "second", "0": "tie"} or {"1": "desirable"}'
    )
    split: str | None = Field(None, description="split of a hub data set")
    bad_rows: Literal["drop", "refuse"] = Field(
        "drop", description="count and leave out bad rows, or stop at the first"
    )
    limit: int | None = Field(None, ge=1, description="read at most this many rows")
    convert: str | None = Field(
        None, description="kind of feedback to convert to: comparison, thumb, demonstration, ranking"
    )
    pairs: Pairs | None = Field(
        None,
        description="which comparisons a ranking or scores give: all, best-worst, best-random, adjacent, tournament (default: "
        "all; of sampled answers best-worst)",
    )
    tie_threshold: float | None = Field(None, ge=0, description="scores closer than this are a tie, when converting")
    score_threshold: float | None = Field(None, description="scores above this are thumbs up, when converting")
    ties: Literal["drop", "split"] | None = Field(None, description="what a method without ties does with them")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of prompts kept out of training for evaluation")
    match_prompts: str = Field(
        "none",
        description="weigh thumbs down so that their prompts look like those of thumbs up: none, tfidf, policy (its mean hidden "
        "state), or a sentence-transformers model",
    )
    min_density_ratio: float = Field(0.5, gt=0, description="lower bound of such a weight")
    max_density_ratio: float = Field(10.0, gt=0, description="upper bound of such a weight")

    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="apply the chat template, or train bare text"
    )
    chat_template: str | None = Field(None, description="file with a Jinja chat template")
    eos: Literal["template", "append"] = Field("template", description="who ends an answer")
    max_length: int = Field(1024, ge=16, description="tokens of prompt and completion together")
    truncation: Literal["drop", "prompt", "completion"] = Field("drop", description="what happens to longer rows")
    max_truncated: float = Field(
        0.1, ge=0, le=1, description="share of rows that may be too long before the run is refused"
    )

    finetune: Literal["lora", "full"] = Field("lora", description="train an adapter or all weights")
    lora_rank: int = Field(16, ge=1, description="rank of the adapter")
    lora_alpha: int = Field(32, ge=1, description="scale of the adapter")
    lora_targets: str = Field("all-linear", description="modules that get an adapter, separated by commas")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int = Field(-1, ge=-1, description="optimiser steps; overrides epochs where positive")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step, over all processes")
    token_budget: int = Field(2048, ge=1, description="tokens per forward pass: memory only, no number depends on it")
    learning_rate: float | None = Field(None, gt=0, description="default: 1e-4 for lora, 1e-5 for full")
    schedule: str = Field("linear", description=f"of the learning rate: {', '.join(SCHEDULES)}")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 for none")
    optimizer: str = Field("adamw_torch_fused", description=f"one of {', '.join(OPTIMIZERS)}")

    precision: Literal["auto", "float32", "bfloat16", "float64"] = Field("auto", description="of matrix products")
    weights: Literal["float32", "bfloat16", "nf4"] = Field(
        "float32", description="type in which the model's weights are held; nf4 (bitsandbytes) with lora only"
    )
    layout: Literal["auto", "shared", "packed", "padded"] = Field(
        "auto", description="how completions lie in the input"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    threads: int | None = Field(None, ge=1, description="CPU threads (default: torch's)")
    reference_every: int | None = Field(
        None, ge=1, description="steps after which the reference is renewed from the policy (TR-DPO; default: never)"
    )
    reference_mix: float = Field(1.0, gt=0, le=1, description="share of the policy in a renewed reference; 1 is a copy")
    l1: float = Field(0.0, ge=0, description="L1 penalty on the LoRA weights (PAFT's sparse task vector)")
    reference: Literal["auto", "adapter", "copy", "cache"] = Field(
        "auto", description="where reference log-probs come from"
    )
    cache: str | None = Field(None, description="folder of the reference cache (default: in trimtab's home)")

    log_every: int = Field(1, ge=1, description="steps between logged lines")
    eval_every: int | None = Field(
        None, ge=1, description="steps between held-out evaluations (default: start and end)"
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints (default: none until the end)")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    resume: bool = Field(False, description="go on from the run folder's last complete checkpoint")
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = Field("none", description="tracker of transformers")
    samples: int = Field(8, ge=0, description="held-out prompts answered before and after, for the report and the KL")
    sample_tokens: int = Field(96, ge=1, description="longest sampled answer")

    judge: str | None = Field(
        None,
        description="who judges answers that the policy samples; the data is then read as prompts. rule:FILE.py:FUNCTION, "
        "rule:MODULE:FUNCTION, model:FOLDER (a reward model's run folder), model:FOLDER,REFERENCE (implicit reward), or "
        "language:FILE.yaml (a language model)",
    )
    rounds: int = Field(20, ge=1, description="rounds of sampling, judging and learning")
    prompts_per_round: int = Field(16, ge=1, description="prompts of a round")
    answers: int = Field(4, ge=1, description="answers to each prompt")
    keep_answers: int | None = Field(
        None, ge=1, description="how many of them are learned from, chosen by rejection sampling (RSO; default: all)"
    )
    keep_beta: float = Field(
        0.5, gt=0, description="of that choice, ~ exp(score / keep_beta): near 0 the best, large ones any"
    )
    partner_mix: float | None = Field(
        None,
        gt=0,
        le=1,
        description="one more answer to each prompt is sampled from policy^(1-b) reference^b, with this b "
        "(1: from the reference)",
    )
    sampler: str | None = Field(
        None,
        description="server that samples, speaking OpenAI's /completions with token ids: its URL up to /v1 (default: the policy "
        "does so here)",
    )
    sampler_model: str | None = Field(None, description="name of the policy there (default: as model)")
    sampler_reload: str | None = Field(
        None,
        description="how the server gets each round's weights: sglang, vllm, or a command that is waited for, in which {folder} "
        "stands for theirs",
    )
    passes: int = Field(1, ge=1, description="times that a round's answers are learned from")
    sample_temperature: float = Field(1.0, gt=0, description="of sampling")
    keep_rounds: Literal["last", "all"] = Field("last", description="learn from this round, or from all so far")
    redraw: int = Field(
        0, ge=0, description="times that prompts whose answers are all judged alike are replaced (DAPO)"
    )
    end_penalty: float = Field(0.0, ge=0, description="subtracted where an answer did not end (missing-EOS rule)")
    token_penalty: float = Field(0.0, ge=0, description="subtracted for each token of an answer")
    overlong_buffer: int = Field(
        0, ge=0, description="last tokens before sample_tokens over which a penalty rises (DAPO)"
    )
    overlong_penalty: float = Field(1.0, gt=0, description="that penalty where the answer has sample_tokens")
    test_judge: str | None = Field(
        None,
        description="another judge of held-out answers, from which nothing is learned: it shows where the policy pleases "
        "judge alone",
    )
    watch_every: int = Field(1, ge=1, description="rounds after which both judge such answers (as many as samples)")
    largest_gap: float = Field(0.1, gt=0, description="nats a token by which sampler and engine may differ")
    correct_sampling: float | None = Field(
        None, gt=0, description="cap of the importance weight that corrects for that difference (default: none)"
    )

    ptx_data: str | None = Field(
        None, description="file of demonstrations whose likelihood is learned in the same steps (PPO-ptx)"
    )
    ptx_weight: float = Field(1.0, gt=0, description="of their mean negative log-likelihood per token")
    ptx_batch_size: int = Field(8, ge=1, description="demonstrations of an optimiser step")

    options: dict[str, Any] = Field(default_factory=dict, description="the method's hyperparameters")

    def objective(self) -> Objective:
        """The method with its hyperparameters; :class:`ConfigError` where one is out of range."""
        return objective_class(self.method)(**self.options)

    def flat(self) -> dict[str, Any]:
        """The resolved configuration as one flat dictionary: what is saved with the run, and gives the same run again.

        Options without effect in this run are not in it."""
        idle = without_effect(self)
        own = {k: v for k, v in self.model_dump(exclude={"options"}).items() if k not in idle}
        return {**own, **dataclasses.asdict(self.objective())}


def run_options() -> list[str]:
    """Names of all options that are not the method's own."""
    return [k for k in RunConfig.model_fields if k != "options"]


def resolve(values: dict[str, Any], file: str | None = None) -> RunConfig:
    """A checked configuration from flags, on top of a YAML file where one is named.

    Raises:
        ConfigError: an option is unknown (with the nearest name), has the wrong type, or no effect for this method.
    """
    merged = {**(load_yaml(file) if file else {}), **values}
    cls = objective_class(str(merged.get("method", "dpo")))
    fields = {f.name: f for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for key, value in merged.items():
        if key in fields:
            options[key] = typed(cls, fields[key], value)
        elif key in run_options():
            # YAML reads the code 1 as a number; columns and codes are names
            ours[key] = {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
        else:
            raise ConfigError(_unknown(key, cls, [*fields, *run_options()]))
    try:
        config = RunConfig(**ours, options=options)
    except ValidationError as e:
        raise ConfigError(_readable(e)) from e
    for name, field in fields.items():
        if source := field.metadata.get("follows"):
            wanted = getattr(config, source)
            if config.options.setdefault(name, wanted) != wanted:
                raise ConfigError(
                    f"{cls.name()}: {name} is {config.options[name]} and {source} is {wanted}: they are one number. "
                    f"Remove {name}."
                )
    config.objective()
    _refuse(config, {k for k, v in ours.items() if v is not None})
    return config


def recipes(folder: str = "") -> list[str]:
    """Names of the shipped recipes: every method's, and ``online/`` procedures."""
    found = RECIPES.glob(f"{folder}/*.yaml") if folder else (*RECIPES.glob("*.yaml"), *RECIPES.glob("online/*.yaml"))
    return sorted(str(f.relative_to(RECIPES).with_suffix("")) for f in found)


def load_yaml(file: str) -> dict[str, Any]:
    """A flat YAML mapping: the user's file, or a shipped recipe by its name (``ppo``, ``online/oaif``)."""
    path, shipped = Path(file), RECIPES / f"{file}.yaml"
    if not path.is_file() and file in recipes():
        path = shipped
    if not path.is_file():
        raise ConfigError(
            f"{file} is not a file, and no recipe has that name.{nearest(file, recipes())} Pass --config FILE.yaml, or the "
            "name of a recipe (`trimtab methods` lists them), or leave it out."
        )
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise ConfigError(
            f"{file} is not YAML: {' '.join(str(e).split())}. Write one `option: value` on each line."
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file} is not text. Pass --config FILE.yaml with one `option: value` on each line.") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a flat list of `option: value`, found {type(found).__name__}.")
    for key, value in found.items():
        if isinstance(value, dict | list) and key not in ("columns", "labels"):
            raise ConfigError(
                f'{file}: "{key}" holds a {type(value).__name__}, expected one value. The file is flat: write each '
                "option on a line of its own, without a heading above it."
            )
    return {str(k): v for k, v in found.items()}


def _unknown(key: str, cls: type[Objective], known: list[str]) -> str:
    from trimtab.objectives import methods

    owners = [m for m, c in methods().items() if key in {f.name for f in dataclasses.fields(c)}]
    if owners:
        return (
            f'The option "{key}" has no effect for method {cls.name()}; it belongs to {", ".join(owners)}. '
            "Remove it, or choose one of those methods."
        )
    return f'There is no option "{key}".{nearest(key, known)} See `trimtab train --options` and `trimtab methods {cls.name()}`.'


def _readable(e: ValidationError) -> str:
    lines = []
    for error in e.errors():
        name = ".".join(str(p) for p in error["loc"])
        found = "" if error["type"] == "missing" else f', found "{error["input"]}"'
        lines.append(f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}{found}.")
    return " ".join(lines)


# only where answers are sampled; and what then decides nothing
ONLINE = (
    *(
        "rounds",
        "prompts_per_round",
        "answers",
        "keep_answers",
        "keep_beta",
        "partner_mix",
        "sampler",
        "sampler_model",
        "sampler_reload",
        "passes",
        "sample_temperature",
        "keep_rounds",
        "redraw",
        "end_penalty",
    ),
    *(
        "token_penalty",
        "overlong_buffer",
        "overlong_penalty",
        "largest_gap",
        "correct_sampling",
        "test_judge",
        "watch_every",
    ),
)
OF_A_FILE = ("convert", "epochs", "max_steps", "ties", "match_prompts", "eval_every", "truncation", "max_truncated")


def without_effect(config: RunConfig) -> dict[str, str]:
    """Options that decide nothing in this run, each with the reason."""
    objective = config.objective()
    idle: dict[str, str] = {}

    def add(why: str, *names: str) -> None:
        idle.update(dict.fromkeys(names, why))

    if config.judge is None:
        add("nothing is sampled (set judge)", *ONLINE)
    else:
        add("the answers are sampled and judged, not read from the file", *OF_A_FILE)
        if objective.feedback is not Rollouts:
            add(f"{objective.name()} learns from records, not from rollouts", "correct_sampling")
            if config.sampler is None:
                add(f"{objective.name()} learns from records, not from rollouts", "largest_gap")
            elif config.sample_temperature != 1:
                add("log-probs of a server are compared at temperature 1", "largest_gap")
        else:
            add(f"{objective.name()} learns from every answer that it sampled", "keep_answers")
        if objective.feedback is Rollouts or config.keep_answers is None:
            add("no answer is chosen (set keep_answers)", "keep_beta")
        if config.sampler is None:
            add("the policy samples here (set sampler)", "sampler_model", "sampler_reload")
        if config.test_judge is None:
            add("nothing is watched (set test_judge)", "watch_every")
        if config.overlong_buffer == 0:
            add("overlong_buffer is 0", "overlong_penalty")
        if objective.feedback.record is not Comparison:
            add(f"{objective.name()} does not learn from pairs", "pairs", "tie_threshold")
        if objective.feedback.record is not Thumb:
            add(f"{objective.name()} does not learn from thumbs", "score_threshold")
    if config.convert is None and config.judge is None:
        add("nothing is converted (set convert)", "tie_threshold", "score_threshold")
    if "reference" not in objective.needs:
        add(f"{objective.name()} has no reference model", "reference", "cache", "reference_every", "reference_mix")
    elif config.reference in ("adapter", "copy"):
        add(f"reference is {config.reference}", "cache")
    elif config.reference_every is not None:
        add("a reference that moves is a copy", "cache")
    elif "token_kl" in objective.needs:
        add(f"{objective.name()} needs the reference's whole distribution, which no cache holds", "cache")
    elif config.reference == "auto" and config.finetune == "lora":
        add("the reference is the switched-off adapter (set reference: cache)", "cache")
    if config.reference_every is None:
        add("the reference does not move (set reference_every)", "reference_mix")
    if config.finetune == "full":
        add("finetune is full", "l1", "lora_rank", "lora_alpha", "lora_targets")
    if objective.ties:
        add(f"{objective.name()} learns from ties itself", "ties")
    if not objective.weighs:
        add(f"{objective.name()} does not weigh rows", "match_prompts", "min_density_ratio", "max_density_ratio")
    elif config.match_prompts == "none":
        add("match_prompts is none", "min_density_ratio", "max_density_ratio")
    if config.template == "plain":
        add("template is plain", "chat_template", "eos")
    if "score" in objective.needs:
        answering = ("samples", "sample_tokens") if config.samples else ("sample_tokens",)
        add(f"{objective.name()} trains a reward model, which answers nothing", *answering)
    elif config.samples == 0 and config.judge is None:
        add("samples is 0", "sample_tokens")
    if config.holdout == 0:
        add("holdout is 0: there is nothing to evaluate on", "eval_every")
    if config.save_every is None:
        add("no checkpoint is written (set save_every)", "keep_checkpoints")
    if config.max_steps > 0 and config.judge is None:
        add("max_steps decides", "epochs")
    if config.ptx_data is None:
        add("no text is learned beside (set ptx_data)", "ptx_weight", "ptx_batch_size")
    if config.schedule == "constant":
        add("schedule is constant (use constant_with_warmup)", "warmup")
    return idle


def _refuse(config: RunConfig, given: set[str]) -> None:
    """What this run would silently ignore, or could not do."""
    objective = config.objective()
    for name, why in without_effect(config).items():
        if name in given:
            raise ConfigError(f'The option "{name}" has no effect here: {why}. Remove it.')
    if objective.feedback is Rollouts and config.judge is None:
        raise ConfigError(
            f"{objective.name()} learns from answers that the policy samples: say who judges them, such as "
            "--judge rule:FILE.py:FUNCTION. The data is then read as prompts."
        )
    if config.ptx_data is not None and "score" in objective.needs:
        raise ConfigError(
            f"{objective.name()} trains a reward model, which has no likelihood of text. Remove ptx_data."
        )
    if config.judge is not None and "score" in objective.needs:
        raise ConfigError(
            f"{objective.name()} trains a reward model, which answers nothing that could be judged. Drop judge."
        )
    if config.judge is not None and objective.feedback is Rollouts and config.sample_temperature != 1:
        raise ConfigError(
            f"{objective.name()} learns from the probability of its own answers, and the engine computes it at temperature 1; "
            f"sample_temperature is {config.sample_temperature:g}. Remove it."
        )
    if config.judge is not None and config.reference == "cache":
        raise ConfigError("reference: cache holds answers of a file, and here they are sampled. Use copy or adapter.")
    if config.partner_mix is not None and "reference" not in objective.needs:
        raise ConfigError(f"partner_mix samples from the reference, and {objective.name()} has none. Remove it.")
    if objective.partner and config.partner_mix != 1:
        raise ConfigError(
            f"{objective.name()} learns from pairs of the policy's answer and the reference's: set judge, partner_mix: 1 and "
            "answers: 1."
        )
    _refuse_choice(config)
    _refuse_sampler(config)
    _refuse_weights(config)
    if config.test_judge is not None and config.test_judge == config.judge:
        raise ConfigError(f"test_judge is {config.judge}, too: it is fooled by what fools judge. Name another one.")
    if config.test_judge is not None and config.samples < 2:
        raise ConfigError(
            f"samples is {config.samples}, and test_judge looks at that many answers. At least 2, better 50 or more."
        )
    if config.overlong_buffer > config.sample_tokens:
        raise ConfigError(
            f"overlong_buffer is {config.overlong_buffer} and an answer has {config.sample_tokens} tokens at most."
        )
    if config.finetune == "full" and config.reference == "adapter":
        raise ConfigError("reference: adapter needs finetune: lora; with full use copy or cache.")
    if config.reference_every is not None and config.reference in ("adapter", "cache"):
        raise ConfigError(
            f"reference_every renews a copy of the model; reference is {config.reference}. Use copy or auto."
        )
    if config.reference_every is not None and config.finetune == "lora" and config.reference_mix < 1:
        raise ConfigError(
            "reference_mix below 1 with LoRA would mix the factors, not their product. Use finetune: full, or reference_mix: 1."
        )
    if config.reference == "cache" and "token_kl" in objective.needs:
        raise ConfigError(
            f"{objective.name()} needs the reference's whole distribution at every token; the cache holds one number per "
            "token. Use reference: copy, or adapter with finetune: lora."
        )
    if "score" in objective.needs and objective.needs != {"score"}:
        raise ConfigError(
            f"{objective.name()} would need a reward model and log-probs at once ({', '.join(sorted(objective.needs))}), and a "
            "reward model has none. Train the reward model on its own."
        )
    if config.max_steps == 0:
        raise ConfigError(
            "max_steps is 0, which trains nothing. Pass a number above 0, or leave it out for whole epochs."
        )
    if config.resume and config.output is None:
        raise ConfigError("resume needs output: the run folder to go on with, such as --output runs/dpo-prefs-1.")
    if "mismatched" in objective.needs and config.batch_size < 2:
        raise ConfigError(
            f"{objective.name()} compares each answer with another row's in the batch: batch_size must be at least 2, better 8 "
            f"or more; it is {config.batch_size}."
        )
    _refuse_matching(config)
    _one_of("schedule", config.schedule, list(SCHEDULES))
    _one_of("optimizer", config.optimizer, list(OPTIMIZERS))
    for name, package in (("optimizer", OPTIMIZERS[config.optimizer]), ("report_to", config.report_to)):
        if package not in ("", "none") and find_spec(package) is None:
            raise ConfigError(
                f"{name}: {getattr(config, name)} needs a package that is not installed: pip install {package}."
            )


def _refuse_choice(config: RunConfig) -> None:
    kept, name = config.keep_answers, config.method
    if kept is None:
        return
    if kept >= config.answers:
        raise ConfigError(
            f"keep_answers is {kept} of {config.answers} answers: there is nothing to choose. Raise answers, or remove it."
        )
    if kept == 1 and config.objective().feedback.record in (Comparison, Ranking):
        raise ConfigError(f"keep_answers is 1, and {name} compares answers with each other. Keep at least 2.")
    if config.partner_mix is not None:
        raise ConfigError(
            "keep_answers chooses among answers of the policy, and with partner_mix one comes from elsewhere. Remove one of them."
        )


def _refuse_weights(config: RunConfig) -> None:
    held = config.weights
    if held == "float32":
        return
    if config.precision not in ("auto", "bfloat16"):
        raise ConfigError(
            f"weights: {held} has no more than bfloat16 to multiply, and precision is {config.precision}. Remove one of them."
        )
    if held == "nf4" and config.finetune == "full":
        raise ConfigError("weights: nf4 cannot learn, only an adapter on them can. Use finetune: lora.")
    if held == "nf4" and "score" in config.objective().needs:
        raise ConfigError("weights: nf4 is for language models; a reward model is trained on weights: bfloat16.")
    if held == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError("weights: nf4 needs a package that is not installed: pip install bitsandbytes.")
    if config.finetune == "full" and not config.optimizer.startswith("adamw_torch"):
        raise ConfigError(
            f"weights: bfloat16 learns through a float32 copy that AdamW keeps, and optimizer is {config.optimizer}. Use "
            "adamw_torch_fused or adamw_torch, or finetune: lora."
        )


def _refuse_sampler(config: RunConfig) -> None:
    from trimtab.online.served import FOLDER, SERVERS

    url, reload = config.sampler, config.sampler_reload
    if url is None:
        return
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f'sampler is "{url}"; expected an address up to /v1, such as http://127.0.0.1:8000/v1.')
    if find_spec("openai") is None:
        raise ConfigError("sampler: a server needs a package that is not installed: pip install 'openai>=1.60'.")
    if config.partner_mix is not None:
        raise ConfigError(
            "partner_mix needs the policy's and the reference's whole distributions, and a server gives none."
        )
    if reload is None and config.rounds > 1:
        raise ConfigError(
            f"rounds is {config.rounds}, and after the first the server would go on with the weights it has. Say how it gets new "
            "ones (sampler_reload), or set rounds: 1."
        )
    if reload is not None and reload not in SERVERS:
        try:
            named = any(FOLDER in word for word in shlex.split(reload))
        except ValueError as e:
            raise ConfigError(f"sampler_reload is no command ({e}): {reload}") from e
        if not named:
            raise ConfigError(
                f'sampler_reload is "{reload}".{nearest(reload, list(SERVERS))} Expected {", ".join(SERVERS)}, or a command with '
                f"{FOLDER}, where the new weights will be."
            )


def _refuse_matching(config: RunConfig) -> None:
    known, name = ["none", "tfidf", "policy"], config.match_prompts
    if config.min_density_ratio >= config.max_density_ratio:
        raise ConfigError(
            f"min_density_ratio {config.min_density_ratio:g} is not below max_density_ratio {config.max_density_ratio:g}."
        )
    if name not in known and find_spec("sentence_transformers") is None:
        raise ConfigError(
            f'match_prompts is "{name}".{nearest(name, known)} Known: {", ".join(known)}; any other name is a '
            "sentence-transformers model, which needs a package that is not installed: pip install sentence-transformers."
        )
    if name != "none" and find_spec("sklearn") is None:
        raise ConfigError(f"match_prompts: {name} needs a package that is not installed: pip install scikit-learn.")


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise ConfigError(f'{name} is "{value}".{nearest(value, known)} Known: {", ".join(known)}.')
