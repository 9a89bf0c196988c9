"""Records to tokens: where the prompt ends, how an answer ends, what is cut, and that everything is counted."""

from __future__ import annotations

from functools import cache
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from tests.tiny_folder import EOS
from tests.tiny_folder import tokenizer as tiny_tokenizer
from trimtab.errors import ModelError, TokenError
from trimtab.feedback.records import Comparison, Demonstration, Message, Origin, Ranking, Thumb
from trimtab.models import load_tokenizer
from trimtab.tokens.show import show, spans
from trimtab.tokens.template import MIN_PROMPT, RowRefused, Template, tokenize

STRADDLED = "a token straddled the boundary: prompt and completion were tokenised apart"
REWRITTEN = "the template rewrote the prompt once answered: the answer was put after the prompt as asked"
UNICODE = [
    "Größe µm",
    "好的，谢谢。",
    "مرحبا \u202eabc\u202c",
    "e\u0301 é",
    "👩‍👩‍👧 🇩🇪",
    "a\u200bb\ufeff",
    "\0\x07\x7f",
    "tab\there\r\n\n",
]


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def answer(prompt: str, text: str) -> Demonstration:
    return Demonstration(user(prompt), text)


def with_template(text: str) -> Any:
    words = tiny_tokenizer()
    words.chat_template = text
    return words


def metaspace(scheme: str, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece: spaces are ▁, and ``always`` puts one before every text it is given."""
    found = ["<unk>", "<s>", "</s>", "▁", *"abcdefgh .:?", "ab", "▁ab", "▁a"]
    words = Tokenizer(
        token_models.BPE(
            vocab={p: i for i, p in enumerate(dict.fromkeys(found))},
            merges=[("▁", "a"), ("a", "b"), ("▁a", "b")],
            unk_token="<unk>",
        )
    )
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    words.decoder = decoders.Metaspace(prepend_scheme=scheme)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@cache
def smollm2() -> Any:
    try:
        return load_tokenizer("smollm2")
    except ModelError as e:
        pytest.skip(f"SmolLM2 is not there: {e}")


# --- the boundary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [tiny_tokenizer, smollm2], ids=["tiny", "smollm2"])
@pytest.mark.parametrize("text", UNICODE)
def test_prompt_is_what_is_served_and_the_whole_is_one_tokenisation(words: Any, text: str) -> None:
    """Served prompt ids = training's prompt ids; prompt + answer = the tokens of the whole rendered conversation."""
    words = words()
    template = Template(words)
    record = answer(f"Q {text}", f"A {text}")
    example = template.encode(record)
    turns = [{"role": "user", "content": f"Q {text}"}, {"role": "assistant", "content": f"A {text}"}]
    served = words.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(example.prompt) == template.prompt_ids(record.prompt) == served
    whole = words.apply_chat_template(turns, return_dict=True)["input_ids"]
    ours = [*example.prompt, *example.completions[0]]
    assert ours == whole[: len(ours)] and set(whole[len(ours) :]) <= {words.encode("\n")[-1]}
    assert example.completions[0].count(words.eos_token_id) == 1 and example.completions[0][-1] == words.eos_token_id
    assert words.decode(example.completions[0][:-1]) == f"A {text}"
    assert not template.repaired


def test_conversation_with_system_message_and_several_turns() -> None:
    words = smollm2()
    prompt = tuple(
        Message(r, c) for r, c in [("system", "Be brief."), ("user", "1?"), ("assistant", "2"), ("user", "3?")]
    )
    example = Template(words).encode(Comparison(prompt, "4", "5"))
    assert words.decode(example.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [words.decode(c) for c in example.completions] == ["4<|im_end|>", "5<|im_end|>"]  # earlier turns are context


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize(
    ("prompt", "text", "straddles"),
    [
        ("a", "b", True),
        ("a", "c", False),
        ("a ", " b", False),
        ("a:", "ab", False),
        ("a ", "ab", True),
        ("h?", "abc", False),
    ],
)
def test_a_straddling_token_is_repaired_without_changing_the_text(
    scheme: str, prompt: str, text: str, straddles: bool
) -> None:
    """The merge a+b would reach over the boundary. Generation starts from the prompt's own tokens, so training does; and
    a tokenizer that puts a space before every text must not put one into the middle of this one."""
    words = metaspace(scheme)
    template = Template(words, "plain")
    example = template.encode(answer(prompt, text))
    assert list(example.prompt) == template.prompt_ids(user(prompt)) == words(prompt)["input_ids"]
    ids = [*example.prompt, *example.completions[0]]
    assert words.decode(ids, skip_special_tokens=True) == prompt + text
    assert template.repaired == ({STRADDLED: 1} if straddles else {})


def test_a_straddling_token_of_a_real_tokenizer() -> None:
    """ "un" + "believable": SmolLM2 has one token for the word's beginning that reaches over the boundary."""
    words = smollm2()
    template = Template(words, "plain")
    found = 0
    for prompt, text in (("un", "believable"), ("Answer: ", "Paris"), ("2 + 2 =", " 4"), ("to", "day")):
        example = template.encode(answer(prompt, text))
        assert words.decode([*example.prompt, *example.completions[0][:-1]]) == prompt + text
        assert list(example.prompt) == words(prompt)["input_ids"]
        found += list(example.prompt) != words(prompt + text)["input_ids"][: len(example.prompt)]
    assert template.repaired == {STRADDLED: found} and found >= 2


def test_both_completions_share_one_prompt_even_where_only_one_straddles() -> None:
    template = Template(metaspace("never"), "plain")
    example = template.encode(Comparison(user("a"), "b", "c"))
    assert [template.tokenizer.decode([*example.prompt, *c]) for c in example.completions] == ["ab</s>", "ac</s>"]
    assert template.repaired == {STRADDLED: 1}


def test_a_template_that_rewrites_the_prompt_once_answered() -> None:
    """In the manner of Qwen3: an open turn ends in an empty thought, an answered one has none. Trained is what is asked."""
    text = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}<think></think>{% endif %}"
    )
    words = with_template(text)
    template = Template(words)
    example = template.encode(answer("Why?", "Because."))
    assert words.decode(example.prompt) == "<|user|>Why?<|assistant|><think></think>"
    assert words.decode(example.completions[0]) == "Because.</s>"
    assert template.repaired == {REWRITTEN: 1}


