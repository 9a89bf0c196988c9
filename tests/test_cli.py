"""The command line, end to end on a tiny model: what every command prints, writes and leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.command import done, trimtab
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.cli import files_and_options
from trimtab.feedback.read import read
from trimtab.feedback.records import Message
from trimtab.logprobs.scored import Rollouts
from trimtab.models import grow_vocabulary
from trimtab.objectives import methods
from trimtab.online.sample import Answer
from trimtab.tokens.template import Template

COMMANDS = (
    "train",
    "plan",
    "data check",
    "data show",
    "data convert",
    "methods",
    "score",
    "judge",
    "pipeline",
    "merge",
    "generate",
    "compare",
    "report",
    "doctor",
    "demo",
)
SHORT = ("--max_steps", 2, "--batch_size", 4, "--precision", "float32")
JUDGE = "def odd(prompt, answer):\n    return sum(map(ord, answer)) % 11 / 10\n"
ROUNDS = ("--judge", "rule:judge.py:odd", "--rounds", 2, "--prompts_per_round", 2, "--precision", "float32")
ROOT = Path(__file__).parent.parent
ESCAPE = "\x1b"
# a reward model answers nothing: its runs are in test_reward_models.py
POLICIES = [name for name, cls in methods().items() if "score" not in cls.needs]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli")
    tiny_folder(folder / "tiny")
    (folder / "judge.py").write_text(JUDGE)
    for kind in ("comparison", "ties", "thumb", "score", "demonstration", "ranking", "prompt"):
        feedback_file(folder / f"{kind}.jsonl", kind, 12)
    return folder


@pytest.fixture(autouse=True)
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Callable[[str], tuple[Path, str]]:
    """(run folder, what was printed) of a method, trained once for all tests of this file."""
    runs: dict[str, tuple[Path, str]] = {}

    def train(method: str) -> tuple[Path, str]:
        if method not in runs:
            folder = workspace / "trained" / method
            options = ("--samples", 2, "--sample_tokens", 6, "--learning_rate", 0.01, "--holdout", 0.2)
            cls = methods()[method]
            short = ROUNDS if cls.feedback is Rollouts or cls.partner else SHORT
            short += ("--partner_mix", 1, "--answers", 1) if cls.partner else ()
            words = ("--method", method, "--model", "./tiny", *short, *options, "--output", folder)
            runs[method] = folder, done("train", data_of(method), *words)
        return runs[method]

    return train


def data_of(method: str) -> str:
    kind = methods()[method].feedback.record.__name__.lower()
    return "ties.jsonl" if methods()[method].ties else f"{kind}.jsonl"


def command(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """A real process, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "trimtab", *map(str, words)], text=True, capture_output=True, env=environment, **more
    )


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_is_a_real_command(name: str) -> None:
    told = " ".join(done(*name.split(), "--help").replace("│", " ").split())
    assert f"Example: trimtab {name}" in told
    example = told.split("Example: ")[1].split()[1:]
    assert tuple(example[: len(name.split())]) == tuple(name.split())


def test_every_command_is_in_this_file() -> None:
    from trimtab.cli import app, data_app

    names = [c.name or c.callback.__name__ for c in app.registered_commands]  # type: ignore[union-attr]
    data = [c.name or c.callback.__name__ for c in data_app.registered_commands]  # type: ignore[union-attr]
    assert sorted(COMMANDS) == sorted([*names, *(f"data {n}" for n in data)])


def test_help_documents_the_exit_codes() -> None:
    told = " ".join(done("--help").split())
    assert "Exit codes: 0 done;" in told and "2 something to correct" in told and "130 interrupted" in told


def test_options_lists_every_option_with_its_meaning() -> None:
    from trimtab.config import RunConfig

    told = done("train", "--options")
    for name, field in RunConfig.model_fields.items():
        if name not in ("data", "options"):
            assert f"--{name} " in told
            assert field.description
    assert " ".join(told.split()).count("(default: 1024)") == 1


