"""What is shown: stop strings across the borders of tokens, nothing shown too early, nothing held too long."""

from __future__ import annotations

import pytest
from aiirwkv_llm_rwkv.output import Output


def show(pieces: list[str], stop: list[str], strip: bool = False) -> tuple[str, bool]:
    output = Output(stop, strip)
    text = ""
    for piece in pieces:
        text += output.add(piece.encode())
        if output.stopped:
            break
    return text + output.end(), output.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\nUser: two", ["\n\nUser:"], "one"),
        ("one\n\nUse: two", ["\n\nUser:"], "one\n\nUse: two"),
        ("aaab", ["aab"], "a"),
        ("abababac", ["ababac"], "ab"),
        ("ein Ende, END.", ["END", "Ende"], "ein "),
        ("all of it", ["", "never"], "all of it"),
        ("ends with the beginning of ST", ["STOP"], "ends with the beginning of ST"),
        ("中文。停止", ["停止"], "中文。"),
    ],
)
def test_stop_strings_across_tokens(text: str, stop: list[str], expected: str, size: int) -> None:
    raw = text.encode()
    output, shown = Output(stop), ""
    for start in range(0, len(raw), size):
        shown += output.add(raw[start : start + size])
        assert expected.startswith(shown), "nothing of a stop string is shown"
        if output.stopped:
            break
    assert shown + output.end() == expected
    assert output.stopped == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    output = Output(["\n\n"])
    assert output.add(b"word") == "word"
    assert output.add(b"s\n") == "s"
    assert output.add(b"more") == "\nmore"
    assert output.end() == ""


def test_leading_white_space() -> None:
    assert show([" ", "\n ", " a ", " b"], [], strip=True) == ("a  b", False)
    assert show([" a"], []) == (" a", False)
    assert show([" ", "\n", "\n"], ["\n\n"], strip=True) == ("", True)


def test_half_a_character_at_the_end_is_left_out() -> None:
    output = Output()
    assert output.add("é好".encode()[:4]) == "é"
    assert output.end() == ""
