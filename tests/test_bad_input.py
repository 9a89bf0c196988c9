"""Twenty kinds of bad input through the command line: one message each that says what, where, found, expected, do this.

Exit code 2, nothing but the message on standard error, no traceback, and no run folder left behind by a run that never
began. The texts are asserted, because they are what a user has to work with.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.command import Outcome, done, trimtab
from tests.tiny_folder import feedback_file, tiny_folder, tokenizer
from trimtab.feedback.records import Comparison, Demonstration, Record, Thumb
from trimtab.objectives import methods

ONE_STEP = ("--model", "./tiny", "--max_steps", 1, "--batch_size", 4, "--samples", 0)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and small files of several kinds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bad")
    tiny_folder(folder / "tiny")
    shutil.copytree(folder / "tiny", folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    for kind in ("comparison", "ties", "thumb", "score", "demonstration"):
        feedback_file(folder / f"{kind}.jsonl", kind, 12)
    return folder


@pytest.fixture(autouse=True)
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test starts in the workspace, and leaves no run folder there unless it named one."""
    monkeypatch.chdir(workspace)
    yield workspace
    assert not list(workspace.glob("runs/*")), "a run that never began left a folder behind"


def rows(name: str, *found: dict[str, Any]) -> Path:
    """A jsonl file of these rows in the current folder."""
    path = Path(name)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    return path


