"""Train judge against test judge: where they part, what is asked of whom, and that a run that is resumed sees the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.command import done
from tests.judges.server import Reply, serving
from tests.judges.test_endpoint import SHOWN
from tests.online.test_rounds import card, here, kill, options, steps  # noqa: F401
from trimtab.config import resolve
from trimtab.errors import ConfigError
from trimtab.online.kept import Kept
from trimtab.online.watch import FILE, Seen, Watch, divergence, in_words, looks
from trimtab.report import mean_interval
from trimtab.run import train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SPREAD = (-0.1, 0.0, 0.1, 0.0)  # 4 prompts: half width 3.18 * 0.0816 / 2 = 0.130


def seen(*rows: tuple[float, float]) -> list[Seen]:
    """Looks with these means of train and test judge."""
    spread = lambda m: tuple(m + d for d in SPREAD)  # noqa: E731
    return [Seen(i, spread(a), spread(b), kl=0.25 * i) for i, (a, b) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "at"),
    [
        ([(0.0, 0.0), (0.5, 0.4), (0.8, 0.3), (1.0, 0.1)], 3),  # 0.3 + 0.13 holds 0.4; 0.1 + 0.13 does not
        ([(0.0, 0.0), (0.5, 0.4), (0.8, 0.26), (1.0, 0.5)], 2),  # the first, though it comes back
        ([(0.0, 0.0), (0.5, 0.4), (0.4, 0.1)], None),  # both fall: a bad policy, not one that pleases its judge
        ([(0.0, 0.0), (0.5, 0.4), (0.8, 0.28)], None),  # within the interval
        ([(0.0, 0.5), (0.4, 0.1)], 1),  # from the start
        ([(0.0, 0.0), (0.5, 0.5)], None),
        ([], None),
    ],
)
def test_where_they_part(rows: list[tuple[float, float]], at: int | None) -> None:
    assert mean_interval(SPREAD).high == pytest.approx(0.130, abs=1e-3)
    assert divergence(seen(*rows)) == at


def test_looks_without_a_judgement_part_nothing() -> None:
    blind = Seen(1, (1.0, 1.0), (None, None), kl=-0.1)
    assert blind.sqrt_kl == 0 and math.isnan(blind.mean("test").value) and not blind.mean("test").bounded
    assert divergence([*seen((0.0, 0.0)), blind]) is None
    assert "the two do not part" in in_words(seen((0, 0), (1, 1)))
    assert "they part after round 1: the policy pleases its judge alone" in in_words(seen((0, 1), (1, 0)))


# --- runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def judges(here: Path) -> None:  # noqa: F811
    (here / "mine.py").write_text(
        "def long(p, a):\n    return float(len(a))\n\ndef is_chat(p, a):\n    return float('|' in p)\n"
    )
    (here / "other.py").write_text(
        "def short(p, a):\n    if len(a) % 5 == 4:\n        raise ValueError('no')\n    return -len(a)\n"
    )


def watched(**more: Any) -> dict[str, Any]:
    return options(
        "rloo",
        judge="rule:mine.py:long",
        test_judge="rule:other.py:short",
        samples=6,
        holdout=0.4,
        output="run",
        **more,
    )


@pytest.mark.parametrize(("every", "finetune"), [(1, "lora"), (2, "full")])
def test_both_see_the_same_answers(every: int, finetune: str) -> None:
    """The start at first, then every so many rounds, and the end; figures are logged with the round's steps."""
    folder = train(resolve(watched(rounds=3, watch_every=every, learning_rate=0.03, finetune=finetune)))
    found = looks(folder / "rounds")
    assert [s.after for s in found] == ([0, 1, 2, 3] if every == 1 else [0, 2, 3])
    logged, told = steps(folder), card(folder)["watch"]
    assert logged[0]["watch/kl"] == pytest.approx(0, abs=1e-4) and found[-1].kl > 1e-3
    for s, line in zip(found, told["looks"], strict=True):
        file = folder / "rounds" / f"{s.after + 1:04d}" / FILE if s.after < 3 else folder / "rounds" / FILE
        said = json.loads(file.read_text())
        assert len(said["answers"]) == 6 == len(s.train) and said["failed"]["train"] == {}
        assert all(
            t is None or t == -r for r, t in zip(s.train, s.test, strict=True)
        )  # the same text, the other way round
        assert sum(t is None for t in s.test) == said["failed"]["test"].get("the rule raised ValueError", 0)
        assert line["train"]["value"] == pytest.approx(sum(s.train) / 6)  # type: ignore[arg-type]
        assert line["sqrt_kl"] == pytest.approx(math.sqrt(max(s.kl, 0)))
        if s.after < 3:
            row = logged[2 * s.after]  # 4 rollouts in batches of 2
            assert row["watch/train"] == line["train"]["value"] and row["watch/test"] == line["test"]["value"]
    assert told["divergence"] == divergence(found)
    assert ("watch/train" in logged[2]) == (every == 1)


