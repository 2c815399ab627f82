"""The tokenizer gives the ids of the reference, takes any text, and never runs what a vocabulary says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from aiirwkv_llm_rwkv.library import WORLD, Files
from aiirwkv_llm_rwkv.tokenizer import Tokenizer, Utf8

from .conftest import NANO

TEXTS = [
    "",
    " ",
    "The library opens at nine.\n\nUser: When?\n\nAssistant:",
    "    def f(x):\r\n\treturn x ** 2  # 12345678901234567890\n\n\n",
    "RWKV 是一种循环神经网络，也是大语言模型。今天天气很好！",
    "Ünïcödé, naïve café, Straße; Привет, мир; こんにちは世界; مرحبا; שלום; हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 é (decomposed) ﷽ \U0010ffff \x00 \x7f \u200b",
    "".join(chr(i) for i in range(0x250)),
]


def random_text(seed: int) -> str:
    chance = random.Random(seed)
    alphabet = "abc ABC\n\t.,;012 éßñ中文字あ한🙂" + chr(chance.randrange(0xE000, 0x110000))
    return "".join(chance.choice(alphabet) for _ in range(300))


@pytest.mark.parametrize("name", ["nano", "World"])
def test_same_ids_as_the_rwkv_package(name: str) -> None:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    path = NANO / "vocab.txt" if name == "nano" else Files.at(NANO).world()
    reference, tokenizer = TRIE_TOKENIZER(str(path)), Tokenizer.load(path)
    for text in [*TEXTS, *map(random_text, range(50)), path.read_text("utf-8")[-20_000:]]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.size <= WORLD
    quiet = {id for id, token in reference.idx2token.items() if reference.decode([id]) in " \t0123456789"}
    assert tokenizer.countless() == quiet


def test_a_vocabulary_is_data_and_not_code(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    mark = tmp_path / "ran"
    lines = (NANO / "vocab.txt").read_text("utf-8").splitlines()
    for bad in (
        f"1024 open({str(mark)!r}, 'w').name {len(str(mark))}",
        "1024 'abc' 4",
        "1024 'abc'",
        "x 'abc' 3",
        "0 'abc' 3",
        "1024 ['a'] 1",
        "1024 '' 0",
        "1024 'abc 3",
    ):
        path.write_text("\n".join([*lines, bad]), "utf-8")
        with pytest.raises(ValueError, match=f"line {len(lines) + 1} is not of the form"):
            Tokenizer.load(path)
    assert not mark.exists()
    path.write_text("\n".join(lines[1:]), "utf-8")
    with pytest.raises(ValueError, match="it lacks 1 of the 256 single bytes"):
        Tokenizer.load(path)


def test_text_arrives_in_whole_characters() -> None:
    text = "a 你好 👩‍👩‍👧 é"
    utf8 = Utf8()
    pieces = [utf8.add(bytes([byte])) for byte in text.encode()]
    assert "".join(pieces) == text and "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert Utf8().add("好".encode()[:2]) == ""
    assert Utf8().add(b"a\xff\xfeb") == "ab"
