"""How an answer came about: its stages as one bar with times, and the passages that were kept and dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiirwkv import Citation, Considered, Receipt

from .components import button, count, duration, tag

SHADES = 6
"""Shades that receipt.css has for stages."""


def receipt(receipt: Receipt, on_open: Callable[[Citation], Any]) -> None:
    """A fold with the receipt; `on_open` opens a passage."""
    with tag("details", classes="receipt"):
        with tag("summary"):
            tag("span", "How this was answered")
            tag("span", duration(sum(stage.seconds for stage in receipt.stages)), "hint number")
        _stages(receipt)
        kept = [passage for passage in receipt.considered if passage.kept]
        dropped = [passage for passage in receipt.considered if not passage.kept]
        _passages(f"{count(len(kept), 'passage')} kept", kept, on_open)
        _passages(f"{count(len(dropped), 'passage')} dropped", dropped, on_open)
        if receipt.prompt:
            with tag("details", classes="prompt"):
                tag("summary", f"What the model read{f' · {receipt.model}' if receipt.model else ''}")
                tag("pre", receipt.prompt, tabindex="0")


def _stages(receipt: Receipt) -> None:
    whole = sum(stage.seconds for stage in receipt.stages) or 1
    with tag("div", classes="stages", aria_hidden="true"):
        for number, stage in enumerate(receipt.stages):
            part = tag("div", classes=f"stage shade-{number % SHADES}", title=stage.name)
            part.style(f"flex-grow: {stage.seconds / whole:.4f}")
    with tag("ul", classes="legend"):
        for number, stage in enumerate(receipt.stages):
            with tag("li"):
                tag("span", classes=f"swatch shade-{number % SHADES}")
                tag("span", stage.name)
                tag("span", duration(stage.seconds), "number strong")
                if stage.note:
                    tag("span", stage.note, "hint")


def _passages(title: str, passages: list[Considered], on_open: Callable[[Citation], Any]) -> None:
    if not passages:
        return
    tag("h3", title)
    with tag("ul", classes="passages"):
        for passage in passages:
            with tag("li"):
                with tag("div", classes="line"):
                    place = Citation(
                        0, passage.document, passage.page, passage.start, passage.end, passage.text, passage.collection
                    )
                    button(passage.document, lambda place=place: on_open(place), kind="plain")
                    if passage.page:
                        tag("span", f"p {passage.page}", "hint number")
                    for name, value in passage.scores.items():
                        with tag("span", classes="score number"):
                            tag("span", name, "hint")
                            tag("span", _score(value))
                if passage.text:
                    cut = "…" if len(passage.text) < passage.end - passage.start else ""
                    tag("p", passage.text.rstrip("…") + cut, "excerpt")
                if passage.reason:
                    tag("p", passage.reason, "hint")


def _score(value: float) -> str:
    return "< 0.01" if 0 < value < 0.01 else f"{value:.2f}"