def test_a_template_that_changes_the_answer_is_refused() -> None:
    shouts = (
        "{% for m in messages %}{{ '[' if add_generation_prompt else '(' }}{{ m['content'] | upper }}{{ eos_token }}"
    )
    template = Template(with_template(shouts + "{% endfor %}"))
    with pytest.raises(RowRefused, match="prompt is not a prefix of prompt \\+ completion under the chat template"):
        template.encode(answer("a", "b"))


def test_a_template_that_refuses_is_counted_with_its_own_words() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system messages.') }}{% endif %}"
    strict += "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    system = Demonstration((Message("system", "s"), Message("user", "u")), "a", origin=Origin("f", 2))
    kept, report = tokenize([answer("u", "a"), system], Template(with_template(strict)), max_length=64)
    assert len(kept) == 1 and report.examples == {
        "the chat template refused the conversation: No system messages.": ["f row 2"]
    }


# --- the end of an answer ---------------------------------------------------------------------------------------------

OPEN_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_an_end_is_trained_exactly_once() -> None:
    words = tiny_tokenizer()
    for mode in ("chat", "plain"):
        for how in ("template", "append"):
            ids = Template(words, mode, how).encode(answer("a", "b")).completions[0]
            assert ids[-1] == words.eos_token_id and ids.count(words.eos_token_id) == 1


def test_a_template_without_an_end() -> None:
    words = with_template(OPEN_END)
    with pytest.raises(
        TokenError, match=r"ends an answer without an end-of-sequence token \(\[1\]\): the model would never"
    ):
        Template(words).encode(answer("a", "b"))
    ids = Template(words, eos="append").encode(answer("a", "b")).completions[0]
    assert ids[-1] == words.eos_token_id and words.decode(ids).endswith("b\n</s>")


def test_another_end_that_the_generation_config_names() -> None:
    """Gemma ends a turn with a token that is not the tokenizer's eos."""
    words = with_template(OPEN_END.replace("\n", "<|system|>"))
    other = words.convert_tokens_to_ids("<|system|>")
    ids = Template(words, eos_ids=[other]).encode(answer("a", "b")).completions[0]
    assert ids[-1] == other


