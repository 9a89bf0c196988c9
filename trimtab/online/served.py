"""Answers of a server that speaks OpenAI's ``/completions`` with token ids as prompt: vLLM, SGLang, llama.cpp.

Every answer is a request of its own, with a seed that depends on the round, the prompt and the answer's place alone: asked for n
at once under a seed, SGLang can give n copies of one. The prompt that a prompt's answers share is in the server's prefix cache.

The server is asked for what the policy would write: no top-k, no top-p, no penalties, whatever its own defaults are. An answer's
token ids are those that the server names; where it names none, those of its tokens' texts; where it tells no tokens either, those
of the whole text, tokenised again. The last have no log-probs (``Answer.logps`` is empty); a log-prob that is not told is NaN.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import shlex
import subprocess
from array import array
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.errors import ModelError
from trimtab.judges.backend import Endpoint
from trimtab.online.sample import Answer

AT_ONCE = 256  # requests on their way: servers batch them
TIMEOUT = 600.0  # seconds for an answer, or for new weights
RETRIES = 5  # of a request that timed out, found no server or a busy or failing one; pauses double from half a second to eight
SERVERS = ("sglang", "vllm")  # which are told of new weights by themselves
FOLDER = "{folder}"  # in a command, the folder of the new weights


@dataclass
class Served:
    """The policy behind ``URL/completions``.

    Args:
        url: up to and including ``/v1``.
        model: its name there.
        reload: how the server gets new weights: one of :data:`SERVERS`, a command with ``{folder}`` (no shell: words as a shell
            would split them), or None where it keeps its own.
    """

    url: str
    model: str
    reload: str | None = None

    def __post_init__(self) -> None:
        self._endpoint = Endpoint(self.url, self.model, timeout=TIMEOUT)  # whose client lives as long as it does

    def sample(
        self,
        stop: Collection[int],
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        per_prompt: int = 1,
        max_new_tokens: int,
        seed: int,
        temperature: float = 1.0,
    ) -> list[list[Answer]]:
        """``per_prompt`` answers to each prompt, as :func:`trimtab.online.sample.sample` gives them.

        Args:
            stop: the ids that end an answer.

        Raises:
            ModelError: the server is away or refuses, or tells too little to know what it sampled.
        """

        def one(asked: tuple[Sequence[int], int]) -> Answer:
            prompt, place = asked
            body = {
                "model": self.model,
                "prompt": list(prompt),
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed_of(prompt, place, seed),
                "stop_token_ids": sorted(stop),
                "logprobs": 1,
                "return_token_ids": True,  # vLLM, SGLang
                "return_tokens_as_token_ids": True,  # older ones of vLLM
                # a server's own defaults, and those of the model's generation config, are another distribution
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }
            reply = self._post("/completions", body)
            try:
                return read(json.loads(reply)["choices"][0], tokenizer, stop)
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as e:
                raise ModelError(
                    f"{self.url}/completions: a reply that is none of OpenAI's ({e!r}): {reply[:200]}. Expected choices "
                    "with text and finish_reason."
                ) from None

        assert self._client  # made here, not by each of the threads
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = iter(list(pool.map(one, [(p, k) for p in prompts for k in range(per_prompt)])))
        return [[next(found) for _ in range(per_prompt)] for _ in prompts]

    def load(self, folder: Path) -> None:
        """Have the server take these weights, and wait until it has. Raises :class:`ModelError` where it does not."""
        assert self.reload is not None
        if self.reload in SERVERS:
            for path, body in _requests(self.reload, str(folder)):
                self._post(self.url.rstrip("/").removesuffix("/v1") + path, body)
            return
        words = [w.replace(FOLDER, str(folder)) for w in shlex.split(self.reload)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except OSError as e:
            raise ModelError(f"sampler_reload: {words[0]} cannot be started ({e.strerror}). Name a program.") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-1000:]
            raise ModelError(
                f"sampler_reload: {shlex.join(words)} ended with {done.returncode}: {said or 'it said nothing'}. The server may "
                "have kept its old weights."
            )

    @cached_property
    def _client(self) -> Any:
        return self._endpoint.client.with_options(max_retries=RETRIES)

    def _post(self, path: str, body: Mapping[str, Any]) -> str:
        """What the server says to it, which may be nothing; ``path`` below :attr:`url`, or a whole address."""
        openai: Any = importlib.import_module("openai")
        where = path if path.startswith("http") else self.url.rstrip("/") + path
        try:
            return str(self._client.post(path, body=body, cast_to=str))
        except openai.APITimeoutError:
            raise ModelError(f"{where}: no reply in {TIMEOUT:g} s, asked {RETRIES + 1} times. Is it at work?") from None
        except openai.APIConnectionError as e:
            raise ModelError(
                f"{where}: no connection ({e.__cause__ or e}), tried {RETRIES + 1} times. Start the server, or check sampler; "
                "with save_every the run can then be resumed."
            ) from None
        except openai.APIStatusError as e:
            raise ModelError(
                f"{where}: http {e.status_code} for the model {self.model}: {str(e).splitlines()[0][:300]}. The server must take "
                "token ids as prompt; check sampler, sampler_model, and the key in OPENAI_API_KEY."
            ) from None


def _requests(server: str, folder: str) -> list[tuple[str, dict[str, Any]]]:
    """The requests, in order, after which the server has the weights of ``folder`` and no cache of the old ones."""
    match server:
        case "sglang":
            return [("/update_weights_from_disk", {"model_path": folder})]
        case "vllm":  # where VLLM_SERVER_DEV_MODE=1
            reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            return [("/collective_rpc", reload), ("/reset_prefix_cache", {})]
        case _:
            raise AssertionError(server)


def seed_of(prompt: Sequence[int], place: int, seed: int) -> int:
    """31 bits, which every server takes: another number for each answer, the same after a restart."""
    said = array("q", [seed, place, *prompt]).tobytes()
    return int.from_bytes(hashlib.blake2b(said, digest_size=4).digest(), "little") >> 1


def read(choice: Mapping[str, Any], tokenizer: Any, stop: Collection[int]) -> Answer:
    """One of the server's choices. An answer that came to its end has the token that ended it, told by the server or not."""
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise ModelError(f'the server ended an answer with finish_reason "{reason}"; expected stop or length.')
    ids, logps = _tokens(choice, tokenizer)
    end = next((i for i, t in enumerate(ids) if t in stop), None)
    if end is not None:  # what a server writes after it, which does not know this end, the policy never reads
        ids, logps = ids[: end + 1], logps[: end + 1]
    elif reason == "stop":
        matched = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM, SGLang
        ids = [*ids, matched if matched in stop else tokenizer.eos_token_id]
        logps = [*logps, math.nan] if logps else []
    if not ids:
        raise ModelError("the server gave an answer without a token that did not end. Is max_tokens known to it?")
    return Answer(tuple(ids), ids[-1] in stop, tuple(logps))


