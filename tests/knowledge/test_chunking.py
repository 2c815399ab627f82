"""Chunks are exactly what stands in the text, and know their page and heading."""

import itertools

import pytest
from aiirwkv import Anchor, BadRequest
from aiirwkv_knowledge.chunking import cut, tokens

MIXED = (
    "Grüße 😀👩‍🚀 aus Zürich.\n\n这是第一段。它说的是知识库。\n\n"
    + "The third paragraph is in English. " * 40
    + "\n\n最后🎉。"
)
FACTS = "The museum opens at nine.\n\nA ticket costs five euro.\n\nDogs stay outside.\n"


@pytest.mark.parametrize("text", [MIXED, MIXED * 30, FACTS, "一" * 1000, "😀" * 500, "nospaces" * 99, "\r\n a \x00 b"])
@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (20, 6), (100, 30), (4000, 0)])
@pytest.mark.parametrize("markdown", [False, True])
def test_every_chunk_is_its_span(text: str, size: int, overlap: int, markdown: bool) -> None:
    pieces = cut(text, [], size, overlap, markdown=markdown)
    assert all(piece.text == text[piece.start : piece.end] for piece in pieces)
    assert all(tokens(piece.text) <= size for piece in pieces)
    covered = {place for piece in pieces for place in range(piece.start, piece.end)}
    assert all(place in covered or text[place].isspace() for place in range(len(text)))
    starts = [piece.start for piece in pieces]
    assert starts == sorted(starts)


def test_overlap_repeats_the_end() -> None:
    text = " ".join(f"word{i}" for i in range(300))
    plain, overlapping = cut(text, [], 50, 0), cut(text, [], 50, 20)
    assert all(a.end <= b.start for a, b in itertools.pairwise(plain))
    assert all(a.end > b.start for a, b in itertools.pairwise(overlapping))


@pytest.mark.parametrize(("size", "overlap"), [(100, 100), (100, 101), (100, -1), (0, 0), (7, 0), (100_000, 0)])
def test_impossible_sizes_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(BadRequest, match=r"chunk_(size|overlap) is"):
        cut(FACTS, [], size, overlap)


def test_page_and_headings() -> None:
    text = "# Guide\n\nIntro.\n\n## Hours\n\nNine to five.\n\n# Prices\n\nFive euro."
    heads = [("Guide", 1), ("Hours", 2), ("Prices", 1)]
    anchors = [
        Anchor("heading", (start := text.index(title) - level - 1), start + 5, title=title, level=level)
        for title, level in heads
    ]
    second = text.index("## Hours")
    anchors += [Anchor("page", 0, second, page=1), Anchor("page", second, len(text), page=2)]
    pieces = cut(text, anchors, 8, 0)

    def place(words: str) -> tuple[int | None, str]:
        return next((piece.page, piece.heading) for piece in pieces if words in piece.text)

    assert place("Nine to five.") == (2, "Guide › Hours")
    assert place("Five euro.") == (2, "Prices")
    assert place("Intro.") == (1, "Guide")
    assert cut("plain", [], 8, 0)[0].page is None
