"""Nothing that a model or a document says becomes script, style, a form, or a request to another host."""

from __future__ import annotations

import importlib.util
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiirwkv_webui.sanitise import ATTRIBUTES, TAGS, lit, markdown, paragraphs

spec = importlib.util.spec_from_file_location("payloads", Path(__file__).with_name("payloads.py"))
assert spec and spec.loader
payloads = importlib.util.module_from_spec(spec)
spec.loader.exec_module(payloads)
PAYLOADS = payloads.PAYLOADS


class Seen(HTMLParser):
    """The tags and attributes in a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(f"a declaration came through: {decl}")

    handle_comment = handle_pi = unknown_decl = handle_decl


@pytest.mark.parametrize("payload", PAYLOADS)
def test_only_what_is_allowed_comes_through(payload: str) -> None:
    for text in (payload, f"before {payload} after", payload + "\n\nnext"):
        seen = Seen(markdown(text, {1}))
        assert set(seen.tags) <= TAGS
        for tag, name, value in seen.attributes:
            assert name in ATTRIBUTES.get(tag, set()) | ({"rel", "target"} if tag == "a" else set())
            if name == "href":
                assert urlsplit(value).scheme in ("http", "https", "mailto")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_beginning_of_a_stream_is_as_safe(payload: str) -> None:
    for end in range(1, len(payload)):
        for block in paragraphs(payload[:end]):
            assert set(Seen(markdown(block, range(1, 100))).tags) <= TAGS


@pytest.mark.parametrize("payload", PAYLOADS)
def test_document_text_is_shown_as_it_is(payload: str) -> None:
    seen = Seen(lit(payload, 2, 5))
    assert seen.tags == ["mark"]
    assert seen.text == payload


def test_a_citation_becomes_a_chip_only_if_it_exists() -> None:
    html = markdown("It ends in May. [1] Or not [2].", {1})
    assert html.count("<button") == 1 and 'data-cite="1"' in html and "[2]" in html
    assert "<button" not in markdown("`[1]`", {1})


def test_markdown_is_set_as_text() -> None:
    html = markdown("**May**\n\n- one\n- two\n\n| a |\n|---|\n| 1 |", ())
    assert {"strong", "li", "td"} <= set(Seen(html).tags)


def test_a_link_says_where_it_leads() -> None:
    html = markdown("[our site](https://example.org/x)")
    assert "(example.org)" in Seen(html).text and 'rel="noopener noreferrer nofollow"' in html
    assert "href" not in markdown("[inside](/upload)")


def test_finished_paragraphs_do_not_change_while_the_text_grows() -> None:
    text = "# One\n\nTwo **words**.\n\n```py\na = 1\n\nb = 2\n```\n\n- three\n- four\n\nFive."
    final = paragraphs(text)
    assert "".join(final).replace("\n", "") == text.replace("\n", "")
    for end in range(1, len(text)):
        blocks = paragraphs(text[:end])
        for block, whole in zip(blocks[:-1], final, strict=False):
            assert block.strip() == whole.strip()


def test_the_lit_span_is_the_cited_one() -> None:
    assert lit("a <b> c", 2, 5) == 'a <mark id="lit" tabindex="-1">&lt;b&gt;</mark> c'
    assert lit("abc", 0, 0) == "abc"
