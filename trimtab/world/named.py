"""Worlds by name: judges that stress one thing each, and a short way to write others."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from trimtab.errors import ConfigError, nearest
from trimtab.world.judge import Judge

WORLDS = {
    "plain": Judge(),
    "ties": Judge(tie_rate=0.4),
    "flips20": Judge(flip=0.2),
    "flips40": Judge(flip=0.4),
    "length": Judge(length_bias=0.1),
    "shift": Judge(prompt_shift=0.9),
    "few-up": Judge(keep_desirable=0.1),
    "edits": Judge(edits=1.0),
    "sure": Judge(temperature=0.0),
}


def world(text: str) -> Judge:
    """``ties``, or ``ties,flip=0.2,temperature=0.5``: a named world, or one with other values."""
    name, *changes = text.split(",")
    if name not in WORLDS:
        raise ConfigError(f'There is no world "{name}".{nearest(name, list(WORLDS))} Known: {", ".join(WORLDS)}.')
    known, changed = [f.name for f in fields(Judge)], dict[str, Any]()
    for change in changes:
        key, equals, value = change.partition("=")
        if key not in known or not equals:
            raise ConfigError(
                f'world: "{change}" is not name=value.{nearest(key, known)} Parameters of a world: {", ".join(known)}.'
            )
        try:
            changed[key] = float(value)
        except ValueError:
            raise ConfigError(f'world: {key} is "{value}"; expected a number.') from None
    return replace(WORLDS[name], **changed)
