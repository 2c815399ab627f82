"""The parts of an answer: what a question expects, what counts as standing in the text, marks, follow-ups, prompts."""

import pytest
from aiirwkv import Hit, Message
from aiirwkv_rag.citing import Marks, cited
from aiirwkv_rag.closely import clause, read, standing
from aiirwkv_rag.condense import ROUNDS, complete, conversation
from aiirwkv_rag.evidence import Evidence, Limits, collect, fit, weigh
from aiirwkv_rag.expect import closed, offers
from aiirwkv_rag.prompts import fill, say

TEXT = "The library closes at 18:30. The head librarian is Margaret Olsen. A card costs 12 euros."


@pytest.mark.parametrize(
    ("question", "sentence", "expected"),
    [
        ("When does it close?", "It closes at 18:30.", True),
        ("When does it close?", "It is closed on Mondays.", False),
        ("When was it founded?", "It has 48 seats.", False),
        ("How much is a card?", "A card costs 12 euros.", True),
        ("How much is a card?", "A card is valid for a year.", False),
        ("Who is the librarian?", "The librarian is Margaret Olsen.", True),
        ("Who is the teacher?", "You can reach the teacher by phone.", False),
        ("What is her phone number?", "She has taught since 2011.", False),
        ("What is her phone number?", "Call 555-0134.", True),
        ("How many seats are there?", "The room has 48 seats.", True),
        ("How many seats are there?", "Seats cost 48 euros.", False),
        ("How many dryers are there?", "It costs 2 euros for the dryer.", False),
        ("What is the e-mail address?", "It lies in Mill Lane.", False),
        ("How old is he?", "He is 34 years old.", True),
        ("Why is it closed?", "It is closed.", None),
        ("图书馆几点关门？", "图书馆六点关门。", None),
    ],
)
def test_what_a_question_expects(question: str, sentence: str, expected: bool | None) -> None:
    assert offers(question, sentence) is expected


def test_questions_for_yes_or_no() -> None:
    assert closed("Is there parking?") and closed("Do I need a ticket?")
    assert not closed("Where is the parking?") and not closed("Is it open or closed?")


@pytest.mark.parametrize(
    ("said", "text", "expected"),
    [
        ("Margaret Olsen", TEXT, "Margaret Olsen"),
        ("margaret olsen.", TEXT, "Margaret Olsen"),
        ("Margaret", TEXT, "Margaret Olsen"),
        ("Margaret Wilson", TEXT, ""),
        ("The text does not say.", TEXT, ""),
        ("", TEXT, ""),
        ("the", TEXT, ""),
        ("3 p", "Check-in begins at 3 p.m.", "3 p.m."),
        ("90", "Not larger than 90 by 120 centimetres.", "90 by 120"),
        ("13:00", "Friday: 8:00 to 13:00", "8:00 to 13:00"),
        ("July", "In June and July.", "June and July"),
        ("Prof", "Chair: Prof. Ingrid Solheim.", "Prof. Ingrid Solheim"),
    ],
)
def test_an_answer_must_stand_in_the_text_and_is_made_whole(said: str, text: str, expected: str) -> None:
    assert standing(said, text, "?", "The text does not say.") == expected


def test_an_answer_of_the_wrong_kind_does_not_count() -> None:
    assert standing("18:30", "The library closes at 18:30.", "When does it close?") == "18:30"
    assert standing("library", "The library has many rooms and closes at 18:30.", "When does it close?") == ""


def test_the_clause_that_answers() -> None:
    text = "Double rooms cost 95 euros, single rooms cost 70 euros."
    assert clause("What does a single room cost?", text) == "Single rooms cost 70 euros."
    assert clause("What does a double room cost?", text) == "Double rooms cost 95 euros"
    assert clause("Who sleeps there?", text) == text


def evidence(question: str, text: str = TEXT) -> list[Evidence]:
    """Evidence as an embedder sees it that counts letters."""
    hit = Hit("facts.txt", 2, 100, 100 + len(text), text, 1.0, chunk="c1")

    def letters(words: str) -> list[float]:
        return [float(words.lower().count(chr(97 + i))) for i in range(26)]

    found = collect(question, [hit])
    return weigh(question, found, letters(question), [letters(item.titled) for item in found])