def pair(i: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea.", **changes}


def able(kind: type[Record], *, ties: bool = False, but: str = "") -> str:
    """Names of the methods that learn from this kind, as messages list them."""
    names = (n for n, c in methods().items() if c.feedback.record is kind and (c.ties or not ties) and n != but)
    return ", ".join(names)


def refused(file: str | Path, *options: object) -> str:
    """The message of a training run that must not start."""
    return trimtab("train", file, *ONE_STEP, *options).error


# --- 1 and 2: the file ------------------------------------------------------------------------------------------------


def test_missing_file_names_its_neighbours() -> None:
    Path("empty").mkdir(exist_ok=True)
    assert refused("empty/prefs.jsonl") == (
        "empty/prefs.jsonl does not exist. The folder empty holds no files. For a hub data set write hub:org/name."
    )
    found = refused("pairs.jsonl")
    assert found.startswith("pairs.jsonl does not exist. In that folder: ") and "comparison.jsonl" in found


@pytest.mark.parametrize("content", [b"\x7fELF\0\1\2" * 50, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0" * 100])
def test_binary_file(content: bytes) -> None:
    Path("model.jsonl").write_bytes(content)
    assert refused("model.jsonl") == (
        "model.jsonl is a binary file. Known: jsonl, json, csv, tsv (each also .gz) and parquet."
    )


def test_half_a_download_names_the_line() -> None:
    Path("cut.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho')
    assert refused("cut.jsonl") == (
        'cut.jsonl line 2: not valid JSON (Unterminated string starting at at column 17, near \'{"prompt": "a", '
        "\"cho'). Correct the line, or write the file again if it was cut off."
    )


def test_empty_file_and_folder() -> None:
    Path("nothing.jsonl").write_text("")
    assert refused("nothing.jsonl") == (
        "nothing.jsonl is empty (0 rows). Check the path, or the command that wrote it."
    )
    assert refused("tiny") == "tiny is a folder: name one file in it."


def test_wrong_columns_name_the_nearest_layout() -> None:
    found = refused(rows("columns.jsonl", *[{"prompts": "a", "choosen": "b", "rejected": "c"}] * 3))
    assert found.startswith(
        "columns.jsonl: the columns found fit no known layout. Found: prompts, choosen, rejected. "
        'Nearest: "trl preference" (prompt, chosen, rejected), which lacks prompt, chosen. '
        'Rename with columns={"prompt": "prompts", "chosen": "choosen"}. Known: '
    )
    # and the remedy works
    renamed = done("data", "check", "columns.jsonl", "--columns", '{"prompt": "prompts", "chosen": "choosen"}')
    assert "3 of kind comparison" in renamed


# --- 3 to 7: rows that cannot mean what they say ----------------------------------------------------------------------


def test_empty_completion_is_counted_and_dropped_or_refused() -> None:
    file = rows("empty.jsonl", pair(1), pair(2, chosen=" \n"), pair(3), pair(4, rejected=""))
    said = done("data", "check", file)
    assert "4 rows, 2 of kind comparison, 2 prompts\nleft out 2: empty completion (rows 2, 4)\n" in said
    told = done("train", file, *ONE_STEP, "--holdout", 0, "--output", "empty-run")
    assert "empty.jsonl: trl preference; 4 rows -> 2 to train on, 0 held out\n  left out 2: empty completion\n" in told
    card = json.loads(Path("empty-run/run.json").read_text())
    assert card["data"]["dropped"] == {"empty completion": 2}
    assert refused(file, "--bad_rows", "refuse") == (
        'empty.jsonl row 2: "chosen" is empty. There is nothing to train on: drop the row.'
    )


def test_identical_pair() -> None:
    file = rows("same.jsonl", pair(1), pair(2, chosen="No idea. "))
    assert refused(file, "--bad_rows", "refuse") == (
        'same.jsonl row 2: "chosen" equals "rejected" after stripping whitespace (both 8 characters). '
        'A pair must differ: drop the row, or label it "tie": true.'
    )
    assert "left out 1: chosen equals rejected (rows 2)" in done("data", "check", file)
    assert refused(rows("all.jsonl", *[pair(2, chosen="No idea. ")] * 3)) == (
        'all.jsonl: none of 3 rows can be used as "trl preference". chosen equals rejected: 3 (first in row 1). '
        "Correct them, or pass shape=."
    )


def test_contradictory_labels() -> None:
    file = rows("both.jsonl", pair(1), pair(2), pair(1, chosen="No idea.", rejected="It is 1."))
    assert "1 pair judged in two ways (rows 1 and 3).\n" in done("data", "check", file)
    assert refused(file, "--bad_rows", "refuse") == (
        "both.jsonl: 1 pair judged in two ways (rows 1 and 3). "
        "Keep one of them, or read with bad_rows=drop to keep all."
    )
    thumbs = rows("thumbs.jsonl", *({"prompt": "a", "completion": "b", "label": up} for up in (True, False)))
    assert "1 completion both up and down (rows 1 and 2).\n" in done("data", "check", thumbs)


def test_label_codes_are_never_guessed() -> None:
    answers = {"response_a": "x", "response_b": "y"}
    file = rows("codes.jsonl", *({"prompt": f"q{i}", **answers, "label": i % 3} for i in range(7)))
    assert refused(file) == (
        'codes.jsonl: the codes in "label" mean different things in different data sets. '
        "Rows per code: '0' 3, '1' 2, '2' 2. Say what each one means, for example "
        'labels={"1": "first", "2": "second", "0": "tie"}; known meanings: first, second, tie, drop.'
    )
    said = done("data", "check", file, "--labels", '{"1": "first", "2": "second", "0": "tie"}')
    assert "7 of kind comparison" in said and "3 ties" in said
    thumbs = rows("thumbs01.jsonl", *({"prompt": f"q{i}", "completion": "x", "label": i % 2} for i in range(4)))
    assert 'for example labels={"1": "desirable", "0": "undesirable"}' in refused(thumbs, "--method", "kto")


def test_ambiguous_prompt_is_not_cut_inside_a_word() -> None:
    """The two rows of trl#6079: a character-level prefix would make "The sky is blu" and "Paris" prompts."""
    sky = {"chosen": "The sky is blue", "rejected": "The sky is blue and vast"}
    paris = {"chosen": "Paris ", "rejected": "London"}
    assert refused(rows("implicit.jsonl", sky, paris)) == (
        'implicit.jsonl: none of 2 rows can be used as "trl preference, implicit prompt". no safe boundary between '
        "prompt and completions: 2 (first in row 1). Correct them, or pass shape=."
    )
    assert refused(rows("sky.jsonl", sky), "--bad_rows", "refuse") == (
        'sky.jsonl row 1: there is no "prompt", and it cannot be found in "chosen" and "rejected": '
        'one text is the beginning of the other. Add a "prompt" column.'
    )
    assert "they share no whole word at the start" in refused(rows("paris.jsonl", paris), "--bad_rows", "refuse")


# --- 8 to 12: tokens --------------------------------------------------------------------------------------------------


def test_prompt_is_no_prefix_under_the_template() -> None:
    """A template that drops the prompt and the answer once it is given: nothing can be repaired, so nothing is."""
    Path("drops.jinja").write_text(
        "{% if add_generation_prompt %}Q: {{ messages[-1]['content'] }} A: {% else %}(seen){{ eos_token }}{% endif %}"
    )
    assert refused("comparison.jsonl", "--chat_template", "drops.jinja") == (
        "no row is left to train on, of 12: 12 × prompt is not a prefix of prompt + completion under the chat "
        "template (e.g. comparison.jsonl row 1). Correct the rows or the chat template; `trimtab data show` shows what "
        "becomes of a row."
    )
    told = done("data", "show", "comparison.jsonl", "--model", "./tiny", "--chat_template", "drops.jinja", "--rows", 1)
    assert told == (
        "comparison.jsonl row 1: left out: prompt is not a prefix of prompt + completion under the chat template\n"
    )


def test_a_template_that_rewrites_the_prompt_is_repaired_and_counted() -> None:
    """Templates of reasoning models render an answered turn in other words than an open one."""
    Path("rewrites.jinja").write_text(
        "{% for m in messages %}{{ '<' if add_generation_prompt else '[' }}{{ m['role'] }}>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    told = done("train", "comparison.jsonl", *ONE_STEP, "--chat_template", "rewrites.jinja", "--output", "rewritten")
    repaired = "24 × the template rewrote the prompt once answered: the answer was put after the prompt as asked"
    assert f"\n  {repaired}\n" in told
    card = json.loads(Path("rewritten/run.json").read_text())
    assert list(card["data"]["repaired"].values()) == [24]


def test_everything_truncated() -> None:
    assert refused("comparison.jsonl", "--max_length", 16) == (
        "11 of 12 rows (92%) are longer than max_length 16: 11 would be left out; at most 10% is allowed. Raise "
        "max_length, choose truncation: prompt or completion, or accept it with a larger max_truncated."
    )
    assert refused("comparison.jsonl", "--max_length", 16, "--truncation", "prompt") == (
        "11 of 12 rows (92%) are longer than max_length 16: 9 would be left out, 2 cut; at most 10% is allowed. Raise "
        "max_length, or accept it with a larger max_truncated."
    )
    long = rows("long.jsonl", *(pair(i, chosen="It is " + "very " * 9, rejected="no " * 30) for i in range(4)))
    assert refused(long, "--max_length", 32, "--max_truncated", 1) == (
        "no row is left to train on, of 4: 4 × longer than max_length (32 tokens) (e.g. long.jsonl row 1). "
        "Raise max_length, or choose another truncation."
    )


def test_no_end_of_sequence_token() -> None:
    shutil.copytree("tiny", "noeos", dirs_exist_ok=True)
    words = tokenizer()
    words.eos_token = None
    words.save_pretrained("noeos")
    found = trimtab("train", "comparison.jsonl", "--model", "./noeos", *ONE_STEP[2:]).error
    assert found == (
        "the tokenizer of noeos has no end-of-sequence token: a model trained without one never stops. "
        "Set tokenizer.eos_token before saving it."
    )


def test_template_that_never_ends_an_answer() -> None:
    Path("endless.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert refused("comparison.jsonl", "--chat_template", "endless.jinja") == (
        "comparison.jsonl row 1: the chat template of tiny ends an answer without an end-of-sequence token ([1]): the "
        "model would never learn to stop. Pass eos: append to add it."
    )
    done("train", "comparison.jsonl", *ONE_STEP, "--chat_template", "endless.jinja", "--eos", "append", "--output", "e")


def test_double_beginning_of_sequence() -> None:
    Path("bos.jinja").write_text(
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    found = refused("comparison.jsonl", "--chat_template", "bos.jinja")
    assert found.startswith(
        "comparison.jsonl row 1: the prompt starts with two beginning-of-sequence tokens ('<s>', ids [0, 0, "
    )
    assert found.endswith("): the chat template writes it twice. Remove one of them.")


def test_broken_template_files() -> None:
    Path("syntax.jinja").write_text("{{ bos_token }}\n{% if %}")
    Path("raises.jinja").write_text("{{ raise_exception('Only one message, please.') }}")
    Path("binary.jinja").write_bytes(b"\x89PNG\xff")
    options = ("comparison.jsonl", "--chat_template")
    assert refused(*options, "syntax.jinja") == (
        "chat_template: syntax.jinja line 2: Expected an expression, got 'end of statement block'. "
        "Correct the template."
    )
    assert refused(*options, "binary.jinja") == (
        "chat_template: binary.jinja is not text. Name a file that holds a Jinja template."
    )
    assert refused(*options, "none.jinja") == (
        "chat_template: none.jinja is not a file. Name a file that holds a Jinja template."
    )
    assert "12 × the chat template refused the conversation: Only one message, please." in refused(
        *options, "raises.jinja"
    )


def test_missing_template() -> None:
    model = ("--model", "./plain", *ONE_STEP[2:])
    assert trimtab("train", "comparison.jsonl", *model, "--template", "chat").error == (
        "the tokenizer of plain has no chat template. Pass chat_template: FILE with a Jinja template, or template: "
        "plain to train on the bare text."
    )
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    file = rows("turns.jsonl", *[{"messages": turns}] * 4)
    assert trimtab("train", file, *model, "--method", "sft").error == (
        "turns.jsonl row 1: a conversation of 3 messages needs a chat template, and plain has none. Pass "
        "chat_template: FILE, or flatten the conversation into one prompt string."
    )
    assert refused(file, "--method", "sft", "--template", "plain") == (
        "turns.jsonl row 1: a conversation of 3 messages needs a chat template, and tiny was set to plain. Pass "
        "template: chat, or flatten the conversation into one prompt string."
    )


# --- 13 to 16: the wrong feedback for the method ----------------------------------------------------------------------


def test_thumbs_given_to_a_pair_method() -> None:
    assert refused("thumb.jsonl") == (
        "thumb.jsonl holds 12 records of kind thumb, but dpo learns from kind comparison. Methods for this data: "
        f"{able(Thumb)}; or pass convert: comparison (`trimtab data convert` says what is lost)."
    )


def test_no_conversion_is_offered_that_does_not_exist() -> None:
    assert refused("demonstration.jsonl") == (
        "demonstration.jsonl holds 12 records of kind demonstration, but dpo learns from kind comparison. Methods for "
        f"this data: {able(Demonstration)}."
    )
    assert refused("demonstration.jsonl", "--convert", "comparison").startswith(
        "demonstration records cannot become comparison records: it would invent what nobody said."
    )
    assert refused("score.jsonl", "--convert", "comparison") == (
        "score.jsonl: nothing is left after the conversion to comparison. 12 score -> 0 comparison "
        "(tie_threshold=0.0, pairs=all, ties=keep). dropped 12: the only score of its prompt. Lost: the level of the "
        "scores; only differences remain."
    )


def test_ties_given_to_dpo() -> None:
    assert refused("ties.jsonl") == (
        "4 of 12 comparisons in ties.jsonl are ties, and dpo cannot learn from ties. Choose a method that can "
        f"({able(Comparison, ties=True)}), or pass ties: drop, or ties: split."
    )
    assert refused("comparison.jsonl", "--ties", "drop") == (
        'The option "ties" has no effect here: comparison.jsonl has no tie. Remove it.'
    )
    file = rows("alltied.jsonl", *(pair(i, tie=True) for i in range(4)))
    assert refused(file, "--ties", "drop").startswith(
        "alltied.jsonl: nothing is left with ties: drop. 4 comparison -> 0 comparison (ties=drop). dropped 4: tie. "
    )


def test_one_class_only_for_kto() -> None:
    others = f"{able(Thumb, but='kto')}; " if able(Thumb, but="kto") else ""
    up = rows("up.jsonl", *({"prompt": f"q{i}", "completion": "x", "label": True} for i in range(8)))
    assert refused(up, "--method", "kto", "--holdout", 0) == (
        "up.jsonl: all 8 thumbs point up; kto needs both kinds. Other methods that can use it: "
        f"{others}{able(Demonstration)} with convert: demonstration. Or add what is missing."
    )
    down = rows("down.jsonl", *({"prompt": f"q{i}", "completion": "x", "label": False} for i in range(8)))
    assert refused(down, "--method", "kto", "--holdout", 0) == (
        "down.jsonl: all 8 thumbs point down; kto needs both kinds. Other methods that can use it: "
        f"{able(Thumb, but='kto') or 'none'}. Or add what is missing."
    )


# --- 17 and 18: options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--betta", 0.1],
            'There is no option "betta". Did you mean "beta"? See `trimtab train --options` and `trimtab methods dpo`.',
        ),
        (
            ["--learnin-rate", 0.1],
            'There is no option "learnin_rate". Did you mean "learning_rate"? See `trimtab train --options` and '
            "`trimtab methods dpo`.",
        ),
        (
            ["--method", "dpoo"],
            f'There is no method "dpoo". Did you mean "dpo"? Known: {", ".join(methods())}.',
        ),
        (["--beta", "-1"], "dpo: beta is -1.0; expected a number above 0."),
        (["--beta", "much"], 'dpo: beta is "much"; expected a number.'),
        (["--holdout", "1.5"], 'holdout: input should be less than 1, found "1.5".'),
        (["--finetune", "lorra"], "finetune: input should be 'lora' or 'full', found \"lorra\"."),
        (["--seed", 1, "--seed", 2], 'The option "seed" is given twice.'),
        (["more.jsonl"], 'Unexpected "more.jsonl": this takes one file, and options are written --name value.'),
        (
            ["--labels", '{"1": '],
            '--labels {"1":  is not a mapping. Write it in one pair of quotes: --labels \'{"1": "first"}\'.',
        ),
    ],
)
def test_option_that_is_not_understood(options: list[object], message: str) -> None:
    assert refused("comparison.jsonl", *options) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gamma_beta_ratio", 0.5],
            'The option "gamma_beta_ratio" has no effect for method dpo; it belongs to simpo',
        ),
        (
            ["--finetune", "full", "--lora_rank", 4],
            'The option "lora_rank" has no effect here: finetune is full. Remove it.',
        ),
        (
            ["--method", "simpo", "--reference", "copy"],
            'The option "reference" has no effect here: simpo has no reference model. Remove it.',
        ),
        (["--epochs", 2], 'The option "epochs" has no effect here: max_steps decides. Remove it.'),
        (
            ["--split", "test"],
            'split="test" has no effect on the file comparison.jsonl: only hub data sets have splits.',
        ),
        (["--tie_threshold", 1], 'The option "tie_threshold" has no effect here: nothing is converted (set convert).'),
        (["--keep_checkpoints", 1], 'The option "keep_checkpoints" has no effect here: no checkpoint is written'),
        (["--labels", '{"1": "first"}'], 'comparison.jsonl: labels= has no effect, because "trimtab" has no label'),
    ],
)
def test_option_without_effect(options: list[object], message: str) -> None:
    assert refused("comparison.jsonl", *options).startswith(message)


