"""A server as sampler: one that answers with trimtab's own sampler and its own copy of the weights, told of new ones or not."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.judges.server import Server, serving
from tests.online.test_rounds import card, options, steps
from tests.reliability.test_two_processes import launch
from tests.tiny_folder import feedback_file, tokenizer, workplace
from trimtab.config import resolve
from trimtab.errors import CheckFailed, ConfigError, ModelError
from trimtab.online import served
from trimtab.online.kept import Kept
from trimtab.online.sample import Answer, sample
from trimtab.online.served import read, seed_of
from trimtab.run import train

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WORDS = tokenizer()
EOS = WORDS.eos_token_id
JUDGE = '''
def vowels(prompt, answer):
    """Share of vowels, in tenths."""
    with open("judged", "a") as f:
        f.write("x")
    return round(sum(c in "aeiouAEIOU" for c in answer) / max(len(answer), 1), 1)
'''


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    workplace(tmp_path, monkeypatch)
    feedback_file(tmp_path / "comparison.jsonl", "comparison", 20)
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


@dataclass
class Copy:
    """The model behind the server. ``deaf`` says that it has taken new weights, and has not."""

    deaf: bool = False
    told: tuple[str, ...] = ("token_ids", "logprobs")
    folder: str = "model"
    loaded: list[str] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[int, float]] = field(default_factory=list)  # seed, temperature
    before: Callable[[dict[str, Any]], int | None] = lambda body: None  # an HTTP status instead of a reply

    def behave(self, body: dict[str, Any], number: int) -> int | bytes:
        if folder := body.get("model_path") or body.get("kwargs", {}).get("weights_path"):
            self.load(folder)
            return b'{"success": true}'
        if "prompt" not in body:  # /reset_prefix_cache
            return b""
        if Path("told").exists():  # by a command
            self.load(Path("told").read_text())
            Path("told").unlink()
        self.asked.append((body["seed"], body["temperature"]))
        if status := self.before(body):
            return status
        return json.dumps({"choices": [self.choice(self.answer(body), body)]}).encode()

    def load(self, folder: str) -> None:
        self.loaded.append(folder)
        if not self.deaf:
            self.folder = folder

    def answer(self, body: dict[str, Any]) -> Answer:
        """With the noise that the run would take itself: the seed says which round and place it is."""
        where = [(n, k) for n in range(9) for k in range(9) if seed_of(body["prompt"], k, n) == body["seed"]]
        ((number, place),) = where
        if self.folder not in self.models:
            self.models = {self.folder: AutoModelForCausalLM.from_pretrained(self.folder)}
        how: Any = {"max_new_tokens": body["max_tokens"], "seed": number, "temperature": body["temperature"]}
        return sample(self.models[self.folder], WORDS, [body["prompt"]], per_prompt=place + 1, **how)[0][place]

    def choice(self, answer: Answer, body: dict[str, Any]) -> dict[str, Any]:
        text = WORDS.decode(answer.ids, skip_special_tokens=True)
        logprobs = {"tokens": [WORDS.decode([i]) for i in answer.ids], "token_logprobs": answer.logps}
        all_told = {"token_ids": answer.ids, "logprobs": logprobs}
        reason = "stop" if answer.ended else "length"
        return {"text": text, "finish_reason": reason, **{k: v for k, v in all_told.items() if k in self.told}}


@contextmanager
def running(**how: Any) -> Iterator[tuple[Copy, Server, dict[str, Any]]]:
    """The model, the server, and what a run must be told of them."""
    copy = Copy(**how)
    with serving(copy.behave) as server:
        yield copy, server, {"sampler": server.url, "sampler_reload": "sglang"}


def samples(folder: Path, number: int) -> dict[int, list[Answer]]:
    return {place: list(d.answers) for place, d in Kept(folder / "rounds" / f"{number:04d}").drawn().items()}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reload", "more"),
    [
        ("rloo", "sglang", {"finetune": "full"}),
        ("rloo", "vllm", {"finetune": "lora"}),
        ("remax", "sglang", {"answers": 1}),
        ("dpo", "sglang", {"redraw": 1}),
    ],
)
def test_a_run_through_a_server_is_the_run_without_it(method: str, reload: str, more: dict[str, Any]) -> None:
    """The server takes the same noise: same answers, same records, in each of three rounds, since it has the round's weights."""
    values = options(method, rounds=3, learning_rate=0.05, **more)
    alone = train(resolve({**values, "output": "alone"}))
    with running() as (copy, server, how):
        through = train(resolve({**values, **how, "sampler_reload": reload, "output": "through"}))
    for number in (1, 2, 3):
        ours, theirs = samples(alone, number), samples(through, number)
        assert {p: [a.ids for a in row] for p, row in ours.items()} == {
            p: [a.ids for a in row] for p, row in theirs.items()
        }
        for place, row in ours.items():
            for mine, other in zip(row, theirs[place], strict=True):
                assert mine.ended == other.ended and mine.logps == pytest.approx(other.logps, abs=1e-4)
        file = f"rounds/{number:04d}/records.jsonl"
        assert (alone / file).read_bytes() == (through / file).read_bytes()
    logged = steps(through)
    assert all(r["sampler_gap"] < 1e-4 and r["sampler/retokenised"] == 0 for r in logged)
    assert ("sampler_gap" in steps(alone)[0]) == (method != "dpo")
    assert [Path(f).parent.name for f in copy.loaded] == ["0001", "0002", "0003"]
    assert [f.parent.name for f in through.glob("rounds/*/weights")] == ["0003"]  # the others are gone
    assert server.requests.count({}) == (3 if reload == "vllm" else 0)  # vLLM forgets what it has in cache when told to
    asked = Counter(copy.asked)
    assert len(asked) == sum(len(row) for n in (1, 2, 3) for row in samples(through, n).values()) == asked.total()
    first = next(b for b in server.requests if "prompt" in b)
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("./model", 6, 1.0)
    assert (first["top_p"], first["top_k"], first["min_p"]) == (1, -1, 0) and EOS in first["stop_token_ids"]
    greedy = {b["temperature"] for b in server.requests if "prompt" in b}
    assert greedy == ({0.0, 1.0} if method == "remax" else {1.0})


