"""The layouts that are known, as one table: which columns each needs and which function reads its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trimtab.feedback import layouts, published, split
from trimtab.feedback.kinds import KINDS
from trimtab.feedback.labels import PAIR, PAIR_LABEL, THUMB, THUMB_LABEL, Label
from trimtab.feedback.records import Comparison, Demonstration, Prompt, Ranking, Record, Score, Solution, Thumb
from trimtab.feedback.rows import Row

IMPLICIT = "trl preference, implicit prompt"
PAIR_EXTRAS = ("tie", "is_tie", "strength", "margin", "score_chosen", "score_rejected")
ALPACA_EXTRAS = ("input", "system", "history")


@dataclass(frozen=True)
class Shape:
    """One layout: ``needs`` maps the name a column has here to the names it goes by, ``also`` lists optional ones.

    ``fits`` decides on the values of a row where the columns do not suffice; ``auto=False`` is read only when named;
    ``listed=False`` keeps near repetitions out of the list in error messages.
    """

    name: str
    kind: type[Record]
    reads: Callable[[Row], Record | layouts.Found]
    needs: Mapping[str, tuple[str, ...]]
    also: tuple[str, ...] = ()
    label: Label | None = None
    fits: Callable[[Row], bool] | None = None
    auto: bool = True
    listed: bool = True

    def columns(self, found: Iterable[str]) -> dict[str, str]:
        """``{name here: name in the file}`` of the needed columns that were found."""
        have = set(found)
        pairs = ((role, next((name for name in names if name in have), None)) for role, names in self.needs.items())
        return {role: name for role, name in pairs if name}

    def describe(self) -> str:
        """``"trl preference" (prompt, chosen, rejected)``: a line of the error that lists what is known."""
        return f'"{self.name}" ({", ".join(names[0] for names in self.needs.values())})'


def _named(*columns: str, **aliases: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {column: (column,) for column in columns} | aliases


LABEL = ("label", "kto_tag")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "query")
WINNER_NAMES = ("preference", "label", "winner", "better_response_id", "choice")
TWO_ANSWERS = (
    ("first", "second"),
    ("output_1", "output_2"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
)


def _coded(first: str, second: str) -> Shape:
    needs = _named(prompt=PROMPT_NAMES, first=(first,), second=(second,), preference=WINNER_NAMES)
    return Shape(
        f"coded pair {first}/{second}",
        Comparison,
        layouts.coded_pair,
        needs,
        (*PAIR_EXTRAS, "input", "system"),
        PAIR_LABEL,
        listed=first == "first",
    )


SHAPES: tuple[Shape, ...] = (
    Shape(
        "trimtab",
        Record,
        layouts.canonical,
        _named("kind", "prompt"),
        ("completion", "chosen", "rejected", "tie", "strength", "target", "desirable", "ranked", "ranks", "scores")
        + ("score", "steps", "labels"),
        fits=lambda row: row.get("kind") in KINDS,
    ),
    # pairs
    Shape(
        "hh-rlhf transcript, prompt given",
        Comparison,
        layouts.transcript_prompt_pair,
        _named("prompt", "chosen", "rejected"),
        PAIR_EXTRAS,
        fits=lambda row: split.is_transcript(row.get("prompt")),
    ),
    Shape(
        "trl preference",
        Comparison,
        layouts.preference,
        _named("prompt", "chosen", "rejected"),
        (*PAIR_EXTRAS, "messages"),
    ),
    Shape(
        "hh-rlhf transcript",
        Comparison,
        layouts.transcript_pair,
        _named("chosen", "rejected"),
        PAIR_EXTRAS,
        fits=lambda row: split.is_transcript(row.get("chosen")),
    ),
    Shape(
        IMPLICIT,
        Comparison,
        layouts.preference_implicit,
        _named("chosen", "rejected"),
        PAIR_EXTRAS,
    ),
    Shape(
        "sharegpt preference",
        Comparison,
        layouts.sharegpt_pair,
        _named("conversations", "chosen", "rejected"),
        (*PAIR_EXTRAS, "system"),
    ),
    Shape(
        "alpaca preference",
        Comparison,
        layouts.alpaca_pair,
        _named("instruction", "chosen", "rejected"),
        (*PAIR_EXTRAS, *ALPACA_EXTRAS),
    ),
    Shape("ms-swift preference", Comparison, layouts.swift_pair, _named("messages", "rejected_response"), PAIR_EXTRAS),
    Shape(
        "llmbar",
        Comparison,
        layouts.coded_pair,
        _named(prompt=("input",), first=("output_1",), second=("output_2",), preference=("label",)),
        label=Label("preference", PAIR, {"1": "first", "2": "second"}),
        fits=lambda row: set(row) == {"input", "output_1", "output_2", "label"} and row["label"] in (1, 2),
    ),
    *(_coded(first, second) for first, second in TWO_ANSWERS),
    Shape(
        "coded pair of conversations",
        Comparison,
        layouts.coded_pair,
        _named(first=("conversation_a",), second=("conversation_b",), preference=WINNER_NAMES),
        PAIR_EXTRAS,
        PAIR_LABEL,
    ),
    # thumbs, scores, rankings
    Shape(
        "truthfulqa judge",
        Thumb,
        published.truthfulqa,
        _named("prompt", label=("completion",)),
        label=Label("label", THUMB, {"yes": "desirable", "no": "undesirable"}),
        fits=lambda row: str(row.get("prompt")).startswith("Q: ") and str(row.get("prompt")).endswith("\nTrue:"),
    ),
    Shape("trl thumb", Thumb, layouts.thumb, _named("prompt", "completion", label=LABEL), label=THUMB_LABEL),
    Shape("messages thumb", Thumb, layouts.messages_thumb, _named("messages", label=LABEL), label=THUMB_LABEL),
    Shape(
        "sharegpt thumb",
        Thumb,
        layouts.conversations_thumb,
        _named("conversations", label=LABEL),
        ("system",),
        THUMB_LABEL,
    ),
    Shape(
        "alpaca thumb",
        Thumb,
        layouts.alpaca_thumb,
        _named("instruction", "output", label=LABEL),
        ALPACA_EXTRAS,
        THUMB_LABEL,
    ),
    Shape("scores", Score, layouts.score, _named("prompt", "completion", score=("score", "reward"))),
    Shape("messages score", Score, layouts.messages_score, _named("messages", score=("score", "reward"))),
    Shape("score list", Score, layouts.score_list, _named("prompt", "completions", "scores")),
    Shape("ranking", Ranking, layouts.ranking, _named("prompt", "completions", "ranks")),
    Shape("trl stepwise", Solution, layouts.stepwise, _named("prompt", "completions", "labels")),
    # demonstrations and prompts
    Shape("trl prompt and completion", Demonstration, layouts.demonstration, _named("prompt", "completion")),
    Shape("messages", Demonstration, layouts.messages_demonstration, _named("messages")),
    Shape("sharegpt", Demonstration, layouts.conversations_demonstration, _named("conversations"), ("system",)),
    Shape("alpaca", Demonstration, layouts.alpaca_demonstration, _named("instruction", "output"), ALPACA_EXTRAS),
    Shape("self-instruct seed tasks", Demonstration, layouts.seed_task, _named("instruction", "instances")),
    Shape("question and answer", Demonstration, layouts.question_answer, _named("question", "answer")),
    Shape("prompt only", Prompt, layouts.prompt_only, _named("prompt")),
    # data sets with a layout of their own
    Shape(
        "finegrained comparisons",
        Comparison,
        published.finegrained_pairs,
        _named("question", "passages", "prediction 1", "prediction 2", "prediction 3", "prediction 4", "preference"),
    ),
    Shape(
        "finegrained ranking",
        Ranking,
        published.finegrained_ranking,
        _named("question", "passages", "prediction 1", "prediction 2", "prediction 3", "prediction 4", "preference"),
        auto=False,
    ),
    Shape(
        "halueval",
        Thumb,
        published.halueval,
        _named("user_query", "chatgpt_response", label=("hallucination",)),
        label=Label("label", THUMB, {"no": "desirable", "yes": "undesirable"}),
    ),
    Shape(
        "halluqa",
        Comparison,
        published.halluqa,
        _named("Question", "Best Answer1", "Wrong_Answer1"),
        tuple(f"{kind}{n}" for kind in ("Best Answer", "Wrong_Answer") for n in (2, 3, 4)),
    ),
    Shape(
        "gsm8k graded solutions",
        Thumb,
        published.graded_solutions,
        _named("question", "ground_truth"),
        ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"),
        fits=lambda row: any(published.is_graded(value) for value in row.values()),
    ),
    Shape("hhh grading prompts", Comparison, published.hhh_judge, _named("chosen_instruction", "rejected_instruction")),
)
