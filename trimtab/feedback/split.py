"""Where the prompt ends and the completions begin, when a row does not say so.

A boundary is only ever between messages, between turns of a transcript, or, for two plain strings, between words.
A character-level common prefix is not a prompt: ("The sky is blue", "The sky is blue and vast") would become the
completions "" and " and vast", and ("Paris ", "London") has none. Such rows are refused (see PAINS, row 6).
"""

from __future__ import annotations

import os.path
import re
from typing import Any

from trimtab.feedback.records import Conversation, Message
from trimtab.feedback.rows import Problem, identical, reply

Pair = tuple[Conversation, str, str]

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
# Chinese and Japanese put no space between words or after a sentence, but these marks never stand inside a word.
WIDE_MARKS = "。！？；：，、"


def shared(prompt: Conversation, chosen: Any, rejected: Any) -> Pair:
    """A pair whose prompt is given. The two sides are strings, or messages that may repeat the prompt before the reply.

    Where a side repeats the prompt with more before it (a system message, earlier turns), all of that is the prompt.
    """
    before_chosen, chosen = _answer(prompt, chosen, "chosen")
    before_rejected, rejected = _answer(prompt, rejected, "rejected")
    if before_chosen != before_rejected:
        raise _not_shared("messages before the last reply")
    return before_chosen, chosen, rejected


def implicit(chosen: Any, rejected: Any) -> Pair:
    """A pair without a prompt column: two message lists, two HH transcripts, or two strings with a common beginning."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return of_transcripts(chosen, rejected) if is_transcript(chosen) else of_strings(chosen, rejected)
    before_chosen, chosen = reply(chosen, "chosen")
    before_rejected, rejected = reply(rejected, "rejected")
    if before_chosen != before_rejected:
        raise _not_shared("messages before the last reply")
    return before_chosen, chosen, rejected


def is_transcript(value: Any) -> bool:
    """Whether a value is an HH-RLHF transcript: it starts with a blank line and ``Human:``."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def turns(transcript: str) -> Conversation:
    r"""The messages of ``"\n\nHuman: hi\n\nAssistant: hello"``, each stripped of the whitespace around it."""
    if not is_transcript(transcript):
        raise Problem("not a transcript", r'the text does not start with "\n\nHuman:" as the rows of this layout do.')
    parts = TURN.split(transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def of_transcripts(chosen: str, rejected: str) -> Pair:
    """The prompt is every turn before the last, which is the assistant's; it must be the same on both sides."""
    before_chosen, chosen = _last_reply(turns(chosen), "chosen")
    before_rejected, rejected = _last_reply(turns(rejected), "rejected")
    if before_chosen != before_rejected:
        raise _not_shared("turns before the last reply")
    return before_chosen, chosen, rejected


def of_strings(chosen: str, rejected: str) -> Pair:
    """The longest common beginning, cut back to the space, line break or wide mark that ends a word on both sides.

    Spaces at the cut go to the completions and line breaks to the prompt; nothing is removed, so that prompt plus
    completion is the text that was read. Refused when either text is the beginning of the other, because then every
    boundary is a guess, and when there is no word boundary at all.

    >>> of_strings("The sky is blue.", "The sky is green.")[1:]
    (' blue.', ' green.')
    """
    if chosen.strip() == rejected.strip():
        raise identical(chosen)
    common = os.path.commonprefix([chosen, rejected])
    if not chosen[len(common) :].strip() or not rejected[len(common) :].strip():
        raise _no_boundary("one text is the beginning of the other")
    cut = len(common)
    while cut and not (common[cut - 1].isspace() or common[cut - 1] in WIDE_MARKS):
        cut -= 1
    while cut and common[cut - 1] in " \t":
        cut -= 1
    if not common[:cut].strip():
        raise _no_boundary("they share no whole word at the start")
    return (Message("user", common[:cut]),), chosen[cut:], rejected[cut:]


def _answer(prompt: Conversation, value: Any, name: str) -> tuple[Conversation, str]:
    before, completion = reply(value, name)
    if not before:
        return prompt, completion
    if _stripped(before)[-len(prompt) :] == _stripped(prompt):
        return before, completion
    raise Problem(
        "completion does not continue the prompt",
        f'"{name}" holds {len(before) + 1} messages that do not repeat "prompt". A completion is one message.',
    )


def _stripped(messages: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in messages]


def _last_reply(messages: Conversation, name: str) -> tuple[Conversation, str]:
    return reply([{"role": message.role, "content": message.content} for message in messages], name)


def _not_shared(where: str) -> Problem:
    return Problem(
        "chosen and rejected do not share the prompt",
        f'"chosen" and "rejected" differ in the {where}, so they answer different prompts. Drop the row.',
    )


def _no_boundary(why: str) -> Problem:
    return Problem(
        "no safe boundary between prompt and completions",
        f'there is no "prompt", and it cannot be found in "chosen" and "rejected": {why}. Add a "prompt" column.',
    )


def transcript_prompt(value: str) -> Conversation:
    r"""The turns of a prompt such as ``"\n\nHuman: hi\n\nAssistant:"``; the empty last turn is where replies begin."""
    messages = turns(value)
    if messages and messages[-1] == Message("assistant", ""):
        return messages[:-1]
    return messages