def test_option_without_effect_on_a_command() -> None:
    assert trimtab("data", "check", "comparison.jsonl", "--lora_rank", 4).error == (
        'The option "lora_rank" has no effect on `trimtab data check`. Options there: shape, columns, labels, split, '
        "bad_rows, limit, convert, tie_threshold, score_threshold."
    )
    assert trimtab("doctor", "comparison.jsonl", "--output", "x").error == (
        'The option "output" has no effect on `trimtab doctor`: its run folder is thrown away. Remove it.'
    )


def test_layers_that_do_not_exist() -> None:
    found = refused("comparison.jsonl", "--lora_targets", "query,value")
    assert found.startswith('lora_targets is "query,value": ')
    assert found.endswith(
        " Linear modules of this model: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj. "
        "Name some of them, or all-linear."
    )


# --- 19: numbers that are none ----------------------------------------------------------------------------------------


def test_nan_weights() -> None:
    shutil.copytree("tiny", "nan", dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained("nan")
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    model.save_pretrained("nan")
    assert trimtab("train", "comparison.jsonl", "--model", "./nan", *ONE_STEP[2:]).error == (
        "The model is damaged: parameter model.layers.1.mlp.up_proj.weight holds 1 NaN and 0 infinite values out of "
        "384. Load another checkpoint; if training made this one, its learning rate was too high, or the numbers "
        "overflowed in float16."
    )


@pytest.mark.parametrize(
    ("rate", "what"), [(1e10, "the loss is nan"), (1e3, "the gradient norm is nan although every loss is finite")]
)
def test_nan_while_training_names_step_and_rows_and_leaves_a_reproducer(rate: float, what: str) -> None:
    folder = Path(f"boom-{rate:g}")
    more = ("--finetune", "full", "--learning_rate", rate, "--warmup", 0, "--max_grad_norm", 0)
    options = ("--model", "./tiny", "--max_steps", 4, "--batch_size", 4, "--samples", 0, "--precision", "float32")
    found = trimtab("train", "comparison.jsonl", *options, *more, "--output", folder).error
    assert found.startswith(f"step 2: {what} (comparison.jsonl row ")
    assert found.endswith(
        f"). Nothing was updated in this step. The rows and their tokens are in {folder}/nonfinite-step-2.json. A "
        "smaller learning_rate, float32 precision, or leaving these rows out are the usual remedies."
    )
    left = json.loads((folder / "nonfinite-step-2.json").read_text())
    assert left["step"] == 2 and left["what"] == what and len(left["rows"]) == 4
    words, source = tokenizer(), Path("comparison.jsonl").read_text().splitlines()
    for row in left["rows"]:
        record = json.loads(source[int(row["origin"].split()[-1]) - 1])
        assert row["record"] == record
        texts = [words.decode(ids, skip_special_tokens=True) for ids in row["completions"]]
        assert texts == [record["chosen"], record["rejected"]]
    card = json.loads((folder / "run.json").read_text())
    assert (card["status"], card["error"]) == ("failed", found)
    done("report", folder)  # and its report can still be written


# --- 20: the disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "what", "remedy"),
    [
        ("config.json", "the model of {}", "go on from checkpoint-2 with --resume --output {}"),
        (
            "checkpoints/checkpoint-2/optimizer.pt",
            "a checkpoint of step 2",
            "remove {} and start again; with save_every a run can go on from a checkpoint",
        ),
        ("samples.jsonl", "{}", "go on from checkpoint-2 with --resume --output {}"),
    ],
)
def test_full_disk(file: str, what: str, remedy: str) -> None:
    """Real writes that really fail: the file is a link to /dev/full."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = Path("full-" + file.replace("/", "-"))
    link = folder / file
    link.parent.mkdir(parents=True)
    link.symlink_to("/dev/full")
    options = ("--model", "./tiny", "--max_steps", 2, "--batch_size", 4, "--samples", 2, "--sample_tokens", 4)
    found = trimtab("train", "comparison.jsonl", *options, "--save_every", 2, "--output", folder).error
    assert found.startswith(f"the disk is full: {what.format(folder)} could not be written (")
    assert found.endswith(f" MB are free). Free space, then {remedy.format(folder)}.")
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    link.unlink()
    if "--resume" in found:  # the remedy works
        done("train", "comparison.jsonl", *options, "--save_every", 2, "--output", folder, "--resume")
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_full_disk_in_the_words_of_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trimtab.run.save_weights", fail)
    found = trimtab("train", "comparison.jsonl", *ONE_STEP, "--output", "full-safetensors").error
    assert found.startswith("the disk is full: the model of full-safetensors could not be written (")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_in_the_words_of_the_system(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No space, no quota, no larger file allowed: the remedy is the same."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("trimtab.run.save_weights", fail)
    found = trimtab("train", "comparison.jsonl", *ONE_STEP, "--output", f"full-{number}").error
    assert found.startswith(f"the disk is full: the model of full-{number} could not be written (")


def test_disk_that_is_too_small_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 5_000))
    assert refused("comparison.jsonl", "--output", "small") == (
        "the disk of small has 0.0 MB free, and this run will write about 0.0 MB (the model). Free space, or choose "
        "another output."
    )
    assert not Path("small").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_small_disk() -> None:
    Path("disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        options = ("--model", "./tiny", "--max_steps", 4, "--batch_size", 4, "--samples", 0, "--save_every", 1)
        found = trimtab("train", "comparison.jsonl", *options, "--output", "disk/run").error
        assert found == (
            "the disk is full: a checkpoint of step 2 could not be written (0.0 MB are free). Free space, then go on "
            "from checkpoint-1 with --resume --output disk/run."
        )
    finally:
        subprocess.run(["umount", "disk"], check=True)


# --- and: the checkpoint ----------------------------------------------------------------------------------------------

CHECKPOINTED = ("--model", "./tiny", "--max_steps", 3, "--batch_size", 4, "--samples", 0, "--save_every", 1)


@pytest.fixture(scope="module")
def checkpointed(workspace: Path) -> Path:
    """A run of three steps that was killed after the second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        done("train", "comparison.jsonl", *CHECKPOINTED, "--keep_checkpoints", 3, "--output", "checkpointed")
    shutil.rmtree(workspace / "checkpointed" / "checkpoints" / "checkpoint-3")
    return workspace / "checkpointed"


