"""Sentences: exact offsets, whatever the text is like."""

import pytest
from aiirwkv_rag.sentences import split

MARKDOWN = """# Clinic

## Opening hours
- Monday: 8:00 to 17:30
- Sunday: closed

## Good to know
Bring your card. Dr. Nair sees children, e.g. on
Fridays. | not a table
"""

FAQ = "Q: When is the gym open?\nA: Every day from 6 to 11.\n\nQ: Can I try it?\nA: Yes. The first visit is free.\n"


def texts(text: str) -> list[str]:
    return [sentence.text for sentence in split(text)]


CASES = [
    ["One.", " ", "Two!", " ", "Three? Four"],
    ["Dr. Alder came at 3 p.m.", " ", "He left at 4.30 p.m. on foot."],
    ["It costs 3.50 euros, i.e. less than J. R. Smith paid.", " ", "Good."],
    ["He said “Stop!”", " ", "Then he left…", "  ", "Yes."],
    ["图书馆九点开门。", "周日关门！", "电话是123。"],
    ["“几点开门？”他问。", "九点。"],
    ["A line that was wrapped in the middle because it\nis long.", " ", "Next."],
    ["Price: 3 euros", "\n", "Phone: 555-0134", "\n\n\n", "End"],
    ["1. Open the lid.", "\n", "2. Press the key.", " ", "Wait."],
    [],
    [" \n\n \t"],
]


@pytest.mark.parametrize("parts", CASES)
def test_where_sentences_end(parts: list[str]) -> None:
    assert texts("".join(parts)) == [part for part in parts if part.strip()]


@pytest.mark.parametrize(
    "text", [MARKDOWN, FAQ, "a\r\nb.\r\n\r\nC d. E", "图书馆。 Two. 三！", "\ufeff x. 🙂 Y!\x0b Z", "…", "?!", "# x"]
)
def test_offsets_are_exact_and_in_order(text: str) -> None:
    last = 0
    for sentence in split(text):
        assert text[sentence.start : sentence.end] == sentence.text == sentence.text.strip() != ""
        assert sentence.start >= last
        last = sentence.end


def test_a_sentence_knows_its_heading_and_loses_its_marks() -> None:
    assert [(s.heading, s.plain) for s in split(MARKDOWN)][:3] == [
        ("Opening hours", "Monday: 8:00 to 17:30"),
        ("Opening hours", "Sunday: closed"),
        ("Good to know", "Bring your card."),
    ]
    assert split("No heading here.", "From outside")[0].heading == "From outside"


def test_a_question_and_its_answer_are_one() -> None:
    first, second = split(FAQ)
    assert first.plain == "When is the gym open? Every day from 6 to 11."
    assert second.plain == "Can I try it? Yes. The first visit is free."
