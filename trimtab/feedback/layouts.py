"""One function per layout: a row in somebody's format, its columns under the names used here, becomes records.

A row that holds several records (four ranked answers, six judged pairs) yields each on its own, so that one bad pair
does not cost the others: a :class:`Problem` takes its place in the list. ``shapes.py`` says which function reads what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from trimtab.feedback import split
from trimtab.feedback.kinds import KINDS
from trimtab.feedback.records import (
    Comparison,
    Conversation,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Record,
    Score,
    Solution,
    Thumb,
)
from trimtab.feedback.rows import Problem, Row, as_number, conversation, flag, items, need, number, reply, text

Found = Iterator[Record | Problem]


# -- what several layouts share --------------------------------------------------------------------------------------


def prompt_column(row: Row) -> Conversation:
    """``prompt``: a string or messages."""
    return conversation(need(row, "prompt"), "prompt")


def conversations_column(row: Row) -> Conversation:
    """``conversations`` of sharegpt, with its optional ``system`` column first."""
    return _system(row) + conversation(items(row, "conversations"), "conversations")


def instruction_columns(row: Row) -> Conversation:
    """Alpaca: ``system``, ``history`` (pairs), and ``instruction`` ``input`` on the next line if there is one."""
    past: list[Message] = []
    for exchange in items(row, "history") if row.get("history") else []:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(said, str) for said in exchange):
            raise Problem('wrong type in "history"', '"history" must be a list of [question, answer] pairs of strings.')
        past += [Message("user", exchange[0]), Message("assistant", exchange[1])]
    asked = text(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n{text(row, 'input')}" if asked else text(row, "input")
    return (*_system(row), *past, Message("user", asked))


def _system(row: Row) -> Conversation:
    return (Message("system", text(row, "system")),) if row.get("system") else ()


def _strength(row: Row) -> float | None:
    for column in ("strength", "margin"):
        if row.get(column) not in (None, ""):
            return number(row, column)
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        return number(row, "score_chosen") - number(row, "score_rejected")
    return None


def _completion(row: Row, prompt: Conversation, column: str = "completion") -> str:
    before, completion = reply(need(row, column), column)
    if before and before != prompt:
        raise Problem(
            "completion does not continue the prompt",
            f'"{column}" holds {len(before) + 1} messages. A completion is one assistant message.',
        )
    return completion


def each(build: Callable[..., Record], *arguments: Iterator[Any] | list[Any]) -> Found:
    """``build`` on each tuple of arguments; what it refuses becomes a Problem in the sequence."""
    for given in zip(*arguments, strict=True):
        try:
            yield build(*given)
        except Problem as problem:
            yield problem


# -- pairs -----------------------------------------------------------------------------------------------------------


def preference(row: Row) -> Comparison:
    """TRL: ``prompt``, ``chosen``, ``rejected``; strings or messages."""
    pair = split.shared(prompt_column(row), need(row, "chosen"), need(row, "rejected"))
    return _comparison(row, pair)


def preference_implicit(row: Row) -> Comparison:
    """TRL without a prompt, and HH-RLHF transcripts: the prompt is what ``chosen`` and ``rejected`` share."""
    return _comparison(row, split.implicit(need(row, "chosen"), need(row, "rejected")))


def transcript_pair(row: Row) -> Comparison:
    """HH-RLHF: both sides are whole transcripts."""
    return _comparison(row, split.of_transcripts(text(row, "chosen"), text(row, "rejected")))


def transcript_prompt_pair(row: Row) -> Comparison:
    """HH-RLHF after somebody cut it: the prompt is a transcript, the sides are replies."""
    prompt = split.transcript_prompt(text(row, "prompt"))
    return _comparison(row, split.shared(prompt, need(row, "chosen"), need(row, "rejected")))


def sharegpt_pair(row: Row) -> Comparison:
    """LLaMA-Factory: ``conversations`` and two single messages."""
    return _comparison(row, split.shared(conversations_column(row), need(row, "chosen"), need(row, "rejected")))


def alpaca_pair(row: Row) -> Comparison:
    """LLaMA-Factory: ``instruction``, ``input``, ``chosen``, ``rejected``."""
    return _comparison(row, split.shared(instruction_columns(row), need(row, "chosen"), need(row, "rejected")))


def swift_pair(row: Row) -> Comparison:
    """ms-swift: ``messages`` end in the chosen reply, ``rejected_response`` is the other one."""
    prompt, chosen = reply(items(row, "messages"), "messages")
    return _comparison(row, split.shared(prompt, chosen, need(row, "rejected_response")))


def coded_pair(row: Row) -> Comparison:
    """Two completions and who won; the code is already a word. Without a prompt column it is what both share."""
    first, second, winner = need(row, "first"), need(row, "second"), need(row, "preference")
    match winner:
        case "first" | "tie":
            chosen, rejected = first, second
        case "second":
            chosen, rejected = second, first
        case unknown:
            raise ValueError(f"{unknown!r} is not a translated label")  # labels.py lets nothing else through
    if row.get("prompt") is None:
        prompt, chosen, rejected = split.implicit(chosen, rejected)
    else:  # AlpacaFarm's prompt is an instruction with an input beside it
        asked = instruction_columns({**row, "instruction": row["prompt"]}) if row.get("input") else prompt_column(row)
        prompt, chosen, rejected = split.shared(asked, chosen, rejected)
    return Comparison(prompt, chosen, rejected, tie=winner == "tie", strength=_strength(row))


def _comparison(row: Row, pair: split.Pair) -> Comparison:
    return Comparison(*pair, tie=flag(row, "tie", "is_tie"), strength=_strength(row))


# -- thumbs, scores, rankings ----------------------------------------------------------------------------------------


def thumb(row: Row) -> Thumb:
    """``prompt``, ``completion``, and a label that is already a word."""
    prompt = prompt_column(row)
    return Thumb(prompt, _completion(row, prompt), row["label"] == "desirable")


def messages_thumb(row: Row) -> Thumb:
    """``messages`` whose last one is the reply, and a label."""
    return Thumb(*reply(items(row, "messages"), "messages"), row["label"] == "desirable")


def conversations_thumb(row: Row) -> Thumb:
    """``conversations`` whose last one is the reply, and a label (``kto_tag``)."""
    prompt, completion = reply(items(row, "conversations"), "conversations")
    return Thumb(_system(row) + prompt, completion, row["label"] == "desirable")


def alpaca_thumb(row: Row) -> Thumb:
    """``instruction``, ``input``, ``output`` and a label (``kto_tag``)."""
    return Thumb(instruction_columns(row), text(row, "output"), row["label"] == "desirable")


def score(row: Row) -> Score:
    """``prompt``, ``completion``, ``score``."""
    prompt = prompt_column(row)
    return Score(prompt, _completion(row, prompt), number(row, "score"))


def messages_score(row: Row) -> Score:
    """``messages`` whose last one is the reply, and a score."""
    return Score(*reply(items(row, "messages"), "messages"), number(row, "score"))


def score_list(row: Row) -> Found:
    """``prompt``, ``completions``, ``scores``: one score per completion, a null one is a problem of its own."""
    prompt, completions, scores = prompt_column(row), items(row, "completions"), items(row, "scores")
    if len(completions) != len(scores):
        raise Problem(
            "scores do not fit completions",
            f"there are {len(completions)} completions and {len(scores)} scores. Give one score for each.",
        )
    return each(lambda c, s: Score(prompt, reply(c, "completions")[1], as_number(s, "scores")), completions, scores)


def ranking(row: Row) -> Ranking:
    """``prompt``, ``completions``, ``ranks``: 1 is best, equal ranks are ties; ``scores`` beside them where known."""
    ranks = [as_number(rank, "ranks") for rank in items(row, "ranks")]
    if not all(rank.is_integer() for rank in ranks):
        raise Problem('wrong type in "ranks"', f'"ranks" is {ranks}, expected whole numbers. For scores use "scores".')
    completions = tuple(reply(item, "completions")[1] for item in items(row, "completions"))
    scores = None if row.get("scores") is None else tuple(as_number(score, "scores") for score in items(row, "scores"))
    return Ranking(prompt_column(row), completions, tuple(int(rank) for rank in ranks), scores)


def stepwise(row: Row) -> Solution:
    """TRL's stepwise supervision: ``prompt``, ``completions`` that are the steps of one solution, ``labels`` of each."""
    return _solution(row, "completions")


