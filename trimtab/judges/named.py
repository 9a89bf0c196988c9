"""A judge by its name on the command line."""

from __future__ import annotations

from trimtab.errors import ConfigError
from trimtab.judges.base import Judge
from trimtab.judges.model import load_judge
from trimtab.judges.rule import RuleJudge


def named_judge(name: str) -> Judge:
    """``rule:FILE.py:FUNCTION``, ``rule:MODULE:FUNCTION``, ``model:FOLDER`` or ``model:FOLDER,REFERENCE``."""
    kind, _, rest = name.partition(":")
    if not rest or kind not in ("rule", "model"):
        raise ConfigError(
            f'judge is "{name}"; expected rule:FILE.py:FUNCTION, rule:MODULE:FUNCTION, model:FOLDER (a reward model), or '
            "model:FOLDER,REFERENCE (the implicit reward of an aligned model)."
        )
    if kind == "rule":
        return RuleJudge(rest)
    folder, _, reference = rest.partition(",")
    return load_judge(folder, reference or None)
