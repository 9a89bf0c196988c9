"""One short file per method. The folder is the registry: a new file is a new method, nothing else is touched."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from functools import cache

from trimtab.errors import ConfigError, nearest
from trimtab.objectives.base import Objective, option, typed

__all__ = ["Objective", "methods", "objective_class", "option", "weighted_sum"]


@cache
def methods() -> dict[str, type[Objective]]:
    """Every method by its name, sorted: all concrete :class:`Objective` subclasses defined in this folder."""
    found: dict[str, type[Objective]] = {}
    for module in pkgutil.iter_modules(__path__):
        namespace = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in namespace.values():
            here = isinstance(value, type) and value.__module__ == f"{__name__}.{module.name}"
            if here and issubclass(value, Objective) and value is not Objective:
                found[value.name()] = value
    return dict(sorted(found.items()))


def objective_class(name: str) -> type[Objective]:
    """The class of a method, or :class:`ConfigError` with the nearest known name."""
    known = methods()
    if name not in known:
        raise ConfigError(f'There is no method "{name}".{nearest(name, list(known))} Known: {", ".join(known)}.')
    return known[name]


def weighted_sum(text: str) -> list[tuple[float, Objective]]:
    """``0.8 * dpo(beta=0.2) + 1 * sft`` as weights and methods; :class:`ConfigError` where it is not such a sum."""
    found = [re.fullmatch(r"([\d.]+) \* (\w+)(?:\((.*)\))?", term.strip()) for term in re.split(r"\+(?![^(]*\))", text)]
    if not all(found):
        raise ConfigError(f'parts is "{text}"; expected a sum such as "0.8 * dpo(beta=0.1) + 1 * sft".')
    return [(float(m[1]), _method(m[2], m[3] or "")) for m in found if m]


def _method(name: str, options: str) -> Objective:
    cls, given = objective_class(name), dict(re.findall(r"(\w+)\s*=\s*([^,\s]+)", options))
    known = {f.name: f for f in dataclasses.fields(cls)}
    for option_name in given:
        if option_name not in known:
            raise ConfigError(f"{name} has no option {option_name}; known: {', '.join(known)}.")
    return cls(**{k: typed(cls, known[k], v) for k, v in given.items()})
