"""Where a prompt that nobody marked ends: at a message, a turn, a word; never inside one (PAINS, row 6)."""

from __future__ import annotations

import pytest

from trimtab.feedback import split
from trimtab.feedback.records import Message
from trimtab.feedback.rows import Problem


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "replies"),
    [
        ("The sky is blue.", "The sky is bright.", "The sky is", (" blue.", " bright.")),
        ("Q: a?\nA: yes", "Q: a?\nA: no", "Q: a?\nA:", (" yes", " no")),
        ("Question?\nblue", "Question?\ngreen", "Question?\n", ("blue", "green")),
        ("天空是什么颜色？蓝色", "天空是什么颜色？绿色", "天空是什么颜色？", ("蓝色", "绿色")),
        ("It costs 3.14 now", "It costs 3.15 now", "It costs", (" 3.14 now", " 3.15 now")),
    ],
)
def test_strings_are_cut_where_a_word_ends(chosen, rejected, prompt, replies):
    found = split.of_strings(chosen, rejected)
    assert found == ((Message("user", prompt),), *replies)
    assert (prompt + found[1], prompt + found[2]) == (chosen, rejected)  # nothing is lost


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        ("The sky is blue", "The sky is blue and vast", "one text is the beginning of the other"),
        ("The sky is blue  ", "The sky is blue and vast", "one text is the beginning of the other"),
        ("Paris ", "London", "they share no whole word at the start"),
        ("Parisian", "Paris is", "they share no whole word at the start"),
        ("天空是蓝色", "天空是绿色", "they share no whole word at the start"),
        (" a", " b", "they share no whole word at the start"),
    ],
)
def test_strings_without_a_safe_boundary_are_refused(chosen, rejected, why):
    with pytest.raises(Problem) as refused:
        split.of_strings(chosen, rejected)
    assert refused.value.reason == "no safe boundary between prompt and completions"
    assert str(refused.value) == (
        f'there is no "prompt", and it cannot be found in "chosen" and "rejected": {why}. Add a "prompt" column.'
    )


def test_equal_strings_are_an_identical_pair_not_a_missing_boundary():
    with pytest.raises(Problem, match=r'"chosen" equals "rejected" after stripping whitespace \(both 3 characters\)'):
        split.implicit("a b", "a b\n")


def test_no_boundary_is_ever_inside_a_word():
    words = ["sun", "sunny", "sunset", "sea", "sea,", "see"]
    texts = [f"{a} {b} {c}" for a in words for b in words for c in words]
    for chosen in texts[::7]:
        for rejected in texts[::5]:
            try:
                ((message,), first, second) = split.of_strings(chosen, rejected)
            except Problem:
                continue
            for text, rest in ((chosen, first), (rejected, second)):
                assert text == message.content + rest
                assert rest.startswith(" ")
                assert rest.strip()


def test_transcripts_are_cut_before_the_last_reply():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    prompt, chosen, rejected = split.implicit(start + " see you", start + " see that")
    assert [m.role for m in prompt] == ["user", "assistant", "user"]
    assert (chosen, rejected) == ("see you", "see that")


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        ("\n\nHuman: ho\n\nAssistant: b", "chosen and rejected do not share the prompt"),
        ("\n\nHuman: hi\n\nAssistant: b\n\nHuman: c", "last message not from the assistant"),
        ("hi b", "not a transcript"),
    ],
)
def test_transcripts_that_do_not_fit(rejected, reason):
    with pytest.raises(Problem) as refused:
        split.implicit("\n\nHuman: hi\n\nAssistant: a", rejected)
    assert refused.value.reason == reason


def test_messages_are_cut_before_the_last_one_only():
    def chat(*texts):
        return [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 3, texts, strict=False)]

    assert split.implicit(chat("p", "a"), chat("p", "b")) == ((Message("user", "p"),), "a", "b")
    with pytest.raises(Problem, match="differ in the messages before the last reply"):
        split.implicit(chat("p", "a", "q", "c"), chat("p", "b", "q", "d"))
    with pytest.raises(Problem, match="differ in the messages before the last reply"):
        split.implicit(chat("p", "a"), chat("p", "a", "q", "d"))
