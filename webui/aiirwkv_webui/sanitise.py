"""The one way from text that somebody else wrote (a model, a document) to HTML. Nothing else makes HTML of it."""

from __future__ import annotations

from collections.abc import Collection
from html import escape
from typing import Any
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

TAGS = {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "blockquote",
    "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "a", "span", "button",
}  # fmt: skip
ATTRIBUTES: dict[str, set[str]] = {
    "*": set(),  # nh3 would let title and lang through
    "a": {"href"},
    "ol": {"start"},
    "span": {"class"},
    "button": {"class", "type", "data-cite", "aria-label"},
}
CLASSES = {"span": {"host"}, "button": {"cite"}}


def markdown(text: str, citations: Collection[int] = ()) -> str:
    """Safe HTML of Markdown. `[n]` becomes a citation chip for each n in `citations`; images become plain links."""
    return _clean(_MARKDOWN.render(text, {"citations": citations}))


def paragraphs(text: str) -> list[str]:
    """The top-level blocks of a Markdown text; while it grows at its end, all but the last are final."""
    lines = text.splitlines(keepends=True)
    starts = [token.map[0] for token in _BLOCKS.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    return ["".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=False)]


def lit(text: str, start: int, end: int) -> str:
    """Safe HTML of plain text with the characters from `start` to `end` lit."""
    if not text[start:end]:
        return escape(text)
    return f'{escape(text[:start])}<mark id="lit" tabindex="-1">{escape(text[start:end])}</mark>{escape(text[end:])}'


def _clean(html: str) -> str:
    return nh3.clean(
        html,
        tags=TAGS,
        attributes=ATTRIBUTES,
        attribute_filter=_allowed,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        strip_comments=True,
    )


def _allowed(tag: str, name: str, value: str) -> str | None:
    if name == "class":
        return value if value in CLASSES.get(tag, ()) else None
    if tag == "a" and name == "href" and urlsplit(value).scheme not in ("http", "https", "mailto"):
        return None  # a relative link would lead into this app
    return value


def _citation(state: StateInline, silent: bool) -> bool:
    """The inline rule for `[n]`."""
    if state.src[state.pos] != "[":
        return False
    close = state.src.find("]", state.pos, state.pos + 5)
    number = state.src[state.pos + 1 : close]
    if close < 0 or not number.isdecimal() or int(number) not in state.env.get("citations", ()):
        return False
    if not silent:
        state.push("citation", "", 0).content = str(int(number))
    state.pos = close + 1
    return True


def _render_citation(self: RendererHTML, tokens: list[Token], index: int, options: Any, env: Any) -> str:
    number = int(tokens[index].content)
    return f'<button type="button" class="cite" data-cite="{number}" aria-label="Source {number}">{number}</button>'


def _render_link_close(self: RendererHTML, tokens: list[Token], index: int, options: Any, env: Any) -> str:
    """A link says where it leads."""
    opening = next(token for token in reversed(tokens[:index]) if token.type == "link_open")
    host = urlsplit(str(opening.attrs.get("href", ""))).hostname
    return f'</a><span class="host"> ({escape(host)})</span>' if host else "</a>"


def _parser() -> MarkdownIt:
    parser = (
        MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")
    )
    parser.inline.ruler.before("link", "citation", _citation)
    parser.add_render_rule("citation", _render_citation)
    parser.add_render_rule("link_close", _render_link_close)
    return parser


_MARKDOWN = _parser()
_BLOCKS = _parser()
_BLOCKS.core.ruler.enableOnly(["normalize", "block"])