@pytest.mark.parametrize("method", ["rloo", "dpo"])
def test_a_server_that_keeps_its_old_weights_is_noticed(method: str) -> None:
    """In the second round, before its answers are kept or judged; and a run goes on once the server listens."""
    values = options(method, output="run", learning_rate=0.05, save_every=2)
    with running(deaf=True) as (copy, _, how):
        with pytest.raises(
            CheckFailed, match=r"sampler and engine differ by .* The server has other weights than the policy"
        ):
            train(resolve({**values, **how}))
        assert len(samples(Path("run"), 1)) == 4 and samples(Path("run"), 2) == {}
        judged = len(Path("judged").read_text())
        copy.deaf = False
        train(resolve({**values, **how, "resume": True}))
    assert card(Path("run"))["status"] == "finished" and len(samples(Path("run"), 2)) == 4
    assert len(Path("judged").read_text()) > judged


def test_the_first_round_needs_no_other_weights() -> None:
    with running() as (copy, _, how):
        train(resolve(options("rloo", output="run", rounds=1, sampler=how["sampler"])))
    assert copy.loaded == [] and not list(Path("run").glob("rounds/*/weights"))


def test_a_command_loads_the_weights() -> None:
    Path("load.py").write_text("import sys; open('told', 'w').write(sys.argv[1])")
    command = f"{sys.executable} load.py '{{folder}}'"
    with running() as (copy, _, how):
        train(resolve(options("rloo", output="run", learning_rate=0.05, **{**how, "sampler_reload": command})))
    assert copy.loaded == [str(Path(f"run/rounds/000{n}/weights").resolve()) for n in (1, 2)]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "{python} -c 'import sys; sys.exit(\"no room for {{folder}}\")'",
            r"ended with 1: no room for /.*/rounds/0001/weights\.",
        ),
        ("./nothing {{folder}}", r"\./nothing cannot be started \(No such file or directory\)"),
    ],
)
def test_a_command_that_fails(command: str, message: str) -> None:
    with running() as (copy, _, how):
        values = options("rloo", output="run", **{**how, "sampler_reload": command.format(python=sys.executable)})
        with pytest.raises(ModelError, match=message):
            train(resolve(values))
    assert copy.asked == []


