"""What was read stays a beginning of what is read next: only then can a kept state be gone on from."""

import pytest
from aiirwkv import Message
from aiirwkv_llm_rwkv.card import Card, Prompt
from aiirwkv_rag.condense import ROUNDS, dialogue


def talk(rounds: int) -> list[Message]:
    return [
        Message(role, f"{role} says {number}\n\n  over two lines ")
        for number in range(rounds)
        for role in ("user", "assistant")
    ]


@pytest.mark.parametrize("prompt", [Prompt(), Card(name="x").prompt, Prompt(between="\n---\n")])
@pytest.mark.parametrize("system", [[], [Message("system", "Be brief.")]])
def test_a_conversation_only_grows(prompt: Prompt, system: list[Message]) -> None:
    said = [*system, *talk(8)]
    before = ""
    for end in range(len(system) + 1, len(said), 2):
        now = prompt.write(said[:end])
        assert now.startswith(before) and len(now) > len(before)
        before = now
        answered = f"{now} {said[end].content.strip()}"  # as the model writes it: a space, then the words
        following = prompt.write([*said[: end + 1], Message("user", "Next?")])
        assert following.startswith(now)
        assert following.replace("\n", "").startswith(answered.replace("\n", ""))


def test_a_branch_has_the_beginning_in_common() -> None:
    prompt, said = Prompt(), talk(4)
    other = [*said[:4], Message("user", "Something else?")]
    shared = prompt.write(said[:3])
    assert prompt.write(other).startswith(shared) and prompt.write(said[:7]).startswith(shared)
    assert prompt.write(said[:3]) == prompt.write(said[:3])  # the answer again


def test_documents_stand_first_and_only_add_up() -> None:
    prompt, question = Prompt(), [Message("user", "What?")]
    one, both = (prompt.write(question, documents) for documents in (["A text."], ["A text.", "Another."]))
    read = one[: one.index("\n\nUser:")]
    assert read == "A text." and both.startswith(read)
    assert prompt.write([Message("user", "And why?")], ["A text."]).startswith(f"{read}\n\nUser: ")


def test_a_long_conversation_begins_anew_only_every_sixth_round() -> None:
    beginnings = []
    for rounds in range(40):
        said = [*talk(rounds), Message("user", "Next?")]
        kept = dialogue(said[:-1])
        assert kept == said[:-1][len(said) - 1 - len(kept) :] and (not kept or kept[0].role == "user")
        assert min(rounds, ROUNDS) <= len(kept) / 2 < 2 * ROUNDS
        beginnings.append(kept[0].content if kept else "")
    assert len(set(beginnings)) == 2 + (39 - 2 * ROUNDS) // ROUNDS + 1
