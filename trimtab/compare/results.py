"""Results that do not change: one file per trial, named by a hash of everything that decides its numbers.

A result that is there is read, never computed again; another version, another line in a source file that the trial
uses, another seed or option is another file beside it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from trimtab import __version__
from trimtab.compare.trial import Trial
from trimtab.errors import DataError
from trimtab.objectives import objective_class
from trimtab.world.model import fingerprint


def conditions(trial: Trial) -> dict[str, Any]:
    """All that decides a trial's numbers: what it is, code, model, versions."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
    return {
        "trial": trial.to_json(),
        "trimtab": __version__,
        "sources": sources(*_modules(trial)),
        "model": fingerprint(),
        "versions": {n: metadata.version(n) for n in names},
        "processor": platform.machine(),
    }


def _modules(trial: Trial) -> tuple[str, str]:
    return "trimtab.compare.trial", objective_class(trial.method).__module__


def key(trial: Trial) -> str:
    """Hash of :func:`conditions`."""
    return _hash(conditions(trial))


@cache
def sources(*modules: str) -> str:
    """Hash of these modules and of all of trimtab that they import, directly or through others."""
    found: dict[str, bytes] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in found or name.partition(".")[0] != __name__.partition(".")[0]:
            continue
        spec = _spec(name)
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin).read_bytes()
        package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        todo += [package, *_imported(found[name], package)]
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(found.items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def _imported(source: bytes, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name inside a module, not a module
        return None


def _hash(value: Any) -> str:
    said = json.dumps(value, sort_keys=True, allow_nan=False, default=str)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


class Results:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, trial: Trial) -> Path:
        return self.folder / f"{trial.method}-{trial.seed}-{key(trial)}.json"

    def get(self, trial: Trial) -> dict[str, Any] | None:
        """The trial's result, or None; :class:`DataError` where the file was changed."""
        file = self.file(trial)
        if not file.exists():
            return None
        try:
            body = json.loads(file.read_text())
            intact = body.pop("sha") == _hash(body) and _hash(body["conditions"]) == key(trial)
        except (ValueError, KeyError, AttributeError):
            intact = False
        if not intact:
            raise DataError(f"{file} was changed after it was written. Remove it: the trial will be run again.")
        return dict(body["result"])

    def put(self, trial: Trial, result: dict[str, Any], command: str) -> dict[str, Any]:
        """Write a result once; where another process was first, its result stands and is returned."""
        modules = _modules(trial)
        if sources.__wrapped__(*modules) != sources(*modules):
            raise DataError(
                "The sources of trimtab changed while trials ran: their results belong to no version. Start again."
            )
        body = {
            "world": trial.world,
            "conditions": json.loads(json.dumps(conditions(trial))),
            "command": command,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "result": result,
        }
        text = json.dumps({**body, "sha": _hash(body)}, indent=1, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "w") as f:
                f.write(text)
            os.chmod(temporary, 0o444)
            os.link(temporary, self.file(trial))  # fails where the file is there; a rename would replace it
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
        stored = self.get(trial)
        assert stored is not None
        return stored