async def test_reading_asks_for_the_best_sentence_only() -> None:
    asked: list[str] = []

    async def ask(text: str) -> str:
        asked.append(text)
        return "Margaret Ols"

    reading = await read("Who is the head librarian?", evidence("Who is the head librarian?"), ask, "No.")
    assert reading.answer == "Margaret Olsen"
    assert asked == ["The head librarian is Margaret Olsen."]
    citation = reading.evidence.cite(1, 0.5)
    assert citation.text == "The head librarian is Margaret Olsen."
    assert (citation.start, citation.end) == (100 + TEXT.index("The head"), 100 + TEXT.index(" A card"))
    assert (citation.page, citation.chunk) == (2, "c1")


def test_evidence_is_weaker_when_the_kind_or_the_name_is_missing() -> None:
    def strength(question: str, answered: bool = False) -> float:
        return evidence(question)[0].strength(answered)

    assert strength("Who is the head librarian?") > 0.5 > strength("How old is the head librarian?")
    assert strength("What does a card cost?") > strength("What does a card cost in Norway?")
    assert strength("What does a card cost?", True) > strength("What does a card cost?", False)


def test_the_model_reads_no_more_than_its_card_allows() -> None:
    found = evidence("Who is the head librarian?")
    assert [len(group) for group in fit(found, Limits())] == [3]
    (group,) = fit(found, Limits(passages=1, tokens=30))
    assert len(group) == 2 and found[0] in group
    assert [item.start for item in group] == sorted(item.start for item in group)
    assert [len(group) for group in fit(found, Limits(tokens=1))] == [1]


def test_overlapping_passages_give_a_sentence_once() -> None:
    whole = Hit("a.txt", None, 0, 20, "One is here. Two too", 1.0)
    part = Hit("a.txt", None, 13, 28, "Two too. Three.", 1.0)
    assert sorted((item.start, item.sentence.text) for item in collect("?", [whole, part])) == [
        (0, "One is here."),
        (13, "Two too."),
        (22, "Three."),
    ]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["It is open [1]."], "It is open [1]."),
        (["It is open [", "3", "]."], "It is open."),
        (["Open [1", ", 7] daily [2][9]", "."], "Open [1] daily [2]."),
        (["An array a[0] and [note]", " stay."], "An array a and [note] stay."),
        (["Ends with a mark [2", "]"], "Ends with a mark [2]"),
    ],
)
def test_marks_of_passages_that_were_not_sent_are_removed(pieces: list[str], expected: str) -> None:
    marks = Marks([1, 2])
    assert "".join([*map(marks.feed, pieces), marks.rest()]) == expected


def test_a_refusal_is_recognised_before_anything_is_let_through() -> None:
    marks = Marks([1], "The text does not say.")
    assert [marks.feed(piece) for piece in ("The te", "xt does not", " say. [1]")] == ["", "", ""]
    assert marks.refused
    marks = Marks([1], "The text does not say.")
    assert marks.feed("The text") == ""
    assert marks.feed(" says so.") == "The text says so."
    assert not marks.refused


def test_which_sentence_names_what() -> None:
    assert cited("It opens at 9 [1]. It closes at 5. [2] [3] Yes.") == [
        ("It opens at 9.", [1]),
        ("It closes at 5.", [2, 3]),
        ("Yes.", []),
    ]


def test_a_follow_up_is_completed_from_the_question_before() -> None:
    earlier = [Message("user", "When does the library open?"), Message("assistant", "At 9 [1]")]
    assert complete("And when does it close?", earlier) == "And when does it close? (library open)"
    assert complete("What does a museum ticket cost?", earlier) == "What does a museum ticket cost?"
    assert complete("When does it close?", []) == "When does it close?"


def test_six_rounds_are_remembered() -> None:
    rounds = [Message(role, str(i)) for i in range(9) for role in ("user", "assistant")]
    assert conversation(rounds) == rounds[-2 * ROUNDS :]
    assert conversation(rounds[-3:])[0].role == "user"


def test_what_is_put_into_a_prompt_is_not_looked_at_again() -> None:
    for text in ("{{7*7}}", "{0.__class__}", "{question}", "{quote}", "%s ${x}"):
        assert fill("a {question} b", question=text) == f"a {text} b"
        assert text in say("refused", "?", quote=text)
    assert say("refusal", "图书馆几点开门？") == "文档中没有说明。"