def test_what_a_template_writes_after_the_end_is_not_trained() -> None:
    words = with_template("{% for m in messages %}{{ m['content'] }}{{ eos_token }}\n\n{% endfor %}")
    assert words.decode(Template(words).encode(answer("a", "b")).completions[0]) == "b</s>"


def test_no_end_at_all() -> None:
    words = tiny_tokenizer()
    words.eos_token = None
    with pytest.raises(
        TokenError, match=r"has no end-of-sequence token: a model trained without one never stops\. Set tok"
    ):
        Template(words)


# --- plain mode and the beginning -------------------------------------------------------------------------------------


def closed(words: Any) -> Any:
    """The same tokenizer, made to open and close every text as BERT's and some Llamas' do."""
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", words.bos_token_id), ("</s>", words.eos_token_id)]
    )
    return words


def test_plain_mode_is_the_text_as_it_is() -> None:
    words = tiny_tokenizer()
    example = Template(words, "plain").encode(answer("Once upon", " a time"))
    assert words.decode(example.prompt) == "Once upon" and words.decode(example.completions[0]) == " a time</s>"


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt() -> None:
    words = closed(tiny_tokenizer())
    example = Template(words, "plain").encode(answer("ab", "cd"))
    assert words.decode(example.prompt) == "<s>ab" and words.decode(example.completions[0]) == "cd</s>"
    straddling = Template(closed(metaspace("always")), "plain")
    example = straddling.encode(answer("a", "b"))
    assert straddling.tokenizer.decode([*example.prompt, *example.completions[0]]) == "<s> ab</s>"
    assert straddling.repaired == {STRADDLED: 1}


def test_the_chat_template_is_not_opened_a_second_time() -> None:
    words = closed(tiny_tokenizer())  # the template writes <s> itself
    ids = Template(words).prompt_ids(user("a"))
    assert ids.count(words.bos_token_id) == 1 and ids[-1] != words.eos_token_id


def test_double_beginning() -> None:
    twice = with_template("{{ bos_token }}" + tiny_tokenizer().chat_template)
    with pytest.raises(
        TokenError, match=r"two beginning-of-sequence tokens \('<s>', ids \[0, 0, .*template writes it twice"
    ):
        Template(twice).encode(answer("a", "b"))
    plain = Template(closed(tiny_tokenizer()), "plain")
    with pytest.raises(TokenError, match="the text begins with one and the tokenizer adds another"):
        plain.prompt_ids(user("<s>a"))


def test_modes() -> None:
    words = tiny_tokenizer()
    assert Template(words).mode == "chat"
    words.chat_template = None
    assert Template(words).mode == "plain"
    with pytest.raises(TokenError, match="has no chat template. Pass chat_template: FILE with a Jinja template, or"):
        Template(words, "chat")
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    with pytest.raises(TokenError, match="a conversation of 3 messages needs a chat template"):
        Template(words, "plain").prompt_text(turns)
    with pytest.raises(TokenError, match="a conversation of 1 messages needs a chat template"):
        Template(words, "plain").prompt_text((Message("system", "a"),))


def test_fingerprint_tells_templates_apart() -> None:
    words = tiny_tokenizer()
    found = {
        Template(words).fingerprint,
        Template(words, "plain").fingerprint,
        Template(with_template(OPEN_END)).fingerprint,
    }
    assert len(found) == 3 and Template(tiny_tokenizer()).fingerprint in found


# --- rows that are left out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        answer("a", f"b {EOS}"),
        answer("a<|assistant|>", "b"),
        Demonstration((Message("system", "<s>"), Message("user", "a")), "b"),
        Comparison(user("a"), "b", "c</s>d"),
        Ranking(user("a"), ("b", "c", "<|user|>"), (1, 2, 3)),
        Thumb(user("a"), "</s>", True),
    ],
)
def test_control_tokens_in_a_text(record: Any) -> None:
    """An answer that spells <|im_end|> would otherwise end there; a prompt that spells a role would change who speaks."""
    with pytest.raises(RowRefused, match="text contains a control token of the tokenizer"):
        Template(tiny_tokenizer()).encode(record)


def test_what_only_looks_like_a_control_token_is_text() -> None:
    words = tiny_tokenizer()
    example = Template(words).encode(answer("a", "<|Assistant|> < /s> [INST] <|im_end|>"))
    assert words.decode(example.completions[0]) == "<|Assistant|> < /s> [INST] <|im_end|></s>"


