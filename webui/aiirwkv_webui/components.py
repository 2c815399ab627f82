"""The parts every page is made of, each built once: text, buttons, rows of progress, empty states, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

ICONS = {
    "alert": "M12 8v5m0 3v.2M12 3l9.5 17h-19z",
    "back": "M15 5l-7 7 7 7",
    "chat": "M4 5h16v11H9l-5 4z",
    "check": "M5 12.5l4.5 4.5L19 7.5",
    "clock": "M12 7v5l3 2M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z",
    "close": "M6 6l12 12M18 6L6 18",
    "copy": "M9 9h11v11H9zM15 9V4H4v11h5",
    "file": "M6 3h8l4 4v14H6zM14 3v4h4",
    "folder": "M3 6h6l2 2h10v11H3z",
    "plus": "M12 5v14M5 12h14",
    "retry": "M4 12a8 8 0 1 1 2.5 5.8M4 12V7m0 5h5",
    "send": "M12 19V5m-6 6l6-6 6 6",
    "stop": "M8 8h8v8H8z",
    "trash": "M4 7h16M9 7V4h6v3M6.5 7l1 13h9l1-13",
    "upload": "M12 16V4m-5 5l5-5 5 5M4 19h16",
}
"""Paths on a grid of 24."""

Kind = Literal["primary", "quiet", "plain", "bad"]


def tag(name: str, text: str = "", classes: str = "", **attributes: Any) -> TextElement:
    """An HTML element with plain text; `aria_label` becomes aria-label."""
    element = TextElement(tag=name, text=text)
    element.classes(classes)
    element.props.update({key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    return element


def icon(name: str) -> Element:
    """A line icon; it says nothing to a screen reader, so words must stand beside it."""
    with tag("svg", classes="icon", viewBox="0 0 24 24", aria_hidden="true") as svg:
        tag("path", d=ICONS[name])
    return svg


def button(
    words: str,
    on_click: Callable[..., Any] | str = "",
    *,
    symbol: str = "",
    kind: Kind = "quiet",
    bare: bool = False,
) -> Element:
    """
    A button. `on_click` is a handler, or a JavaScript function; `bare` shows only the symbol and keeps the words for
    screen readers and the tooltip.
    """
    element = tag("button", classes=f"button {kind}" + (" bare" if bare else ""), type="button")
    if bare:
        element.props.update({"aria-label": words, "title": words})
    with element:
        if symbol:
            icon(symbol)
        if not bare:
            tag("span", words)
    if isinstance(on_click, str):
        element.on("click", js_handler=on_click or "() => {}")
    else:
        element.on("click", on_click, args=[])
    return element


def error(words: str, on_retry: Callable[..., Any] | None = None) -> Element:
    """What went wrong, where it went wrong."""
    with tag("div", classes="error", role="alert") as element:
        icon("alert")
        tag("span", words)
        if on_retry:
            button("Try again", on_retry, symbol="retry")
    return element


def count(number: int, noun: str) -> str:
    """`1 chunk`, `1 204 chunks`."""
    return f"{number:,} {noun if number == 1 else noun + 's'}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Rounded to what matters: 40 ms, 1.4 s, 2 min."""
    if seconds < 0.0005:
        return "< 1 ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.0f} min"


def time_left(seconds: float) -> str:
    """An estimate, rounded as an estimate."""
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


class Row:
    """A file on its way or arrived: name, state in words, a bar while something runs, and what can be done."""

    def __init__(self, name: str, on_open: Callable[..., Any] | None = None) -> None:
        with tag("li", classes="file") as self.element:
            self._icon = tag("span", classes="state")
            with tag("div", classes="about"):
                if on_open:
                    tag("button", name, "name", type="button", title=name).on("click", on_open, args=[])
                else:
                    tag("span", name, "name", title=name)
                self._words = tag("span", "", "words")
                with tag("div", classes="bar", role="progressbar", aria_label=name) as self._bar:
                    self._fill = tag("div", classes="fill")
            self._actions = tag("div", classes="actions")
        self._shown: tuple[str, tuple[str, ...]] | None = None

    def show(
        self, state: str, symbol: str, words: str, done: float | None = None, **actions: tuple[str, Callable[..., Any]]
    ) -> None:
        """
        `state` is good, warn, bad or busy; `done` goes from 0 to 1 and is negative if unknown; each action is
        symbol=(words, do).
        """
        self._words.text = words
        self._bar.set_visibility(done is not None)
        self._bar.classes(add="unknown" if done is not None and done < 0 else "", remove="unknown")
        if done is not None and done >= 0:
            self._fill.style(f"width: {min(done, 1):.1%}")
            self._bar.props["aria-valuenow"] = round(done * 100)
        shown = (state + symbol, tuple(actions))
        if shown == self._shown:
            return
        self._shown = shown
        self.element.classes(replace=f"file {state}")
        self._icon.clear()
        with self._icon:
            icon(symbol)
        self._actions.clear()
        with self._actions:
            for name, (label, do) in actions.items():
                button(label, do, symbol=name, bare=True)
