"""The tokenizer gives the ids of the reference, takes any text, and never runs what a vocabulary says."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from aiirwkv_llm_rwkv import tokenizer as module
from aiirwkv_llm_rwkv.shelf.library import WORLD, Files
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


def any_text(seed: int) -> str:
    chance = random.Random(seed)
    ranges = [(0, 0x80), (0, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]  # of one to four bytes; no surrogates
    return "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(200))


@pytest.fixture(scope="module", params=["nano", "World"])
def both(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    path = NANO / "vocab.txt" if request.param == "nano" else Files.at(NANO).world()
    return TRIE_TOKENIZER(str(path)), Tokenizer.load(path)


def test_same_ids_as_the_rwkv_package(both: tuple[Any, Tokenizer]) -> None:
    reference, tokenizer = both
    here = Path(__file__)
    files = [here, NANO / "vocab.txt", NANO / "card.json", *(here.parents[2] / "docs").glob("*.md")]
    texts = [path.read_text("utf-8") for path in files]
    for text in [*TEXTS, *map(random_text, range(50)), *map(any_text, range(50)), *texts]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.size <= WORLD
    quiet = {id for id, token in reference.idx2token.items() if reference.decode([id]) in " \t0123456789"}
    assert tokenizer.countless() == quiet


def test_any_bytes_can_be_encoded(both: tuple[Any, Tokenizer]) -> None:
    reference, tokenizer = both
    chance = random.Random(3)
    tokens = list(tokenizer.tokens.values())
    for _ in range(100):
        cut = b"".join(token[: chance.randrange(1, len(token) + 1)] for token in chance.choices(tokens, k=60))
        for text in (chance.randbytes(300), cut):
            ids = tokenizer.encode_bytes(text)
            assert ids == reference.encodeBytes(text)
            assert tokenizer.raw(ids) == text
    for token in tokens:
        assert tokenizer.tokens[tokenizer.encode_bytes(token)[0]] == token


def test_a_long_text(both: tuple[Any, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in blocks, with little memory beside the ids, and much faster than the reference."""
    reference, tokenizer = both
    text = "".join(TEXTS[2:]) * 100
    began = time.process_time()
    expected = reference.encode(text)
    reference_seconds = time.process_time() - began
    seconds = []
    for _ in range(5):
        began = time.process_time()
        assert tokenizer.encode(text) == expected
        seconds.append(time.process_time() - began)
    assert reference_seconds > 4 * min(seconds)
    for block in (1, 7, len(expected) - 1, len(expected), len(expected) + 1):
        monkeypatch.setattr(module, "BLOCK", block)
        assert tokenizer.encode(text) == expected
    monkeypatch.undo()
    tracemalloc.start()
    ids = tokenizer.encode(text * 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(text.encode()) * 20 + 12 * len(ids) + (4 << 20)


def test_a_lone_surrogate_is_refused(both: tuple[Any, Tokenizer]) -> None:
    with pytest.raises(UnicodeEncodeError):
        both[1].encode("half \ud83d a character")


def test_the_machine_code_may_not_find_a_place(tmp_path: Path) -> None:
    """An installation that cannot be written, and a user without a home: compiled at each start, and it works."""
    shutil.copy(module.__file__, tmp_path / "tokenizer.py")
    code = f"""
import numba.core.caching as caching
for locator in list(caching.CacheImpl._locator_classes):
    locator.from_function = classmethod(lambda *_: None)
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from tokenizer import Tokenizer
print(len(Tokenizer.load(Path({str(NANO / "vocab.txt")!r})).encode("The library opens at nine.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().isdigit(), done.stderr
    assert not list(tmp_path.rglob("*.nbi"))


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
        "1024 'a' 1 'bc' 3",
        f"{1 << 24} 'abc' 3",
        f"1024 '{'a' * 1025}' 1025",
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


def test_where_the_parts_of_a_text_end(both: tuple[Any, Tokenizer]) -> None:
    _, tokenizer = both
    for seed in range(20):
        chance = random.Random(seed)
        parts = [any_text(seed * 9 + number)[: chance.randrange(1, 60)] for number in range(8)] + [
            "。",
            "\n",
            "\n\nUser:",
        ]
        ids, cuts = tokenizer.encode_parts(parts)
        assert ids == tokenizer.encode("".join(parts)) and cuts == sorted(cuts) and cuts[-1] == len(ids)
        for number, cut in enumerate(cuts, 1):
            begun = "".join(parts[:number]).encode()
            assert tokenizer.raw(ids[:cut]).startswith(begun) and not tokenizer.raw(ids[: cut - 1]).startswith(begun)
    assert tokenizer.encode_parts([]) == ([], [])
