"""One short file per method. The folder is the registry: a new file is a new method, nothing else is touched."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from trimtab.errors import ConfigError, nearest
from trimtab.objectives.base import Objective, option

__all__ = ["Objective", "methods", "objective_class", "option"]


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