def test_answers_are_the_probes_and_prompts_are_conversations() -> None:
    """The look before round 1 is the card's answers before; the judge reads the prompt, not its chat template."""
    folder = train(resolve({**watched(rounds=1), "judge": "rule:mine.py:is_chat", "test_judge": "rule:mine.py:long"}))
    at_first = json.loads((folder / "rounds" / "0001" / FILE).read_text())
    assert at_first["answers"] == card(folder)["answers_before"]
    assert at_first["train"] == [0.0] * 6


def worth(text: str) -> int:
    return sum(map(ord, text)) % 4


def likes(body: dict[str, Any], _: int) -> Reply:
    """P by the answers' worth; the place shown first gets 0.1 more."""
    first, second = (worth(dict(SHOWN.findall(body["messages"][0]["content"]))[f"ANSWER {label}"]) for label in "AB")
    p = 0.6 + 0.1 * (first - second)
    return Reply("A", [("A", {"A": p, "B": 1 - p})])


def test_a_judge_of_pairs_compares_with_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is P(the answer beats what the start model said), places evened out."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(likes) as server:
        Path("judge.yaml").write_text(f"url: {server.url}\nmodel: m\nprompt: pairwise\n")
        folder = train(resolve(watched(rounds=2, learning_rate=0.1) | {"test_judge": "language:judge.yaml"}))
    first, *_, last = looks(folder / "rounds")
    tokenizer = AutoTokenizer.from_pretrained("model")
    start, end = (
        [tokenizer.decode(a, skip_special_tokens=True) for a in json.loads(f.read_text())["answers"]]
        for f in (folder / "rounds/0001" / FILE, folder / "rounds" / FILE)
    )
    assert first.test == (0.5,) * 6
    assert last.test == pytest.approx([0.5 + 0.1 * (worth(b) - worth(a)) for a, b in zip(start, end, strict=True)])
    assert len(set(last.test)) > 2 and len(server.requests) > 0


def test_a_look_leaves_random_numbers_alone(tmp_path: Path) -> None:
    """A run that is resumed reads what another one looked at, and must go on with the same random numbers."""

    class Alone:
        main = True
        gathered = staticmethod(lambda mine, n: [mine[i] for i in range(n)])

    watch = Watch.__new__(Watch)
    watch._seen = lambda *_: {"after": 0, "train": [1, 2], "test": [3, 4], "kl": torch.rand(()).item()}  # type: ignore[method-assign]
    before = torch.get_rng_state()
    figures = watch.look(0, Alone(), tmp_path / FILE)
    assert torch.equal(before, torch.get_rng_state())
    assert figures == watch.look(0, Alone(), tmp_path / FILE) and figures["watch/train"] == 1.5


def test_one_prompt_is_no_interval() -> None:
    with pytest.raises(ConfigError, match="test_judge looks at answers to held-out prompts, and there is 1"):
        train(resolve(watched() | {"holdout": 0.05}))


def test_watching_changes_nothing_and_resumes() -> None:
    """Weights with and without a test judge are the same, bit for bit; killed and resumed, so are looks and weights."""
    more = {"rounds": 4, "prompts_per_round": 6, "save_every": 3}
    values = {k: v for k, v in watched(**more).items() if k != "output"}
    whole = train(resolve({**values, "output": "whole"}))
    without = train(resolve({k: v for k, v in values.items() if k != "test_judge"} | {"output": "without"}))
    assert (whole / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()
    kill({**values, "output": "killed"}, "learning", 8)
    assert len(looks(Path("killed/rounds"))) == 3
    resumed = train(resolve({**values, "output": "killed", "resume": True}))
    assert looks(whole / "rounds") == looks(resumed / "rounds")
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert card(whole)["watch"] == card(resumed)["watch"]
    assert Kept(resumed / "rounds" / "0002").figures() == Kept(whole / "rounds" / "0002").figures()


def test_the_command_says_where() -> None:
    told = done("train", *(w for k, v in watched(rounds=1).items() for w in ((v,) if k == "data" else (f"--{k}", v))))
    assert "watch: train judge " in told and "; sqrt(KL) " in told
