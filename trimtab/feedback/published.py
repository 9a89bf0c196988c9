"""Data sets with a layout of their own: one function each, as in ``layouts.py``, with the codes of their authors."""

from __future__ import annotations

from itertools import product
from typing import Any

from trimtab.feedback import split
from trimtab.feedback.layouts import Found, each
from trimtab.feedback.records import Comparison, Conversation, Message, Ranking, Thumb
from trimtab.feedback.rows import Problem, Row, conversation, flag, items, reply, text

FINEGRAINED_PAIRS = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))


def finegrained_pairs(row: Row) -> Found:
    """FineGrainedRLHF: six judgements of four predictions, 0 a tie, 1 the first better, 2 the second better."""
    prompt, codes = _finegrained_prompt(row), _finegrained_codes(row)

    def build(pair: tuple[int, int], code: int) -> Comparison:
        first, second = (text(row, f"prediction {number}") for number in pair)
        return Comparison(prompt, *((second, first) if code == 2 else (first, second)), tie=code == 0)

    return each(build, list(FINEGRAINED_PAIRS), codes)


def finegrained_ranking(row: Row) -> Ranking:
    """The same six judgements as one ranking; refused where no ranking agrees with all six."""
    codes = _finegrained_codes(row)
    ranks = [1, 1, 1, 1]  # one plus how many were judged better
    for (first, second), code in zip(FINEGRAINED_PAIRS, codes, strict=True):
        if code:
            ranks[(second if code == 1 else first) - 1] += 1
    for (first, second), code in zip(FINEGRAINED_PAIRS, codes, strict=True):
        difference = ranks[first - 1] - ranks[second - 1]
        if code != (0 if difference == 0 else 1 if difference < 0 else 2):
            raise Problem(
                "judgements that no ranking agrees with",
                f'"preference" is {codes}: its ties are not transitive. Read it as pairs, or drop the row.',
            )
    return Ranking(_finegrained_prompt(row), tuple(text(row, f"prediction {n}") for n in (1, 2, 3, 4)), tuple(ranks))


def _finegrained_codes(row: Row) -> list[int]:
    codes = items(row, "preference")
    if len(codes) != len(FINEGRAINED_PAIRS) or not all(type(code) is int and code in (0, 1, 2) for code in codes):
        raise Problem('wrong labels in "preference"', f'"preference" is {codes}, expected six of 0, 1 and 2.')
    return codes


def _finegrained_prompt(row: Row) -> Conversation:
    """The first passage, then the question: when a long prompt is cut from the left, the question survives."""
    question, passages = text(row, "question"), items(row, "passages")
    if not passages or not passages[0]:
        return (Message("user", question),)
    if not isinstance(passages[0], list) or not all(isinstance(sentence, str) for sentence in passages[0]):
        raise Problem('wrong type in "passages"', '"passages" must be lists of strings: a title, then sentences.')
    title, *sentences = passages[0]
    context = " ".join(sentences)
    context = context if context.startswith(title) else f"{title}\n\n{context}"
    return (Message("user", f"{context}\n\nQuestion: {question}"),)


def halueval(row: Row) -> Thumb:
    """HaluEval: a hallucination is a thumb down; the label is already a word."""
    prompt = conversation(text(row, "user_query"), "user_query")
    return Thumb(prompt, text(row, "chatgpt_response"), row["label"] == "desirable")


def halluqa(row: Row) -> Found:
    """HalluQA: every best answer is preferred to every wrong one."""
    prompt = conversation(text(row, "Question"), "Question")
    best = [row[f"Best Answer{n}"] for n in range(1, 5) if row.get(f"Best Answer{n}")]
    wrong = [row[f"Wrong_Answer{n}"] for n in range(1, 5) if row.get(f"Wrong_Answer{n}")]
    pairs = list(product(best, wrong))
    return each(lambda pair: Comparison(prompt, reply(pair[0], "Best")[1], reply(pair[1], "Wrong")[1]), pairs)


def truthfulqa(row: Row) -> Thumb:
    """The judge's training rows: prompt ``Q: ...\\nA: ...\\nTrue:``, completion yes or no: thumbs on the answer."""
    question, mark, answer = text(row, "prompt").removesuffix("\nTrue:").partition("\nA: ")
    if not mark or not question.startswith("Q: "):
        raise Problem("not a TruthfulQA row", r'"prompt" is not "Q: ...\nA: ...\nTrue:" as in the rows of this layout.')
    return Thumb((Message("user", question.removeprefix("Q: ")),), answer, row["label"] == "desirable")


def graded_solutions(row: Row) -> Found:
    """GSM8K's model solutions: every column that holds ``is_correct`` and ``solution`` is a thumb."""
    prompt = conversation(text(row, "question"), "question")
    graded = [value for value in row.values() if is_graded(value)]
    return each(lambda value: Thumb(prompt, text(value, "solution"), flag(value, "is_correct")), graded)


def is_graded(value: Any) -> bool:
    """Whether a value is one graded solution."""
    return isinstance(value, dict) and {"is_correct", "solution"} <= set(value)


def hhh_judge(row: Row) -> Comparison:
    """HHH as rewritten for a judge: instruction and response are cut out of the two grading prompts."""
    prompt, chosen = _graded_text(row, "chosen_instruction")
    other, rejected = _graded_text(row, "rejected_instruction")
    return Comparison(*split.implicit([*prompt, chosen], [*other, rejected]))


def _graded_text(row: Row, column: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    _, start, rest = text(row, column).partition("###The instruction to evaluate:\n")
    asked, middle, rest = rest.partition("\n\n###Response to evaluate:\n")
    answer, end, _ = rest.partition("\n\n###Score Rubrics:")
    if not (start and middle and end):
        raise Problem("not a grading prompt", f'"{column}" lacks the "###" headings of this layout.')
    return [{"role": "user", "content": asked}], {"role": "assistant", "content": answer}
