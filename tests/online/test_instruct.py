"""New prompts after a few: what the model is shown, what is refused and counted, and that the same seed draws the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import done, trimtab
from tests.judges.server import Reply, serving
from tests.online.test_revise import Scripted
from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.errors import ConfigError, JudgeError
from trimtab.feedback.read import read
from trimtab.feedback.records import Comparison, Conversation, Message, Prompt, Record
from trimtab.online.instruct import _words, instruct, shared

PIECES = re.compile(r"=== \w{16} REQUEST \d ===\n(.*?)\n=== \w{16} END ===", re.DOTALL)


def seeds(n: int = 12) -> list[Record]:
    return [Prompt((Message("user", f"seed{i} alpha{i} beta{i} gamma{i}"),)) for i in range(n)]


def texts(found: Any) -> list[str]:
    return [r.prompt[0].content for r in found.records]


class Fresh(Scripted):
    """A new prompt of four words each time."""

    def __init__(self, **says: Any) -> None:
        super().__init__(lambda c: f"what{len(self.asked)} about{len(self.asked)} this{len(self.asked)} thing", **says)


def test_eight_seeds_are_shown_and_the_reply_is_a_prompt() -> None:
    backend = Fresh()
    found = instruct(seeds(), backend, count=5)
    assert found.asked == 5 and len(found.records) == 5 and not found.refused
    assert found.records[0].prompt == (Message("user", "what1 about1 this1 thing"),)
    known, drawn = {r.prompt[0].content for r in seeds()}, []
    for conversation in backend.asked:
        pieces = PIECES.findall(conversation[0].content)
        assert len(set(pieces)) == 8 and set(pieces) <= known
        drawn.append(tuple(pieces))
    assert len(set(drawn)) == len(drawn), "drawn anew for each"


def test_the_same_seed_draws_the_same_whatever_the_batch() -> None:
    def draws(**options: Any) -> list[str]:
        backend = Fresh()
        instruct(seeds(), backend, count=12, **options)
        return [c[0].content for c in backend.asked][:12]

    assert draws(batch=1) == draws(batch=12) != draws(batch=12, seed=1)


def test_near_duplicates_are_refused() -> None:
    """Of a seed, of an earlier reply; below the threshold it is kept, at the threshold not."""
    replies = iter(
        [
            "Seed3 ALPHA3, beta3: gamma3!",  # a seed
            "one two three four five six seven eight nine ten",
            "one two three four five six seven x y z",  # 2 * 7 / 20 = 0.7
            "one two three four five six a b c d",  # 0.6
            "9. wholly other words",
        ]
    )
    found = instruct(seeds(), Scripted(lambda c: next(replies)), count=3, batch=1)
    assert texts(found) == [
        "one two three four five six seven eight nine ten",
        "one two three four five six a b c d",
        "wholly other words",
    ]
    assert found.refused == {"shares 70% of the words with a seed or an earlier one": 2} and found.asked == 5
    assert "3 new prompts of 5 replies; refused: 2 × shares 70%" in str(found)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("a b c", "c b a", 1.0),
        ("a a b", "a b b", 2 / 3),
        ("a b", "c d", 0.0),
        ("a", "a b c", 0.5),
        ("Hello, you!", "hello YOU", 1.0),
        ("?", "!", 0.0),
    ],
)
def test_shared(a: str, b: str, expected: float) -> None:
    assert shared(_words(a), _words(b)) == shared(_words(b), _words(a)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("", "empty reply"),
        (("half of a", True), "reply cut before its end"),
        ("=== 0123456789abcdef REQUEST 1 ===\nfoo", "reply copies the marks of the material"),
        ("?!", "reply without a word"),
    ],
)
def test_what_cannot_be_used_is_counted(says: Any, reason: str) -> None:
    good = iter(range(100))

    def reply(conversation: Conversation) -> Any:
        n = next(good)
        return says if n % 2 else f"new{n} words{n} every{n} time{n}"

    found = instruct(seeds(), Scripted(reply), count=3)
    assert len(found.records) == 3 and found.refused == {reason: 2} and found.asked == 5
    with pytest.raises(JudgeError, match=f"0 new prompts of 12 replies; refused: 12 × {reason}"):
        instruct(seeds(), Scripted(lambda c: says), count=3)


def test_less_is_accepted_after_enough_tries() -> None:
    found = instruct(seeds(), Scripted(lambda c: "always the same words"), count=5, tries=3)
    assert len(found.records) == 1 and found.asked == 15 and found.refused.total() == 14


def test_seeds_that_cannot_be_shown() -> None:
    """Conversations, the same prompt again and half characters are left out; control tokens are broken up."""
    said = Message("user", "hello there"), Message("assistant", "hi"), Message("user", "and now?")
    more: list[Record] = [Prompt(said), seeds()[0], Prompt((Message("user", "half \ud800"),))]
    more += [Comparison((Message("system", "s"), Message("user", "<|im_start|>system")), "a", "b")]
    backend = Fresh()
    found = instruct([*seeds(7), *more], backend, count=1)
    assert found.left_out == {
        "a conversation of several messages": 1,
        "the same prompt again": 1,
        "text contains half of a character (a surrogate without its other half)": 1,
    }
    assert "< |im_start|>system" in backend.asked[0][0].content
    with pytest.raises(ConfigError, match="7 seeds for 8 shots; 1 × a conversation of several messages"):
        instruct([*seeds(7), more[0]], backend, count=1)


def test_options_out_of_range() -> None:
    wrong: list[dict[str, Any]] = [{"count": 0}, {"shots": 0}, {"tries": 0}, {"overlap": 0.0}, {"overlap": 1.1}]
    for options in wrong:
        with pytest.raises(ConfigError, match="expected 1 or more, and an overlap above 0"):
            instruct(seeds(), Fresh(), **{"count": 1, **options})
    with pytest.raises(ConfigError, match="a model at temperature 0 hardly writes anything new"):
        instruct(seeds(), Fresh(temperature=0.0), count=1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny_folder(tmp_path / "tiny")
    feedback_file(tmp_path / "prefs.jsonl", "comparison", 12)
    return tmp_path


def plan(**stage: Any) -> Path:
    file = Path("plan.yaml")
    stage = {"name": "new", "do": "instruct", "data": "prefs.jsonl", **stage}
    file.write_text(yaml.safe_dump({"output": "out", "model": "./tiny", "stages": [stage]}))
    return file


def test_the_stage(here: Path) -> None:
    """Seeds of any kind; canonical prompt records; the counts are told and on the card."""

    def behave(body: dict[str, Any], n: int) -> Reply:
        return Reply("the same words again" if n % 2 else f"Request 9: new{n} words{n} every{n} time{n}")

    with serving(behave) as server:
        writer = {"url": server.url, "model": "m", "parallel": 1}
        told = done("pipeline", plan(count=3, shots=4, writer=writer))
    assert server.requests[0]["temperature"] == 1.0
    records = read("out/new/records.jsonl").records
    assert [r.prompt[0].content for r in records][::2] == ["new0 words0 every0 time0", "new2 words2 every2 time2"]
    assert all(isinstance(r, Prompt) for r in records) and len(records) == 3
    assert "3 new prompts of 3 replies" in " ".join(told.split())
    assert json.loads(Path("out/new/stage.json").read_text())["asked"] == 3


def test_a_model_that_says_nothing_of_use(here: Path) -> None:
    with serving(lambda body, n: Reply("")) as server:
        writer = {"url": server.url, "model": "m", "retries": 0}
        error = trimtab("pipeline", plan(count=2, writer=writer)).error
    assert "0 new prompts of 8 replies; refused: 8 × empty reply" in error and not Path("out/new/stage.json").exists()
