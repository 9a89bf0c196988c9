"""Reference log-probs on disk, per token, keyed by content.

The folder's name is a fingerprint of everything that a number depends on (weights, adapter, precision, layout); a row's
key is a hash of the exact token ids, so tokenizer, template and truncation are in it too. A changed row misses; a stale
number cannot be served. One cache serves every method, seed and sweep over the same data.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.errors import CacheError


def weights_hash(model: nn.Module, skip: Sequence[str] = ("lora_",)) -> str:
    """Hash of all parameters and buffers but those whose name holds one of ``skip`` (a switched-off adapter)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not any(s in name for s in skip):
            # names differ with and without peft's wrappers, weights do not
            flat = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
            digest.update(name.removeprefix("base_model.model.").replace(".base_layer", "").encode())
            digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


class LogpCache:
    """completion key (16 bytes) -> [T] token log-probs. Shards are written whole, then renamed: no half entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[bytes, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("*.safetensors")):
            try:
                self._load(shard)
            except (SafetensorError, KeyError, RuntimeError) as e:
                raise CacheError(f"{shard} is damaged ({e}). Delete it: its rows will be scored again.") from e

    def _load(self, shard: Path) -> None:
        data = load_file(shard)
        keys = data["keys"].numpy()
        for key, logps in zip(keys, data["logps"].split(data["lengths"].tolist()), strict=True):
            self.table[key.tobytes()] = logps

    def __contains__(self, key: bytes) -> bool:
        return key in self.table

    def __len__(self) -> int:
        return len(self.table)

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """[N] token log-probs of these completions end to end; :class:`CacheError` where one is missing."""
        missing = sum(k not in self.table for k in keys)
        if missing:
            raise CacheError(
                f"the reference cache {self.folder} lacks {missing} of {len(keys)} completions asked for. The data changed "
                "since it was filled, or the method draws new completions: use reference: copy or adapter."
            )
        return torch.cat([self.table[k] for k in keys])

    def put(self, keys: Sequence[bytes], logps: Sequence[Tensor]) -> None:
        """Add completions and write them as one shard."""
        if not keys:
            return
        rows = [t.detach().cpu() for t in logps]
        self.table.update(zip(keys, rows, strict=True))
        data = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, len(keys[0])).clone(),
            "lengths": torch.tensor([len(t) for t in rows]),
            "logps": torch.cat(rows),
        }
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        save_file(data, temporary)
        os.replace(
            temporary, self.folder / f"{hashlib.blake2b(b''.join(keys), digest_size=12).hexdigest()}.safetensors"
        )