def test_unknown_command_and_missing_argument() -> None:
    found = trimtab("trian")
    assert found.code == 2 and "Did you mean 'train'?" in found.err
    found = trimtab("report")
    assert found.code == 2 and "Missing argument" in found.err
    assert trimtab("train").error.startswith("Name a feedback file: trimtab train FILE --method dpo")


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", POLICIES)
def test_every_method_trains_and_leaves_a_whole_run_folder(
    method: str, trained: Callable[[str], tuple[Path, str]]
) -> None:
    folder, told = trained(method)
    assert told.splitlines()[-1] == f"done: {folder}"
    for name in ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "adapter", "config.json"):
        assert (folder / name).exists(), name
    card = json.loads((folder / "run.json").read_text())
    assert card["status"] == "finished" and card["method"] == method and card["seed"] == 0 and card["steps"] == 2
    assert card["command"].startswith(f"trimtab train {data_of(method)} --method {method} ")
    assert {"python", "torch", "transformers", "peft"} <= card["versions"].keys()
    assert {"data", "code", "template", "model"} <= card["fingerprints"].keys() and all(card["fingerprints"].values())
    assert card["data"]["rows"] == 12 == card["data"]["train"] + card["data"]["held_out"]
    assert card["checks"] and all(check["ok"] for check in card["checks"])
    needs = "reference" in methods()[method].needs
    assert any("policy equals reference" in check["name"] for check in card["checks"]) == needs
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and all({"prompt", "before", "after"} <= row.keys() for row in samples)
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"] == method
    assert "finished" in (folder / "report.html").read_text()


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
out = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": "0: abc?"}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
    g = model.generation_config
    made = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    out[folder] = {"ids": ids, "logits": model(torch.tensor([ids])).logits[0, -1].tolist(), "made": made.tolist(),
                   "attention": model.config._attn_implementation, "eos": g.eos_token_id, "pad": g.pad_token_id}
assert not [m for m in sys.modules if m.split(".")[0] in ("trimtab", "peft")]
json.dump(out, open(sys.argv[1], "w"))
"""


def test_run_folders_load_in_plain_transformers(trained: Callable[[str], tuple[Path, str]], tmp_path: Path) -> None:
    """In a process that has never heard of trimtab: same prompt ids, same logits, an end token, stock attention."""
    folders = [trained(method)[0] for method in POLICIES]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PLAIN, str(tmp_path / "out.json"), *map(str, folders)]
    subprocess.run(words, check=True, env=environment, capture_output=True, cwd=tmp_path)
    out = json.loads((tmp_path / "out.json").read_text())
    for folder in folders:
        found = out[str(folder)]
        template = Template(AutoTokenizer.from_pretrained(folder))
        assert found["ids"] == template.prompt_ids((Message("user", "0: abc?"),))
        assert found["attention"] == "sdpa" and found["eos"] == 1 and found["pad"] == 1
        base = AutoModelForCausalLM.from_pretrained("tiny")
        grow_vocabulary(base, len(template.tokenizer))  # a method with control tokens has two more
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in yesterday's words
            adapted = PeftModel.from_pretrained(base, folder / "adapter")
        with torch.no_grad():
            ids = torch.tensor([found["ids"]])
            with_adapter = adapted(ids).logits[0, -1]
            with adapted.disable_adapter():
                without = adapted(ids).logits[0, -1]
        merged = torch.tensor(found["logits"])
        assert torch.allclose(merged, with_adapter, atol=1e-5)
        assert (merged - without).abs().max() > 1e-4, "nothing was learned"


@pytest.mark.parametrize("method", POLICIES)
def test_what_is_served_is_what_was_trained_on(method: str, trained: Callable[[str], tuple[Path, str]]) -> None:
    folder, _ = trained(method)
    for file in folder.glob("*.json"):
        if file.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            assert "trimtab" not in file.read_text()
    stated = GenerationConfig.from_pretrained(folder)
    assert stated.eos_token_id == 1 and stated.pad_token_id == 1
    served, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained("tiny")
    asked = methods()[method].control_tokens[:1]  # a method with control tokens asks for the good one
    suffix = "".join("{% if add_generation_prompt %}" + token + "{% endif %}" for token in asked)
    assert served.chat_template == original.chat_template + suffix
    template = Template(original)
    for record in read(data_of(method)).records:
        messages = [{"role": m.role, "content": m.content} for m in record.prompt]
        ids = served.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        opening = served.convert_tokens_to_ids(list(asked))
        assert tuple(ids) == (*template.encode(record).prompt, *opening)


def test_full_finetuning_saves_the_trained_weights(tmp_path: Path) -> None:
    more = ("--finetune", "full", "--learning_rate", 0.01, "--samples", 0, "--output", tmp_path / "run")
    told = done("train", "demonstration.jsonl", "--method", "sft", "--model", "./tiny", *SHORT, *more)
    assert "(full, float32, shared)" in told
    old = AutoModelForCausalLM.from_pretrained("tiny").state_dict()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert old.keys() == new.keys() and not torch.equal(old["model.norm.weight"], new["model.norm.weight"])
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_given_chat_template_is_saved_with_the_model(tmp_path: Path) -> None:
    """LLaMA-Factory#5836, unsloth#1832: the served model formats otherwise than trained."""
    text = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    text += "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    Path("mine.jinja").write_text(text)
    more = ("--chat_template", "mine.jinja", "--samples", 0, "--output", tmp_path / "run")
    done("train", "comparison.jsonl", "--model", "./tiny", *SHORT, *more)
    served = AutoTokenizer.from_pretrained(tmp_path / "run")
    messages = [{"role": "user", "content": "Hi"}]
    assert served.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "[user]Hi[assistant]"