def halved(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
)
def test_corrupt_checkpoint(checkpointed: Path, tmp_path: Path, file: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpointed, run)
    newest = run / "checkpoints" / "checkpoint-2"
    halved(newest / file)
    resume = ("train", "comparison.jsonl", *CHECKPOINTED, "--output", run, "--resume")
    found = trimtab(*resume).error
    assert found.startswith(f"{newest} is damaged (")
    assert found.endswith(
        "). Delete that folder to resume from an earlier checkpoint, or start again with another output."
    )
    shutil.rmtree(newest)  # the remedy works
    assert f"resuming from {run}/checkpoints/checkpoint-1" in done(*resume)


def test_incomplete_checkpoint_is_passed_over(checkpointed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpointed, run)
    (run / "checkpoints" / "checkpoint-2" / "complete.json").unlink()
    resume = ("train", "comparison.jsonl", *CHECKPOINTED, "--output", run, "--resume")
    assert f"resuming from {run}/checkpoints/checkpoint-1" in done(*resume)
    shutil.rmtree(run)
    shutil.copytree(checkpointed, run)
    for folder in (run / "checkpoints").glob("*"):
        (folder / "complete.json").unlink()
    assert trimtab(*resume).error == (
        f"{run}/checkpoints has no complete checkpoint to resume from. 2 incomplete one(s) there: checkpoint-1, "
        "checkpoint-2. Start again with another output; save_every says how often a checkpoint is written."
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: (), "beta: 0.1 -> 0.2"),
        (lambda run: halved(run / "run.json"), "run.json"),
    ],
    ids=["other option", "damaged card"],
)
def test_a_refused_resume_leaves_the_run_as_it_was(
    checkpointed: Path, tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpointed, run)
    change(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    options = ("--beta", 0.2) if "beta" in told else ()
    found = trimtab("train", "comparison.jsonl", *CHECKPOINTED, *options, "--output", run, "--resume").error
    assert found.startswith(f"{run} cannot be resumed: ") and told in found
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert {p: c for p, c in after.items() if p.name != "run.json"} == {
        p: c for p, c in before.items() if p.name != "run.json"
    }
    if "beta" in told:
        assert json.loads((run / "run.json").read_text()) == json.loads(before[run / "run.json"])


def test_resume_with_other_data_or_model(checkpointed: Path, tmp_path: Path) -> None:
    run, kept = tmp_path / "run", Path("comparison.jsonl").read_text()
    shutil.copytree(checkpointed, run)
    resume = ("train", "comparison.jsonl", *CHECKPOINTED, "--output", run, "--resume")
    try:
        Path("comparison.jsonl").write_text("".join(kept.splitlines(keepends=True)[:-1]))
        assert trimtab(*resume).error == (
            f"{run} cannot be resumed: changed since it started: the content of the data file. Resume with what it "
            f"started with ({run}/config.yaml), or start again with another output."
        )
    finally:
        Path("comparison.jsonl").write_text(kept)
    shutil.move("tiny", "away")
    try:
        tiny_folder(Path("tiny"), seed=1)
        assert "changed since it started: the content of the model it started from." in trimtab(*resume).error
    finally:
        shutil.rmtree("tiny")
        shutil.move("away", "tiny")


def test_output_that_is_taken() -> None:
    assert refused("comparison.jsonl", "--output", "comparison.jsonl") == (
        "output: comparison.jsonl is a file. Name a folder, which will be made."
    )
    done("train", "comparison.jsonl", *ONE_STEP, "--output", "taken")
    assert refused("comparison.jsonl", "--output", "taken") == (
        "taken already holds a run. Choose another output, or remove that folder."
    )
    assert refused("comparison.jsonl", "--resume") == (
        "resume needs output: the run folder to go on with, such as --output runs/dpo-prefs-1."
    )


def test_a_run_that_failed_early_can_be_started_again_in_the_same_place() -> None:
    again = ("--output", "again")
    assert refused("comparison.jsonl", "--max_length", 16, *again)
    assert not Path("again").exists()
    done("train", "comparison.jsonl", *ONE_STEP, *again)


def test_what_is_not_the_users_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("trimtab.run.prepare", bug)
    with pytest.raises(ZeroDivisionError):
        trimtab("train", "comparison.jsonl", *ONE_STEP)


def test_score_needs_two_models_that_fit_and_a_place_to_write(tmp_path: Path) -> None:
    score = ("score", "comparison.jsonl", "--policy", "./tiny")
    assert trimtab(*score, "--out", "rewards.txt").error == (
        "rewards.txt: rewards are written as .jsonl, .jsonl.gz or .html into a folder that exists. Change --out."
    )
    assert trimtab(*score, "--out", "rewards.jsonl").error == (
        "./tiny holds no config.yaml, which in a run folder names the model it started from. Pass --reference MODEL."
    )
    assert trimtab(*score, "--out", "rewards.jsonl", "--reference", "./tiny").error == (
        "policy and reference are both ./tiny: every reward would be 0. Name two models."
    )
    other = shutil.copytree("tiny", tmp_path / "other")
    words = tokenizer()
    words.add_tokens(["more"])
    words.save_pretrained(other)
    assert trimtab(*score, "--out", "rewards.jsonl", "--reference", other).error == (
        f"the tokenizers of ./tiny and {other} differ, so their log-probs are of different tokens. Name the model that "
        "the policy started from as --reference."
    )


def check_outcome_is_strict(found: Outcome) -> None:
    """The helper itself must notice a traceback and a second line."""
    with pytest.raises(AssertionError):
        _ = found.error


@pytest.mark.parametrize(
    "found",
    [Outcome(1, "", "error: x\n"), Outcome(2, "", "Traceback\nerror: x\n"), Outcome(2, "", "error: x\ny\n")],
)
def test_the_helper_notices(found: Outcome) -> None:
    check_outcome_is_strict(found)