def test_what_is_kept_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies in the second round, after two of its four prompts; another one, elsewhere, answers the rest alone."""
    monkeypatch.setattr("trimtab.online.rounds.AT_ONCE", 3)  # one prompt at a time
    values = options("rloo", learning_rate=0.05, save_every=2)
    with running() as (_, _, how):
        whole = train(resolve({**values, **how, "output": "whole"}))
    with running() as (copy, _, how):
        copy.before = lambda body: 400 if len(copy.asked) > 4 * 3 + 2 * 3 else None
        with pytest.raises(ModelError, match="http 400 for the model ./model: .*this is a 400"):
            train(resolve({**values, **how, "output": "run"}))
    there = samples(Path("run"), 2)
    assert len(there) == 2
    with running() as (copy, _, how):
        train(resolve({**values, **how, "output": "run", "resume": True}))
    assert len(copy.asked) == 2 * 3
    for number in (1, 2):
        assert samples(Path("run"), number) == samples(whole, number)


def test_an_answer_of_text_alone_is_tokenised_again() -> None:
    """No ids and no log-probs: counted, no gap is claimed, and rounds are learned from all the same."""
    with running() as (copy, _, how):
        copy.answer = lambda body: Answer(tuple(WORDS(f"e{body['seed']}")["input_ids"])[:5], False, ())  # type: ignore[method-assign]
        copy.told = ()
        folder = train(resolve(options("rloo", output="run", **how)))
        answers = [a for row in samples(folder, 1).values() for a in row]
        assert all(a.logps == () and len(a.ids) == 5 for a in answers)
        assert all(r["sampler/retokenised"] == 12 and "sampler_gap" not in r for r in steps(folder))
        with pytest.raises(ConfigError, match="correct_sampling needs the sampler's log-probs"):
            train(resolve(options("rloo", output="other", correct_sampling=2.0, **how)))


def test_a_server_without_log_probs_of_its_ids() -> None:
    with running(told=("token_ids",)) as (_, _, how):
        folder = train(resolve(options("rloo", output="run", **how)))
    answers = [a for row in samples(folder, 1).values() for a in row]
    assert all(len(a.logps) == len(a.ids) and all(map(math.isnan, a.logps)) for a in answers)
    assert all(r["sampler/retokenised"] == 0 and "sampler_gap" not in r for r in steps(folder))


def test_two_processes_share_the_server(tmp_path: Path) -> None:
    """Each asks for its prompts; one of them hands over the weights, and both wait for it."""
    values = options("rloo", learning_rate=0.05, finetune="lora", samples=0)
    with running() as (copy, _, how):
        one = train(resolve({**values, **how, "output": "one"}))
        asked, copy.asked, copy.loaded = copy.asked, [], []
        flags = [w for k, v in {**values, **how}.items() if k != "data" for w in (f"--{k}", str(v))]
        launch(2, "late.py", "train", values["data"], *flags, "--output", "two", cwd=tmp_path)
    assert sorted(copy.asked) == sorted(asked) and len(copy.loaded) == 2
    for number in (1, 2):
        ids = [{p: [a.ids for a in row] for p, row in samples(f, number).items()} for f in (one, tmp_path / "two")]
        assert ids[0] == ids[1]


# --- servers that are away, or busy ---------------------------------------------------------------------------------------


def test_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "RETRIES", 0)
    with pytest.raises(
        ModelError, match=r"127\.0\.0\.1:9/v1/completions: no connection .* Start the server, or check sampler"
    ):
        train(resolve(options("rloo", output="run", rounds=1, sampler="http://127.0.0.1:9/v1")))


def test_a_busy_server_is_asked_again() -> None:
    with running() as (copy, _, how):
        copy.before = lambda body: 503 if len(copy.asked) == 2 else None
        train(resolve(options("rloo", output="run", rounds=1, sampler=how["sampler"])))
    assert sorted(Counter(copy.asked).values()) == [1] * 11 + [2]


def test_a_reply_of_another_kind() -> None:
    replies = {"KeyError": b'{"choices": [{"message": {"content": "hello"}}]}', "JSONDecodeError": b"<html>"}
    for error, content in replies.items():
        with serving(lambda body, n, said=content: said) as server:  # type: ignore[misc]
            how = options("rloo", output=error, rounds=1, sampler=server.url)
            with pytest.raises(ModelError, match=rf"a reply that is none of OpenAI's \({error}\("):
                train(resolve(how))


# --- what a choice says ----------------------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


HI, NAN = ids("hi é"), pytest.approx(math.nan, nan_ok=True)
FIVE = [-1.0, -2.0, -3.0, -4.0, -5.0]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        # vLLM, SGLang: the ids hold the end
        ({"token_ids": [*HI, EOS], "logprobs": {"token_logprobs": [*FIVE, -6.0]}}, (True, [*HI, EOS], [*FIVE, -6.0])),
        # the end is at the last token that was allowed, and SGLang calls it length
        ({"token_ids": [*HI, EOS], "finish_reason": "length"}, (True, [*HI, EOS], [math.nan] * 6)),
        ({"token_ids": HI, "finish_reason": "length"}, (False, HI, [math.nan] * 5)),
        # the server does not know this end, and wrote on
        ({"token_ids": [*HI, EOS, 9, 9], "finish_reason": "length", "logprobs": {"token_logprobs": [*FIVE, -6.0, 0.0, 0.0]}},
         (True, [*HI, EOS], [*FIVE, -6.0])),
        # llama.cpp: no end among the tokens
        ({"logprobs": {"content": [{"id": i, "token": "?", "logprob": v} for i, v in zip(HI, FIVE, strict=True)]}},
         (True, [*HI, EOS], [*FIVE, math.nan])),
        # older vLLM
        ({"logprobs": {"tokens": [f"token_id:{i}" for i in [*HI, EOS]], "token_logprobs": [*FIVE, None]}},
         (True, [*HI, EOS], [*FIVE, math.nan])),
        # another of several ends
        ({"token_ids": HI, "stop_reason": 7}, (True, [*HI, 7], [math.nan] * 6)),
        ({"token_ids": HI, "matched_stop": 7}, (True, [*HI, 7], [math.nan] * 6)),
        # the texts of tokens; that of a byte is none, and the whole text is tokenised again
        ({"text": "hi", "logprobs": {"tokens": ["h", "i", "</s>"], "token_logprobs": [-1.0, -2.0, -3.0]}},
         (True, [*ids("hi"), EOS], [-1.0, -2.0, -3.0])),
        ({"logprobs": {"tokens": ["h", "i", " ", "�", "�", "</s>"], "token_logprobs": [*FIVE, -6.0]}}, (True, [*HI, EOS], [])),
        ({"logprobs": {"tokens": ["h", "i"], "token_logprobs": [-1.0, -2.0]}}, (True, [*HI, EOS], [])),  # other words
        ({}, (True, [*HI, EOS], [])),
        ({"finish_reason": "length"}, (False, HI, [])),
        ({"text": ""}, (True, [EOS], [])),
    ],
)  # fmt: skip
def test_what_a_choice_says(choice: dict[str, Any], expected: tuple[bool, list[int], list[float]]) -> None:
    found = read({"text": "hi é", "finish_reason": "stop", **choice}, WORDS, {EOS, 7})
    ended, tokens, logps = expected
    assert (found.ended, list(found.ids)) == (ended, tokens)
    assert list(found.logps) == pytest.approx(logps, nan_ok=True)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": "\N{REPLACEMENT CHARACTER}", "normalised": True}, "the server names neither token ids"),
        ({"finish_reason": "abort"}, 'finish_reason "abort"; expected stop or length'),
        ({"text": "", "finish_reason": "length"}, "an answer without a token that did not end"),
    ],
)
def test_a_choice_that_says_too_little(choice: dict[str, Any], message: str) -> None:
    words = AutoTokenizer.from_pretrained("model")
    if choice.pop("normalised", False):  # a tokenizer that loses something
        from tokenizers import normalizers

        words.backend_tokenizer.normalizer = normalizers.Replace("\N{REPLACEMENT CHARACTER}", "?")
    with pytest.raises(ModelError, match=re.escape(message)):
        read({"text": "hi", "finish_reason": "stop", **choice}, words, {EOS})


def test_every_answer_has_a_seed_of_its_own() -> None:
    seeds = [seed_of(prompt, place, n) for prompt in ([1, 2], [1, 3], [1]) for place in range(8) for n in (0, 1)]
    assert len(set(seeds)) == len(seeds) == 48 and all(0 <= s < 2**31 for s in seeds)
    assert seed_of([1, 2], 3, 0) == seed_of((1, 2), 3, 0)


# --- options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampler_reload": None}, "rounds is 2, and after the first the server would go on with the weights it has"),
        ({"sampler": "127.0.0.1:8000/v1"}, 'sampler is "127.0.0.1:8000/v1"; expected an address'),
        ({"sampler_reload": "sglan"}, 'sampler_reload is "sglan". Did you mean "sglang"? Expected sglang, vllm, or a command'),
        ({"sampler_reload": "load 'x"}, "sampler_reload is no command (No closing quotation)"),
        ({"partner_mix": 0.5}, "a server gives none"),
        ({"method": "dpo", "sample_temperature": 0.7, "largest_gap": 0.2}, "log-probs of a server are compared at temperature 1"),
        ({"sampler": None}, 'The option "sampler_reload" has no effect here: the policy samples here (set sampler)'),
    ],
)  # fmt: skip
def test_refused(more: dict[str, Any], message: str) -> None:
    values = {"sampler": "http://127.0.0.1:8000/v1", "sampler_reload": "sglang", **more}
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve({k: v for k, v in options("rloo", **values).items() if v is not None})


def test_a_bound_for_the_gap_has_an_effect_where_a_server_samples() -> None:
    values = options("dpo", sampler="http://127.0.0.1:8000/v1", sampler_reload="sglang", largest_gap=0.2)
    assert resolve(values).flat()["largest_gap"] == 0.2