def test_flags_are_yaml(tmp_path: Path) -> None:
    """The same names give the same run: resolved configuration, metrics and weights."""
    Path("run.yaml").write_text(
        "data: comparison.jsonl\nmethod: simpo\nmodel: ./tiny\nbeta: 1.5\nmax_steps: 2\nbatch_size: 4\n"
        "precision: float32\nlearning_rate: 1e-2\nsamples: 0\n"
    )
    done("train", "--config", "run.yaml", "--output", tmp_path / "a")
    flags = ("--method", "simpo", "--model", "./tiny", "--beta", 1.5, *SHORT, "--learning-rate=0.01", "--samples", 0)
    done("train", *flags, "comparison.jsonl", "--output", tmp_path / "b")
    done("train", "--config", tmp_path / "a" / "config.yaml", "--output", tmp_path / "c")
    cards = [json.loads((tmp_path / n / "run.json").read_text()) for n in "abc"]
    configs = [{k: v for k, v in card["config"].items() if k != "output"} for card in cards]
    assert configs[0] == configs[1] == configs[2]
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in "abc"]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and torch.equal(value, weights[2][name])
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "abc"
    ]
    assert losses[0] == losses[1] == losses[2]
    done("train", "--config", "run.yaml", "--beta", 2.5, "--output", tmp_path / "d")  # flags go before the file
    assert json.loads((tmp_path / "d" / "run.json").read_text())["config"]["beta"] == 2.5


def test_files_stand_anywhere_between_the_flags() -> None:
    alone = {"--options", "--help"}
    for words in (
        ["a.jsonl", "--method", "dpo", "--resume"],
        ["--method", "dpo", "a.jsonl", "--resume"],
        ["--method", "dpo", "--resume", "a.jsonl"],
        ["--resume", "--method=dpo", "a.jsonl"],
    ):
        files, options = files_and_options(words, alone)
        assert files == ["a.jsonl"] and sorted(options) == ["--method=dpo", "--resume"]
    assert files_and_options(["--resume", "false", "a"], alone) == (["a"], ["--resume=false"])
    assert files_and_options(["--max_steps", "-1", "a"], alone) == (["a"], ["--max_steps=-1"])
    assert files_and_options(["--options", "a"], alone) == (["a"], ["--options"])
    found = trimtab("data", "check", "--limit", 4)  # 4 is not the file
    assert found.code == 2 and "Missing argument 'file'" in found.err
    assert trimtab("train", "--method", "dpo").error.startswith("Name a feedback file: ")


# --- what is printed --------------------------------------------------------------------------------------------------


def test_training_prints_plain_lines_where_there_is_no_terminal(trained: Callable[[str], tuple[Path, str]]) -> None:
    _, told = trained("dpo")
    assert ESCAPE not in told and "\r" not in told
    lines = told.splitlines()
    assert lines[0] == "comparison.jsonl: trimtab; 12 rows -> 10 to train on, 2 held out"
    assert re.match(r"  tokens: prompt \d+ \(max \d+\), chosen \d+ .*; 0 rows cut, end-of-sequence lost in 0", lines[1])
    step = r"step 2/2  0:00 left  loss \d\.\d{4}  margin -?\d\.\d{3}  accuracy \d\.\d{3}  [\d,]+ tokens/s  \d+\.\d GB"
    assert sum(bool(re.fullmatch(step, line)) for line in lines) == 1
    assert [line for line in lines if line.startswith("report: ")] and lines[-1].startswith("done: ")


