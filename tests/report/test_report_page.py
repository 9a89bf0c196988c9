"""The page: complete, inert, offline, and honest about runs that broke off."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import DataError
from trimtab.report import mean_interval, paired_gain, proportion_interval, write_report
from trimtab.report.text import clip, duration, number, setting, visible, without_secrets

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</p></article></style></title><img src=x onerror=alert(3)>",
    '" onmouseover="alert(4)" x="',
    "'><svg/onload=alert(5)>",
    "{{ 7*191 }} {% include '/etc/passwd' %}",
    "<!-- --><![CDATA[ <a href='javascript:alert(6)'>",
    "http://evil.example/x.png",
]
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text; checks on the way that tags nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", ""
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts += data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def steps(count: int, **formulas: Any) -> list[dict[str, Any]]:
    """``count`` log lines; each formula maps the share of the run that is done to a value."""
    lines = [{"step": i} | {k: f(i / count) for k, f in formulas.items()} for i in range(1, count + 1)]
    return [{k.replace("__", "/"): v for k, v in line.items()} for line in lines]


def full_card() -> dict[str, Any]:
    return {
        "trimtab": "0.1.0",
        "command": "trimtab train pairs.jsonl --method dpo",
        "method": "dpo",
        "status": "finished",
        "started": "2026-11-21T05:10:00",
        "seconds": 125.0,
        "config": {"beta": 0.1, "max_steps": 60, "learning_rate": 5e-05},
        "versions": {"torch": "2.13.0"},
        "machine": {"device": "cpu"},
        "fingerprints": {"data": "9f2c41d0"},
        "seed": 3,
        "reference": "switched-off adapter of tiny (sha 12ab)",
        "engine": {"layout": "shared", "precision": "float32", "fallback": None, "peak_memory_gb": 1.5},
        "data": {
            "file": "pairs.jsonl",
            "shape": "hh-rlhf transcript",
            "rows": 2312,
            "records": 2300,
            "train": 2070,
            "held_out": 230,
            "dropped": {"empty answer": 9, "identical answers": 3},
            "notes": ["a note"],
            "conversions": ["a conversion"],
            "tokens": {
                "prompt": {"mean": 42.5, "median": 38, "p99": 140, "max": 210},
                "truncated_rows": 0,
                "eos_lost": 0,
            },
        },
        "checks": [{"name": "policy equals reference at step 0", "ok": True, "detail": "loss 0.6931"}],
        "evaluation": {
            "before": {"rewards/accuracies": proportion_interval(115, 230).to_json()},
            "after": {"rewards/accuracies": proportion_interval(152, 230).to_json()},
        },
        "samples": {
            "kl": {"value": 3.9, "low": 3.4, "high": 4.4, "n": 60},
            "length_before": 41,
            "length_after": 44,
            "reward_before": {"value": 0.05, "low": -0.05, "high": 0.15, "n": 60},
            "reward_after": {"value": 0.26, "low": 0.15, "high": 0.37, "n": 60},
            "reward_gain": {"value": 0.21, "low": 0.12, "high": 0.30, "n": 60},
            "reward_name": "lexicon",
        },
        "explain": {"equation": "-log sigmoid(beta * margin)", "paper": "arXiv:2305.18290", "title": "DPO"},
    }


def healthy() -> list[dict[str, Any]]:
    train = steps(
        60,
        loss=lambda t: 0.693 - 0.3 * t,
        grad_norm=lambda t: 2 - t,
        learning_rate=lambda t: 5e-5 * (1 - t),
        rewards__chosen=lambda t: 0.2 * t,
        rewards__rejected=lambda t: -0.8 * t,
        rewards__margins=lambda t: t,
        rewards__accuracies=lambda t: 0.5 + 0.25 * t,
        logps__chosen=lambda t: -100 + 2 * t,
        logps__rejected=lambda t: -100 - 8 * t,
        kl=lambda t: 4 * t,
        length__chosen=lambda t: 80.0,
        tokens_per_second=lambda t: 5000 + t,
    )
    held = [{"step": s, "eval/loss": 0.693 - 0.002 * s, "eval/rewards/accuracies": 0.6} for s in (20, 40, 60)]
    return train + held


def write(folder: Path, card: object = None, metrics: object = None, samples: object = None) -> Page:
    folder.mkdir(exist_ok=True)
    if card is not None:
        (folder / "run.json").write_text(json.dumps(card), encoding="utf-8")
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        if rows is not None:
            assert isinstance(rows, list)
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def verdict(folder: Path) -> str:
    found = re.search(r"<h1[^>]*>(.*?)</h1>", (folder / "report.html").read_text(encoding="utf-8"), re.S)
    assert found
    return found[1].replace("&#39;", "'")


def test_a_whole_run(tmp_path: Path) -> None:
    samples = [
        {"prompt": f"p{i}", "before": "b", "after": f"a{i}", "reward_before": 0, "reward_after": i} for i in range(9)
    ]
    page = write(tmp_path, full_card(), healthy(), samples)
    assert verdict(tmp_path) == (
        "The aligned model's reward (lexicon) on 60 held-out prompts rose by 0.21 (95 % interval 0.12 to 0.30)."
    )
    assert {"figures", "findings", "curves", "samples", "data", "checks", "engine", "again"} <= page.ids()
    curves = {i for i in page.ids() if i and i.startswith("curve-")}
    wanted = "loss rewards margins accuracies logps kl length grad_norm learning_rate more-0"
    assert curves == {f"curve-{name}" for name in wanted.split()}
    assert page.text.count("How to read this") == 9
    assert "No rule found anything odd" in page.text
    for piece in (
        "2,312",
        "empty answer",
        "identical answers",
        "9f2c41d0",
        "switched-off adapter",
        "2 min 5 s",
        "42.5",
    ):
        assert piece in page.text, piece
    assert "rose on 8, fell on 0 and stayed on 1." in re.sub(r"\s+", " ", page.text)
    assert (tmp_path / "report.html").stat().st_size < 200_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "run.json", "samples.jsonl"]


def test_train_and_held_out_share_a_chart(tmp_path: Path) -> None:
    page = write(tmp_path, full_card(), healthy())
    hovers = [json.loads(a["data-hover"] or "") for _, a in page.tags if "data-hover" in a]
    assert [s["n"] for s in hovers[0]["s"]] == ["train", "held-out"]
    assert hovers[0]["s"][1]["x"] == [20, 40, 60]
    assert hovers[0]["s"][1]["t"] == ["0.653", "0.613", "0.573"]
    # The chart spans 1 to 60; the first point of training is at the top, the last at the bottom.
    assert (hovers[0]["l"], hovers[0]["r"]) == (1, 60)
    heights = hovers[0]["s"][0]["y"]
    assert heights == sorted(heights)
    assert 0 <= heights[0] < 15
    assert 85 < heights[-1] <= 100


def every_text(card: object, hostile: str) -> object:
    """The same card with every string, and a copy of every key, replaced by hostile text."""
    if isinstance(card, str):
        return card if card in ("finished",) else hostile
    if isinstance(card, list):
        return [every_text(item, hostile) for item in card]
    if isinstance(card, dict):
        twice = {k: every_text(v, hostile) for k, v in card.items()}
        extra = [v for v in twice.values() if not isinstance(v, dict | list)]
        return twice | ({hostile: extra[0]} if extra else {})
    return card


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_inert_wherever_it_stands(tmp_path: Path, hostile: str) -> None:
    plain = write(tmp_path / "plain", full_card(), healthy(), [{"prompt": "p", "before": "b", "after": "a"}])
    metrics = [line | {hostile: float(line["step"])} for line in healthy()]
    sample = {"prompt": hostile, "before": hostile, "after": hostile + " ", "reward_before": 0, "reward_after": 1}
    page = write(tmp_path / "hostile", every_text(full_card(), hostile), metrics, [sample])
    allowed = {(tag, name) for tag, attributes in plain.tags for name in attributes} | {
        ("span", "class"),
        ("g", "class"),
    }
    found = {(tag, name) for tag, attributes in page.tags for name in attributes}
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"span", "details", "summary"}
    assert not {(tag, name) for tag, name in found - allowed if name.startswith("on") or name in ("src", "href")}
    assert page.scripts == plain.scripts
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert hostile in page.text
    assert "1337" not in page.text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    samples = [{"prompt": h, "before": h, "after": h[::-1]} for h in HOSTILE]
    page = write(tmp_path, full_card(), healthy(), samples)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = [(tag, a.get("href") or a.get("src") or "") for tag, a in page.tags if "href" in a or "src" in a]
    outside = [(tag, link) for tag, link in links if not link.startswith("#")]
    assert outside == [("link", "data:,"), ("a", "https://arxiv.org/abs/2305.18290")]
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|eval|innerHTML|import)\b", page.scripts)


def test_the_policy_admits_the_one_script_and_nothing_else(tmp_path: Path) -> None:
    page = write(tmp_path, full_card(), healthy())
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a) or ""
    digest = base64.b64encode(hashlib.sha256(page.scripts.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "script-src 'unsafe" not in policy


def test_control_characters_and_overrides_are_shown_not_obeyed(tmp_path: Path) -> None:
    nasty = "a\x00b\x1b[31m\x7f\x85 \u202egnp.exe\u202c \u200b\ufeff \ud800 \u2028 tag\U000e0041"
    page = write(tmp_path, {"status": "finished"}, [], [{"prompt": nasty, "before": nasty, "after": nasty + "."}])
    raw = (tmp_path / "report.html").read_bytes()
    for byte in set(range(32)) - {9, 10}:
        assert bytes([byte]) not in raw
    for hidden in "\x7f\x85\u202e\u202c\u200b\ufeff\u2028\U000e0041":
        assert hidden.encode() not in raw
    for shown in ("a␀b␛[31m␡", "⟨U+0085⟩", "⟨U+202E⟩gnp.exe⟨U+202C⟩", "⟨U+D800⟩", "⟨U+E0041⟩"):
        assert shown in page.text
    assert visible("e\u0301 👩\u200d🚀 مرحبا\tx\r\ny") == "e\u0301 👩\u200d🚀 مرحبا\tx\ny"
    assert all(a.get("dir") == "auto" for tag, a in page.tags if a.get("class") == "said")


def test_long_texts_are_clipped_and_said_so(tmp_path: Path) -> None:
    page = write(tmp_path, {"status": "finished"}, [], [{"prompt": "p", "before": "x" * 9000, "after": "y" * 4100}])
    assert "5,000 more characters in samples.jsonl" in page.text
    assert "y" * 4100 in page.text
    assert clip("z" * 100, 10) == ("z" * 10, 90)


def test_many_samples_are_counted_not_hidden(tmp_path: Path) -> None:
    page = write(
        tmp_path, {"status": "finished"}, [], [{"prompt": str(i), "before": "b", "after": "a"} for i in range(77)]
    )
    assert "The first 40 of 77 samples in the order of the file, not selected." in page.text
    assert "34 more samples" in page.text


@pytest.mark.parametrize("missing", sorted(full_card()))
def test_each_part_may_be_missing(tmp_path: Path, missing: str) -> None:
    card = {k: v for k, v in full_card().items() if k != missing}
    for name, kept in (("absent", card), ("null", card | {missing: None})):
        page = write(tmp_path / name, kept, healthy())
        assert not re.search(r"\bNone\b|undefined|\bnull\b|\{\}", page.text)


@pytest.mark.parametrize("junk", [7, "text", [1, "x", None], {"a": [[]], "b": {"c": None}}, True, math.inf, 10**400])
def test_junk_in_any_part_does_not_break_the_page(tmp_path: Path, junk: object) -> None:
    for key in (*full_card(), "seeds", "gain", "kl", "length"):
        write(tmp_path, full_card() | {key: junk}, healthy())
    for key, value in full_card().items():
        if isinstance(value, dict):
            write(tmp_path, full_card() | {key: dict.fromkeys(value, junk)}, healthy())
    write(tmp_path, full_card(), [{"step": junk, "loss": 1}, {"step": 1, "loss": junk, "kl": junk}], [{"before": junk}])


def test_an_empty_card_is_a_page_without_empty_headings(tmp_path: Path) -> None:
    page = write(tmp_path, {})
    assert page.ids() == {"findings"}
    assert "None" not in page.text
    assert verdict(tmp_path) == "Whether the run finished is not recorded; nothing was measured after training."


def test_a_killed_run(tmp_path: Path) -> None:
    card = full_card() | {"status": "running", "evaluation": None, "samples": None, "seconds": None}
    write(tmp_path, card, healthy()[:37])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 38, "loss": 0.5')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert verdict(tmp_path) == (
        "The run has not finished: it was killed or is still going, and its last log is at step 37 of 60; "
        "nothing was measured after training."
    )
    assert "The last line of metrics.jsonl is half-written" in page.text
    assert "not finished" in page.text


def test_a_character_cut_in_half_and_a_broken_line_in_the_middle(tmp_path: Path) -> None:
    write(tmp_path, full_card(), [])
    lines = b'{"step": 1, "loss": 1.0}\nnot json\n[1]\n\n{"step": 2, "loss": 0.9}\n{"step": 3, "note": "\xe2\x82'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "2 lines of metrics.jsonl could not be read and were left out (line 2, 3)." in page.text
    assert "half-written" in page.text
    assert "train 0.9" in re.sub(r"\s+", " ", page.text)


def test_a_half_written_card(tmp_path: Path) -> None:
    write(tmp_path, full_card(), healthy())
    (tmp_path / "run.json").write_text(json.dumps(full_card())[:200], encoding="utf-8")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "run.json is damaged or half-written" in page.text
    assert "curve-loss" in page.ids()


@pytest.mark.parametrize(
    ("status", "opening"),
    [
        (
            "interrupted",
            "The run was interrupted at step 60 of 60; up to there, the held-out accuracy on 230 comparisons",
        ),
        ("failed", "The run failed at step 60 of 60; up to there, the held-out accuracy on 230 comparisons"),
    ],
)
def test_runs_that_broke_off_say_so_first(tmp_path: Path, status: str, opening: str) -> None:
    card = full_card() | {"status": status, "samples": {}, "error": "CUDA <b>out of memory</b>"}
    page = write(tmp_path, card, healthy())
    assert verdict(tmp_path).startswith(opening)
    assert ("It stopped with: CUDA <b>out of memory</b>" in page.text) == (status == "failed")


@pytest.mark.parametrize(
    ("successes", "words"),
    [(108, "not distinguishable from chance"), (150, "better than chance"), (60, "worse than chance")],
)
def test_accuracy_is_held_against_chance(tmp_path: Path, successes: int, words: str) -> None:
    accuracy = proportion_interval(successes, 200)
    write(tmp_path, {"status": "finished", "evaluation": {"after": {"rewards/accuracies": accuracy.to_json()}}}, [])
    size = f"The held-out accuracy on 200 comparisons is {accuracy.value:.2f} (95 % interval"
    assert verdict(tmp_path).startswith(size)
    assert verdict(tmp_path).endswith(words + ".")


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (-0.02, 0.03, 0.08, "did not change measurably: +0.03 (−0.02 to 0.08)."),
        (-0.30, -0.21, -0.12, "fell by 0.21 (95 % interval 0.12 to 0.30)."),
    ],
)
def test_a_gain_is_called_a_gain_only_beyond_its_interval(
    tmp_path: Path, low: float, value: float, high: float, words: str
) -> None:
    gain = {"value": value, "low": low, "high": high, "n": 60}
    write(tmp_path, {"status": "finished", "samples": {"reward_gain": gain}}, [])
    assert verdict(tmp_path) == "The aligned model's reward on 60 held-out prompts " + words


def test_caveats_name_few_prompts_one_seed_and_length(tmp_path: Path) -> None:
    gain = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 12}
    samples = {"reward_gain": gain, "length_before": 40, "length_after": 50}
    page = write(tmp_path, {"status": "finished", "samples": samples}, [])
    for caveat in (
        "One seed",
        "Only 12 prompts were sampled",
        "grew from 40 to 50 tokens; part of the gain may be length",
    ):
        assert caveat in page.text


def test_a_failed_check_comes_before_any_figure(tmp_path: Path) -> None:
    checks = [{"name": "policy equals reference", "ok": False, "detail": "0.4 nats"}]
    page = write(tmp_path, full_card() | {"checks": checks}, healthy())
    assert verdict(tmp_path).startswith(
        "A check failed (“policy equals reference”), so no figure here can be trusted; as recorded, the aligned"
    )
    assert "Check failed: policy equals reference" in page.text


def test_rewards_that_stand_only_in_the_samples_are_summarised(tmp_path: Path) -> None:
    old, new = [0.0, 0.1, 0.2, 0.4], [0.5, 0.5, 0.8, 0.9]
    rows = [
        {"prompt": str(i), "before": "b", "after": "a", "reward_before": x, "reward_after": y}
        for i, (x, y) in enumerate(zip(old, new, strict=True))
    ]
    write(tmp_path, {"status": "finished"}, [], rows)
    gain = paired_gain(old, new)
    assert f"reward on 4 held-out prompts rose by {gain.value:.2f}" in verdict(tmp_path)


def test_seeds_in_the_card(tmp_path: Path) -> None:
    gains = [0.2, 0.25, 0.3]
    seeds = [
        {"seed": i, "reward_gain": {"value": g, "low": g - 0.1, "high": g + 0.1, "n": 60}} for i, g in enumerate(gains)
    ]
    expected = "Over 3 seeds, the aligned model's reward (lexicon) rose by 0.25 (95 % interval 0.13 to 0.37)."
    for name, extra in (("given", {"gain": mean_interval(gains).to_json()}), ("computed", {})):
        page = write(tmp_path / name, full_card() | {"seeds": seeds} | extra, healthy())
        assert verdict(tmp_path / name) == expected
        assert "seeds" in page.ids()
        assert "One seed" not in page.text


def test_a_demo_folder_shows_its_chosen_run_and_all_seeds(tmp_path: Path) -> None:
    write(tmp_path / "seed-0", full_card(), healthy())
    seeds = [
        {"seed": i, "reward_before": 0.1, "reward_after": 0.3 + 0.01 * i, "kl": 4, "length_after": 44} for i in range(3)
    ]
    demo = {"seeds": seeds, "run": "seed-0"}
    (tmp_path / "demo.json").write_text(json.dumps(demo), encoding="utf-8")
    page = write(tmp_path)
    assert verdict(tmp_path).startswith("Over 3 seeds, the aligned model's reward (lexicon) rose by 0.210")
    assert "curve-loss" in page.ids()


def test_seeds_pooled_by_prompt_name_both(tmp_path: Path) -> None:
    seeds = [{"seed": i, "reward_gain": 0.2 + 0.01 * i} for i in range(3)]
    gain = {"value": 0.21, "low": 0.12, "high": 0.30, "n": 60, "method": "paired t"}
    samples = full_card()["samples"] | {
        "reward_name": "the demo's true reward: sentiment and brevity (trimtab/demo/reward.py)"
    }
    card = full_card() | {"seeds": seeds, "gain": gain, "gain_over_seeds": mean_interval([0.2, 0.21, 0.22]).to_json()}
    page = write(tmp_path, card | {"samples": samples}, healthy())
    assert verdict(tmp_path) == (
        "Over 3 seeds and 60 held-out prompts, the aligned model's true reward rose by 0.21 (95 % interval 0.12 to 0.30)."
    )
    assert "The reward: the demo's true reward: sentiment and brevity (trimtab/demo/reward.py)." in page.text
    assert "by seed" in page.text


def test_ties_at_the_start_are_not_an_accuracy(tmp_path: Path) -> None:
    """Before training every reward is 0, and counting who wins gives 0: not a figure to be proud of leaving behind."""
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 20, "method": "bootstrap"}
    before = {"rewards/accuracies": nothing, "rewards/margins": nothing}
    after = {"rewards/accuracies": {"value": 0.6, "low": 0.55, "high": 0.65, "n": 20, "method": "bootstrap"}}
    page = write(tmp_path, {"status": "finished", "evaluation": {"before": before, "after": after}}, [])
    assert verdict(tmp_path).startswith("The held-out accuracy on 20 prompts is 0.60")
    assert "before 0" not in page.text


def test_token_losses_by_side_and_repairs(tmp_path: Path) -> None:
    tokens = {"chosen": {"mean": 9}, "truncated_rows": 7, "tokens_lost": {"chosen": 5, "rejected": 6}, "eos_lost": {}}
    data = {"file": "f", "rows": 10, "tokens": tokens, "repaired": {"two spaces": 4}}
    page = write(tmp_path, {"status": "finished", "data": data}, [])
    text = re.sub(r"\s+", " ", page.text)
    assert "rows cut7" in text
    assert "tokens cut11" in text
    assert "Rows that were repaired two spaces4" in text


def test_a_demo_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "other", full_card(), healthy())
    inside = tmp_path / "demo"
    inside.mkdir()
    (inside / "demo.json").write_text(json.dumps({"run": "../other", "seeds": []}), encoding="utf-8")
    with pytest.raises(DataError, match=r"neither run\.json nor metrics\.jsonl"):
        write_report(inside)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not the folder of a run"):
        write_report(tmp_path)


def test_a_resumed_run_shows_the_later_figures(tmp_path: Path) -> None:
    again = [{"step": s, "loss": 0.1} for s in (3, 4)]
    page = write(tmp_path, full_card(), steps(4, loss=lambda t: 1.0) + again)
    assert "2 steps were logged twice" in page.text
    hover = next(json.loads(a["data-hover"] or "") for _, a in page.tags if "data-hover" in a)
    assert hover["s"][0]["t"] == ["1", "1", "0.1", "0.1"]


def test_a_long_run_keeps_its_spikes_and_stays_small(tmp_path: Path) -> None:
    metrics = steps(20_000, loss=lambda t: 1 - t + (3 if t == 0.5 else 0), kl=lambda t: t)
    page = write(tmp_path, full_card(), metrics)
    hover = next(json.loads(a["data-hover"] or "") for _, a in page.tags if "data-hover" in a)
    assert "3.5" in hover["s"][0]["t"]
    assert len(hover["s"][0]["x"]) < 500
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_a_spike_does_not_flatten_the_curve(tmp_path: Path) -> None:
    page = write(tmp_path, full_card(), steps(100, grad_norm=lambda t: 900.0 if t == 0.5 else 1 + t))
    hover = next(json.loads(a["data-hover"] or "") for _, a in page.tags if "data-hover" in a)
    heights = dict(zip(hover["s"][0]["x"], hover["s"][0]["y"], strict=True))
    assert heights[50] == 0  # through the upper edge
    assert heights[1] - heights[100] > 80  # the rest fills the chart
    assert "1 extreme value" in page.text


def test_credentials_do_not_reach_the_page(tmp_path: Path) -> None:
    config = {
        "judge_api_key": "sk-abcdefghijklmnopqrst",
        "nested": {"hf_token": "quiet"},
        "max_tokens": 512,
        "eos_token": 2,
    }
    card = full_card() | {
        "config": config,
        "command": "trimtab train --api-key s3cret --token=hf_abcdefghijklmnop x.jsonl",
    }
    page = write(tmp_path, card, [])
    for secret in ("sk-abc", "s3cret", "hf_abc", "quiet"):
        assert secret not in page.text
    assert "512" in page.text
    assert "x.jsonl" in page.text
    assert setting("max_tokens", 512) == "512"
    assert without_secrets("--max-tokens 512 --seed 1") == "--max-tokens 512 --seed 1"


@pytest.mark.parametrize(
    ("paper", "link"),
    [
        ("arXiv:2305.18290", "https://arxiv.org/abs/2305.18290"),
        ("2305.18290v3", "https://arxiv.org/abs/2305.18290v3"),
        ("https://arxiv.org/abs/2305.18290", "https://arxiv.org/abs/2305.18290"),
        ("javascript:alert(1)//arXiv:2305.18290", None),
        ("https://evil.example/2305.18290", None),
        ("a textbook", None),
    ],
)
def test_only_arxiv_papers_become_links(tmp_path: Path, paper: str, link: str | None) -> None:
    page = write(tmp_path, {"status": "finished", "explain": {"paper": paper}}, [])
    links = [a["href"] for tag, a in page.tags if tag == "a" and not (a.get("href") or "").startswith("#")]
    assert links == ([link] if link else [])
    assert paper in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.693147, "0.693"),
        (2312, "2,312"),
        (-1.5, "−1.5"),
        (46.0, "46"),
        (0.05, "0.05"),
        (0.04999, "0.0500"),
        (5e-7, "5.00e−7"),
        (1234.5, "1,234"),
        (2.5e9, "2.50e9"),
        (0.0, "0"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        (True, "yes"),
    ],
)
def test_numbers_for_people(value: object, text: str) -> None:
    assert number(value) == text


def test_durations_for_people() -> None:
    assert [duration(s) for s in (4.2, 59.99, 125, 12_345)] == ["4.2 s", "60 s", "2 min 5 s", "3 h 25 min"]