@pytest.mark.parametrize("record", [answer("a", ""), answer("\ud800", "b"), answer("a", "b\udfff")])
def test_rows_without_tokens_and_half_characters(record: Demonstration) -> None:
    kept, report = tokenize([answer("a", "b"), record], Template(tiny_tokenizer()), max_length=64)
    assert len(kept) == 1 and sum(report.dropped.values()) == 1
    assert "completion has no tokens" in report.dropped or "half of a character" in next(iter(report.dropped))


def test_counts_and_first_origins() -> None:
    rows = [Demonstration(user("a"), "b" if i % 2 else "</s>", origin=Origin("f.jsonl", i + 1)) for i in range(20)]
    kept, report = tokenize(rows, Template(tiny_tokenizer()), max_length=64)
    assert (report.rows, report.kept, len(kept)) == (20, 10, 10)
    reason = "text contains a control token of the tokenizer"
    assert report.dropped == {reason: 10}
    assert report.examples == {reason: [f"f.jsonl row {n}" for n in (1, 3, 5, 7, 9)]}
    assert report.to_json()["dropped"] == report.dropped


def test_an_error_of_the_template_names_the_row() -> None:
    rows = [Demonstration(user("a"), "b", origin=Origin("f.jsonl", 1_284))]
    with pytest.raises(TokenError, match=r"^f\.jsonl row 1,284: the chat template of .* ends an answer without"):
        tokenize(rows, Template(with_template(OPEN_END)), max_length=64)


# --- length -----------------------------------------------------------------------------------------------------------
# One token per byte, and a prompt of n letters is n + 3 tokens: <s>, <|user|>, the letters, <|assistant|>.


def sized(prompt: int, *completions: int) -> Any:
    texts = ["x" * n for n in completions]
    return Comparison(user("p" * prompt), texts[0], texts[1] + "y") if len(texts) == 2 else answer("p" * prompt, *texts)


def lengths(example: Any) -> tuple[int, ...]:
    return (len(example.prompt), *(len(c) for c in example.completions))


def test_a_row_that_just_fits_is_left_alone() -> None:
    for how in ("drop", "prompt", "completion"):
        kept, report = tokenize([sized(10, 6)], Template(tiny_tokenizer()), max_length=20, truncation=how)
        assert [lengths(e) for e in kept] == [(13, 7)]
        assert (report.truncated_rows, report.tokens_lost, report.eos_lost, report.dropped) == (0, {}, {}, {})


def test_drop_leaves_long_rows_out_whole() -> None:
    rows = [sized(10, 6)] * 9 + [sized(10, 7)]
    kept, report = tokenize(rows, Template(tiny_tokenizer()), max_length=20, truncation="drop")
    assert len(kept) == 9 and report.dropped == {"longer than max_length (20 tokens)": 1}
    assert report.truncated_rows == 0


def test_prompt_cuts_the_beginning_alike_for_all_completions() -> None:
    words = tiny_tokenizer()
    rows = [Comparison(user("abcdefghijklm"), "x" * 9, "x" * 3)]
    kept, report = tokenize(rows, Template(words), max_length=20, truncation="prompt", max_truncated=1)
    assert lengths(kept[0]) == (10, 10, 4) and words.decode(kept[0].prompt) == "efghijklm<|assistant|>"
    assert report.tokens_lost == {"prompt": 6} and report.truncated_rows == 1 and report.eos_lost == {}
    assert all(c[-1] == words.eos_token_id for c in kept[0].completions)


def test_prompt_leaves_out_what_would_lose_nearly_all_of_its_prompt() -> None:
    rows = [sized(10, 18 - MIN_PROMPT), sized(10, 20 - MIN_PROMPT), sized(10, 19 - MIN_PROMPT)]
    kept, report = tokenize(rows, Template(tiny_tokenizer()), max_length=20, truncation="prompt", max_truncated=1)
    assert [lengths(e)[0] for e in kept] == [9, 8] and report.dropped == {"longer than max_length (20 tokens)": 1}