def test_a_terminal_gets_a_live_line(tmp_path: Path) -> None:
    """The same command on a pseudo-terminal: one line that is rewritten, and nothing left of it but its last state."""
    main, other = pty.openpty()
    words = ["train", "comparison.jsonl", "--model", "./tiny", *SHORT, "--samples", 0, "--output", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", *map(str, words)], stdout=other, stderr=other, env=environment
    )
    os.close(other)
    told = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        told += part
    assert process.wait() == 0
    os.close(main)
    text = told.decode()
    assert ESCAPE in text and "step 2/2" in text and "done: " in text and "Traceback" not in text


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    words = f"{sys.executable} -m trimtab methods | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", words], text=True, capture_output=True, env=environment).stderr == ""


def test_ctrl_c_saves_the_model_and_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "comparison.jsonl", "--model", "./tiny", "--max_steps", 100_000, "--batch_size", 4]
    words += ["--samples", 2, "--sample_tokens", 4, "--learning_rate", 0.01, "--warmup", 0, "--output", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    waited = 0.0
    while not (folder / "metrics.jsonl").exists() and process.poll() is None and waited < 90:
        time.sleep(0.1)
        waited += 0.1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err and err == ""
    assert "interrupted: saving the model and writing the report" in out
    assert out.splitlines()[-1] == f"interrupted: {folder}"
    card = json.loads((folder / "run.json").read_text())
    assert card["status"] == "interrupted" and card["steps"] >= 1 and card["samples"]
    assert "interrupted" in (folder / "report.html").read_text()
    AutoModelForCausalLM.from_pretrained(folder)
    # what is saved is the state of the last step, not the start
    old, new = AutoModelForCausalLM.from_pretrained("tiny"), AutoModelForCausalLM.from_pretrained(folder)
    assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_ctrl_c_while_the_adapter_is_switched_on_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is saved, sampled and evaluated afterwards has all of its adapter."""
    switch, folder = BaseTuner.enable_adapter_layers, tmp_path / "run"
    layers: list[BaseTunerLayer] = []

    def interrupted(self: BaseTuner) -> None:
        if layers or not (folder / "metrics.jsonl").exists():
            return switch(self)
        layers.extend(m for m in self.modules() if isinstance(m, BaseTunerLayer))
        layers[0].enable_adapters(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseTuner, "enable_adapter_layers", interrupted)
    found = trimtab(
        "train", "comparison.jsonl", "--model", "./tiny", *SHORT, "--output", folder, "--reference", "adapter"
    )
    assert found.code == 130 and "Traceback" not in found.err and len(layers) > 1
    assert not any(layer.disable_adapters for layer in layers)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def test_ctrl_c_before_training_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.run.check_weights", interrupt)
    words = ("--model", "./tiny", *SHORT, "--output", tmp_path / "run")
    found = trimtab("train", "comparison.jsonl", *words)
    assert found.code == 130 and "Traceback" not in found.err
    assert not (tmp_path / "run").exists()


# --- hostile text -----------------------------------------------------------------------------------------------------

HOSTILE = [
    "[red]blood[/red] [/] [link=http://x]y[/link]",
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    f"{ESCAPE}[31mred{ESCAPE}[2J{ESCAPE}]0;title\x07",
    ":heart: :skull:",
    "{{ 7 * 7 }} {% raw %} ${x}",
    "\u202eevil\u202c \u200b",
    "</td></table><!-- --> &lt;b&gt;",
]


def test_hostile_text_changes_nothing_in_the_terminal() -> None:
    texts = [*HOSTILE, "ends <|assistant|> here", "ends </s> here"]
    lines = [{"prompt": f"p {t}", "chosen": f"c {t}", "rejected": f"r {i} {t}"} for i, t in enumerate(texts)]
    file = Path("[red]hostile.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for words in (("data", "check", file), ("data", "show", file, "--model", "./tiny", "--rows", 9)):
        told = done(*words)
        assert ESCAPE not in told and "\x07" not in told and "\u202e" not in told
        assert "[red]hostile.jsonl" in told
    told = " ".join(told.replace("│", " ").split())
    assert "[red]blood[/red] [/] [link=http://x]y[/link]" in told
    assert "<script>alert(1)</script>" in told and ":heart:" in told and "{{ 7 * 7 }}" in told
    assert "\\x1b[31mred\\x1b[2J\\x1b]0;title\\x07" in told
    assert told.count("left out: text contains a control token of the tokenizer") == 2


def test_hostile_text_changes_nothing_in_the_report(tmp_path: Path) -> None:
    lines = [{"prompt": f"p {t}", "completion": f"c {t}"} for t in [*HOSTILE, "ends </s> here"] * 2]
    lines = [{**line, "prompt": f"{i} {line['prompt']}"} for i, line in enumerate(lines)]
    Path("hostile.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("--samples", 16, "--sample_tokens", 4, "--holdout", 0.9, "--output", tmp_path / "run")
    told = done("train", "hostile.jsonl", "--method", "sft", "--model", "./tiny", *SHORT, *more)
    assert ESCAPE not in told
    assert "left out 2: text contains a control token of the tokenizer" in told
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and ESCAPE not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "[red]blood[/red]" in page and "{{ 7 * 7 }}" in page
    assert page.count("<script>") == 1


def test_hostile_answers_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    ids = [tuple(tokenizer(text)["input_ids"]) for text in HOSTILE]
    monkeypatch.setattr("trimtab.online.sample.sample", lambda *_, **__: [[Answer(i, True, ())] for i in ids])
    told = done("generate", "hi", "--model", "./tiny")
    assert ESCAPE not in told and "\x07" not in told and "\u202e" not in told
    lines = told.splitlines()
    assert lines[0] == HOSTILE[0] and lines[1] == HOSTILE[1] and lines[3] == HOSTILE[3] and lines[4] == HOSTILE[4]


def test_hostile_error_messages() -> None:
    Path("columns.jsonl").write_text(json.dumps({f"{ESCAPE}[2J[red]a": "b", "c": "d"}) + "\n")
    found = trimtab("train", "columns.jsonl").error
    assert ESCAPE not in found and "␛[2J[red]a" in found


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_check() -> None:
    assert done("data", "check", "ties.jsonl") == (
        "ties.jsonl: trimtab\n12 rows, 12 of kind comparison, 12 prompts\n4 ties\n"
    )
    assert "6 thumbs up, 6 down\n" in done("data", "check", "thumb.jsonl")
    told = done("data", "check", "ranking.jsonl", "--convert", "comparison", "--limit", 4)
    assert "4 rows, 12 of kind comparison, 4 prompts" in told and "4 ranking -> 12 comparison" in told


def test_data_show_marks_exactly_the_trained_tokens() -> None:
    """The tiny tokenizer has one token per byte, so the counts are known: the answer's bytes and the end token."""
    rows = [{"prompt": "Größe?", "chosen": "2 µm – 好", "rejected": "no\nidea"}]
    Path("show.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n")
    told = done("data", "show", "show.jsonl", "--model", "./tiny", "--rows", 1)
    chosen, rejected = len(rows[0]["chosen"].encode()) + 1, len(rows[0]["rejected"]) + 1
    assert f"chosen ({chosen} tokens trained) 2 µm – 好</s>" in told
    assert f"rejected ({rejected} tokens trained) no⏎" in told and "idea</s>" in told
    assert "show.jsonl row 1 · prompt" in told and "<s><|user|>Größe?<|assistant|>" in told
    assert ESCAPE not in told


def test_data_convert_says_what_is_lost_and_is_read_again(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    told = done("data", "convert", "ranking.jsonl", "--to", "comparison", "--out", out)
    assert told.startswith("12 ranking -> 36 comparison") and "Lost: " in told
    assert told.endswith(f"{out}: 36 records\n")
    assert "36 rows, 36 of kind comparison, 12 prompts" in done("data", "check", out)
    assert trimtab("data", "convert", "ranking.jsonl", "--to", "thumbs", "--out", out).error.startswith(
        '"thumbs" is not a kind of feedback. Did you mean "thumb"? Known: '
    )


# --- methods ----------------------------------------------------------------------------------------------------------


def test_methods_lists_all() -> None:
    told = done("methods")
    for name, cls in methods().items():
        (line,) = [line for line in told.splitlines() if f" {name} " in line]
        assert cls.feedback.record.__name__.lower() in line and ("+ ties" in line) == cls.ties


@pytest.mark.parametrize("name", methods())
def test_method_in_full(name: str) -> None:
    import dataclasses

    told, cls = done("methods", name), methods()[name]
    assert cls.equation() in told and cls.paper in told
    for field in dataclasses.fields(cls):
        assert f"--{field.name} {field.default}: " in told
    assert " ".join(f"when not to use it: {cls.avoid}".split()) in " ".join(told.split()) and cls.avoid


# --- the trained model ------------------------------------------------------------------------------------------------


def test_token_credit_adds_up_to_the_reward(trained: Callable[[str], tuple[Path, str]], tmp_path: Path) -> None:
    folder, whole, parts, page = trained("dpo")[0], tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.html"
    for out, flags in ((whole, ()), (parts, ("--tokens",)), (page, ())):
        done("score", "comparison.jsonl", "--policy", folder, "--beta", 0.3, "--out", out, *flags)
    rewards = [s.score for s in read(whole).records]
    with gzip.open(parts, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [line["score"] for line in lines] == pytest.approx(rewards, abs=1e-5)
    for line in lines:
        assert sum(line["credit"]) == pytest.approx(line["score"], abs=1e-5)
        assert len(line["credit"]) == len(line["tokens"]) > 1
        assert "".join(line["tokens"]).startswith(line["completion"])
    text = page.read_text()
    assert text.count('class="answer"') == 24 and text.count("<span ") == sum(len(line["tokens"]) for line in lines)
    assert "<script" not in text and "rgba(214,60,60" in text and "rgba(38,160,83" in text


def test_score_is_beta_times_the_log_ratio(trained: Callable[[str], tuple[Path, str]], tmp_path: Path) -> None:
    """Against a computation by hand: logits of both models with plain transformers."""
    folder, out = trained("dpo")[0], tmp_path / "rewards.jsonl"
    told = done("score", "comparison.jsonl", "--policy", folder, "--beta", 0.3, "--out", out)
    assert re.fullmatch(
        rf"{re.escape(str(out))}: 24 completions scored; the preferred one has the higher reward in \d+ of 12 "
        r"comparisons\n",
        told,
    )
    scores = read(out).records
    records = read("comparison.jsonl").records
    assert [s.completion for s in scores] == [c for r in records for c in r.completions]
    template = Template(AutoTokenizer.from_pretrained(folder))
    models = [AutoModelForCausalLM.from_pretrained(p).double() for p in (folder, "tiny")]
    for k, record in enumerate(records[:3]):
        example = template.encode(record)
        for side in (0, 1):
            ids = torch.tensor([[*example.prompt, *example.completions[side]]])
            start = len(example.prompt)
            with torch.no_grad():
                sums = [
                    m(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).sum()
                    for m in models
                ]
            assert scores[2 * k + side].score == pytest.approx(0.3 * (sums[0] - sums[1]).item(), abs=1e-4)


def test_generate(trained: Callable[[str], tuple[Path, str]]) -> None:
    folder = trained("sft")[0]
    words = ("generate", "Hi there", "And you?", "--model", folder, "--max_new_tokens", 4)
    assert done(*words) == done(*words)
    drawn = ("generate", "Hi", "--model", folder, "--max_new_tokens", 12, "--temperature", 1)
    assert done(*drawn, "--seed", 1) == done(*drawn, "--seed", 1) != done(*drawn, "--seed", 2)


def test_generate_with_a_template_that_refuses(tmp_path: Path) -> None:
    folder = shutil.copytree("tiny", tmp_path / "strict")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('A system message first.') }}")
    assert trimtab("generate", "Hi", "--model", folder).error == (
        f"the prompt cannot be put to {folder}: the chat template refused the conversation: A system message first.."
    )


def test_report_is_written_again(trained: Callable[[str], tuple[Path, str]], tmp_path: Path) -> None:
    folder = shutil.copytree(trained("kto")[0], tmp_path / "run")
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert done("report", folder) == f"report: {folder}/report.html\n"
    assert (folder / "report.html").read_text() == before
    assert trimtab("report", tmp_path).error.startswith(f"{tmp_path} holds neither run.json nor metrics.jsonl")


def test_doctor_performs_a_step() -> None:
    before = set(Path().rglob("*"))
    told = done("doctor", "thumb.jsonl", "--model", "./tiny", "--method", "kto")
    assert "torch " in told and "TFLOP/s" in told
    assert "ok: layouts agree with the plain forward pass: shared = plain forward on 4 rows" in told
    assert "ok: policy equals reference at step 0: largest |log-ratio| 0 nats" in told
    assert "step 1/1" in told and "one optimiser step ran; " in told
    assert set(Path().rglob("*")) == before, "the doctor left something behind"


def test_the_module_runs_as_a_command() -> None:
    found = command("methods", "dpoo")
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith('error: There is no method "dpoo". Did you mean "dpo"?')