def _solution(row: Row, column: str) -> Solution:
    steps = tuple(text({column: step}, column) for step in items(row, column))
    labels = (float(v) if isinstance(v, bool) else as_number(v, "labels") for v in items(row, "labels"))
    return Solution(prompt_column(row), steps, tuple(labels))


# -- demonstrations and prompts --------------------------------------------------------------------------------------


def demonstration(row: Row) -> Demonstration:
    """``prompt``, ``completion``."""
    prompt = prompt_column(row)
    return Demonstration(prompt, _completion(row, prompt))


def question_answer(row: Row) -> Demonstration:
    """``question``, ``answer``: GSM8K and many others."""
    return Demonstration(conversation(text(row, "question"), "question"), text(row, "answer"))


def messages_demonstration(row: Row) -> Demonstration:
    """``messages``: the last one, from the assistant, is the completion."""
    return Demonstration(*reply(items(row, "messages"), "messages"))


def conversations_demonstration(row: Row) -> Demonstration:
    """sharegpt: ``conversations``, the last one, from the assistant, is the completion."""
    prompt, completion = reply(items(row, "conversations"), "conversations")
    return Demonstration(_system(row) + prompt, completion)


def alpaca_demonstration(row: Row) -> Demonstration:
    """``instruction``, ``input``, ``output``."""
    return Demonstration(instruction_columns(row), text(row, "output"))


