"""The command line in this process: what it prints, and how it exits."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

import pytest

from trimtab import cli


@dataclass(frozen=True)
class Outcome:
    """Exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message of a command that failed in an orderly way: no traceback, nothing else on standard error."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        head, _, message = self.err.partition("error: ")
        assert head == "", f"before the message: {head}"
        assert message.count("\n") == 1 and message.endswith("\n"), f"not one line: {message!r}"
        return message.strip()


def trimtab(*words: object) -> Outcome:
    """``trimtab("train", "prefs.jsonl")`` as the shell would start it, errors as the user would see them."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["trimtab", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*words: object) -> str:
    """Standard output of a command that must succeed."""
    found = trimtab(*words)
    if found.code:
        pytest.fail(f"exit code {found.code}: {found.err}{found.out}")
    return found.out