def _tokens(choice: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[float]]:
    """(token ids, a log-prob of each, or none at all where the ids are the text's, tokenised again)."""
    text, told = choice["text"], choice.get("logprobs") or {}
    content = told.get("content") or []  # llama.cpp
    words = told.get("tokens") or [c["token"] for c in content]
    ids = choice.get("token_ids") or [c["id"] for c in content if "id" in c]
    if not ids:
        found = [_id_of(word, tokenizer) for word in words]
        ids = [i for i in found if i is not None]
        if len(ids) < len(found) or _text(ids, tokenizer) != text:
            ids = []
    if ids:
        logps = told.get("token_logprobs") or [c.get("logprob") for c in content]
        known = [math.nan if v is None else float(v) for v in logps]
        return list(ids), known if len(known) == len(ids) else [math.nan] * len(ids)
    again = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if _text(again, tokenizer) != text:
        raise ModelError(
            "the server names neither token ids (return_token_ids: recent vLLM and SGLang) nor tokens that give its text "
            f"(logprobs), and the text does not survive being tokenised again: {text[:200]!r}. Use a server that names them."
        )
    return again, []


def _id_of(word: str, tokenizer: Any) -> int | None:
    """The token that a server writes as ``word``: ``token_id:17``, the text of a single token, or a name of the vocabulary."""
    if word.startswith("token_id:"):
        return int(word.removeprefix("token_id:"))
    alone = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(alone) == 1 and _text(alone, tokenizer) == word:  # first: a byte's name may be another character's text
        return int(alone[0])
    known = tokenizer.convert_tokens_to_ids(word)
    return None if known is None or known == tokenizer.unk_token_id else int(known)


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