def seed_task(row: Row) -> Found:
    """self-instruct: one ``instruction``, several ``instances`` of input and output."""

    def build(instance: Any) -> Demonstration:
        if not isinstance(instance, dict):
            raise Problem('wrong type in "instances"', f'"instances" holds {type(instance).__name__}, expected a dict.')
        return Demonstration(instruction_columns({**row, "input": instance.get("input")}), text(instance, "output"))

    return each(build, items(row, "instances"))


def prompt_only(row: Row) -> Prompt:
    """``prompt`` and nothing that was said about it."""
    return Prompt(prompt_column(row))


# -- trimtab's own ---------------------------------------------------------------------------------------------------


def canonical(row: Row) -> Record:
    """A line written by :func:`trimtab.feedback.read.write`: the inverse of ``Record.to_json``."""
    prompt = conversation(items(row, "prompt"), "prompt")
    match text(row, "kind"):
        case "comparison":
            strength = None if row.get("strength") is None else number(row, "strength")
            target = None if row.get("target") is None else text(row, "target")
            return Comparison(prompt, text(row, "chosen"), text(row, "rejected"), flag(row, "tie"), strength, target)
        case "thumb":
            need(row, "desirable")
            return Thumb(prompt, text(row, "completion"), flag(row, "desirable"))
        case "ranking":
            return ranking({**row, "completions": items(row, "ranked")})
        case "score":
            return Score(prompt, text(row, "completion"), number(row, "score"))
        case "solution":
            return _solution(row, "steps")
        case "demonstration":
            return Demonstration(prompt, text(row, "completion"))
        case "prompt":
            return Prompt(prompt)
        case unknown:
            raise Problem("unknown kind", f'"kind" is "{unknown}". Known: {", ".join(KINDS)}.')