def test_completion_cuts_the_end_and_counts_what_that_costs_per_side() -> None:
    words = tiny_tokenizer()
    rows = [sized(10, 9, 2), sized(10, 9, 11), sized(10, 2, 2)]
    kept, report = tokenize(rows, Template(words), max_length=20, truncation="completion", max_truncated=1)
    assert [lengths(e) for e in kept] == [(13, 7, 4), (13, 7, 7), (13, 3, 4)]
    assert report.truncated_rows == 2
    assert report.tokens_lost == {"chosen": 3 + 3, "rejected": 6} and report.eos_lost == {"chosen": 2, "rejected": 1}
    ends = [[c[-1] == words.eos_token_id for c in e.completions] for e in kept]
    assert ends == [[False, True], [False, False], [True, True]]


def test_completion_leaves_out_rows_whose_prompt_fills_everything() -> None:
    kept, report = tokenize(
        [sized(10, 2), sized(16, 2)],
        Template(tiny_tokenizer()),
        max_length=20,
        truncation="completion",
        max_truncated=1,
    )
    assert len(kept) == 1 and report.dropped == {"longer than max_length (20 tokens)": 1}


@pytest.mark.parametrize(
    ("how", "fate", "choice"),
    [
        ("drop", "2 would be left out", " choose truncation: prompt or completion,"),
        ("prompt", "1 would be left out, 1 cut", ""),
        ("completion", "2 cut", ""),
    ],
)
def test_too_many_long_rows(how: Any, fate: str, choice: str) -> None:
    rows = [sized(10, 6)] * 6 + [sized(10, 7), sized(10, 20)]
    with pytest.raises(TokenError) as caught:
        tokenize(rows, Template(tiny_tokenizer()), max_length=20, truncation=how, max_truncated=0.2)
    assert str(caught.value) == (
        f"2 of 8 rows (25%) are longer than max_length 20: {fate}; at most 20% is allowed. Raise max_length,{choice} "
        "or accept it with a larger max_truncated."
    )
    kept, _ = tokenize(rows, Template(tiny_tokenizer()), max_length=20, truncation=how, max_truncated=0.25)
    assert len(kept) == {"drop": 6, "prompt": 7, "completion": 8}[how]


def test_nothing_left() -> None:
    rows = [Demonstration(user("a"), "</s>", origin=Origin("f.jsonl", 3))]
    with pytest.raises(TokenError) as caught:
        tokenize(rows, Template(tiny_tokenizer()), max_length=64)
    assert str(caught.value) == (
        "no row is left to train on, of 1: 1 × text contains a control token of the tokenizer (e.g. f.jsonl row 3). "
        "Correct the rows or the chat template; `trimtab data show` shows what becomes of a row."
    )
    with pytest.raises(TokenError, match="no row is left to train on, of 0: the file has none"):
        tokenize([], Template(tiny_tokenizer()), max_length=64)


def test_lengths_are_reported_per_side() -> None:
    rows = [sized(10, 2, 4), sized(12, 3, 5)]
    _, report = tokenize(rows, Template(tiny_tokenizer()), max_length=64)
    assert report.lengths == {
        "prompt": {"mean": 14.0, "median": 15.0, "p99": 15.0, "max": 15.0},
        "chosen": {"mean": 3.5, "median": 4.0, "p99": 4.0, "max": 4.0},
        "rejected": {"mean": 6.5, "median": 7.0, "p99": 7.0, "max": 7.0},
    }


def test_repairs_are_counted_per_call() -> None:
    template = Template(metaspace("never"), "plain")
    for _ in range(2):
        _, report = tokenize([answer("a", "b")], template, max_length=64)
        assert report.repaired == {STRADDLED: 1}


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", UNICODE)
def test_pieces_join_to_the_text(text: str) -> None:
    for words in (tiny_tokenizer(), smollm2(), metaspace("always")):
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert "".join(text for text, _, _ in spans(ids, words)) == words.decode(
            ids, clean_up_tokenization_spaces=False
        )


def test_what_is_shown_is_what_is_trained() -> None:
    words = tiny_tokenizer()
    example = Template(words).encode(
        Comparison(user("Größe?"), "好 b", "c\nd", tie=True, origin=Origin("f[b].jsonl", 1))
    )
    options: dict[str, Any] = {"width": 100, "force_terminal": True, "color_system": "truecolor"}
    console = Console(record=True, file=StringIO(), **options)
    console.print(show(example, words))
    text = console.export_text()
    assert f"chosen ({len(example.completions[0])} tokens trained) 好 b</s>" in text and "c⏎" in text
    assert "f[b].jsonl row 1 · prompt" in text and "· tie" in text and "<s><|user|>Größe?<|assistant|>" in text
