"""Exactly which tokens are trained, in colour: what is grey is context, what is coloured is in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from trimtab.tokens.batch import Example
from trimtab.tokens.template import sides

COLOURS = {
    "chosen": ("black on green3", "black on dark_sea_green2"),
    "rejected": ("black on light_coral", "black on pink1"),
}
OTHER = ("black on sky_blue1", "black on light_sky_blue1")


def show(example: Example, tokenizer: Any) -> Panel:
    """A panel for the terminal. Neighbouring tokens alternate in shade, so that their borders are visible."""
    parts: list[Text] = [Text(_visible(tokenizer.decode(list(example.prompt))), style="dim")]
    for side, completion in zip(sides(example), example.completions, strict=True):
        text = Text(f"{side} ({len(completion)} tokens trained) ", style="bold")
        for i, (piece, _, _) in enumerate(spans(completion, tokenizer)):
            # Text.append does not read markup, so hostile text stays text
            text.append(_visible(piece), style=COLOURS.get(side, OTHER)[i % 2])
        parts.append(text)
    tie = getattr(example.record, "tie", False)
    desirable = getattr(example.record, "desirable", None)
    label = "tie" if tie else "" if desirable is None else "thumbs up" if desirable else "thumbs down"
    title = f"{_visible(str(example.record.origin))} · prompt {len(example.prompt)} tokens {('· ' + label) if label else ''}"
    return Panel(Group(*parts), title=Text(title), title_align="left")


def spans(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, int, int]]:
    """(text, first, end): the text of each token where it stands; the parts of one character come as one piece."""
    shown, first = "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        if end < len(ids) and text.endswith("\ufffd"):  # the first bytes of a character
            continue
        yield text[len(shown) :], first, end
        shown, first = text, end


def _visible(text: str) -> str:
    """Control characters made visible; a line break shows as its sign and breaks the line."""
    text = text.replace("\n", "⏎\n")
    return "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
