"""What is shown: stop strings across the borders of tokens, nothing shown too early, nothing held too long."""

from __future__ import annotations

import random

import pytest
from aiirwkv_llm_rwkv.engine.output import Output


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
        ("xabcd", ["abcd", "bc"], "xa"),
        ("xabcd", ["d", "abcd", "cd"], "x"),
        ("aaaa", ["aa", "aaa"], ""),
        ("é́́!", ["́́"], "é"),
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


def by_the_rule(tokens: list[bytes], stop: list[str], strip: bool) -> tuple[str, bool]:
    """The rule written out: one character more each time, until a stop string is at the end; then cut it off."""
    text, stopped = b"".join(tokens).decode("utf-8", "ignore"), False
    for end in range(1, len(text) + 1):
        if at := [string for string in stop if string and text[:end].endswith(string)]:
            text, stopped = text[: end - max(map(len, at))], True
            break
    return (text.lstrip() if strip else text), stopped


def test_any_text_in_any_tokens() -> None:
    """Few different characters, so that stop strings overlap; tokens cut them, and some bytes are of no character."""
    chance = random.Random(0)
    alphabet = ["a", "b", " ", "\n", "é", "中", "🙂"]
    stops = 0
    for _ in range(4000):
        letters = chance.sample(alphabet, chance.randint(2, 4))
        raw = "".join(chance.choices(letters, k=chance.randint(0, 30))).encode()
        if chance.random() < 0.2:
            raw = raw[: chance.randint(0, len(raw))] + chance.choice([b"\xff", b"\xe4\xb8", b"\x80"]) + raw[-3:]
        stop = ["".join(chance.choices(letters, k=chance.randint(0, 4))) for _ in range(chance.randint(0, 4))]
        strip = chance.random() < 0.5
        tokens = []
        while raw:
            size = chance.randint(1, 5)
            tokens.append(raw[:size])
            raw = raw[size:]
        expected, stopped = by_the_rule(tokens, stop, strip)
        output, shown = Output(stop, strip), ""
        for token in tokens:
            shown += output.add(token)
            assert expected.startswith(shown), "what was shown is never taken back"
            if output.stopped:
                break
        assert (shown + output.end(), output.stopped) == (expected, stopped), (tokens, stop, strip)
        stops += stopped
    assert 1000 < stops < 3500


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
