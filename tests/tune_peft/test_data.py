"""From JSON lines to batches."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from aiirwkv import BadRequest
from aiirwkv_llm_rwkv.card import Card
from aiirwkv_llm_rwkv.shelf.library import BUILT_IN, Files
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from aiirwkv_tune_peft.data import Sample, encode, pack, plan, read, split

NANO = Files.at(BUILT_IN / "rwkv7-nano")
TOKENIZER = Tokenizer.load(NANO.vocabulary(1024))


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    file = path / "data.jsonl"
    file.write_text("\ufeff" + "\r\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_every_form_becomes_what_the_model_is_asked_with(tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See\n\nyou"},
    ]
    file = lines(
        tmp_path,
        {"prompt": "Who?\n", "response": "Ada", "source": "ignored"},
        {"prompt": "Who?", "response": "Ada", "documents": ["Ada came.", "Tom went."]},
        {"prompt": "Who?", "response": " Ada "},
        {"messages": conversation},
        {"text": "Once upon\n\na time"},
    )
    assert [tuple(example) for example in read(file, NANO.card)] == [
        (1, "User: Who?\n\nAssistant:", " Ada\n\n"),
        (2, "User: Ada came.\nTom went.\nQuestion: Who?\n\nAssistant:", " Ada\n\n"),
        (4, "User: Hi\n\nAssistant:", " Hello\n\n"),
        (4, "User: Bye\n\nAssistant:", " See\nyou\n\n"),
        (5, "", "Once upon\n\na time"),
    ]
    last = read(file, Card(name="general"))[3]
    before = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:"
    assert last == (4, before, " See\nyou\n\nUser:")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b"{", "line 1: Input data was truncated"),
        (b'{"prompt": "\xff"}', "line 1 is not UTF-8"),
        (b'{"prompt": 3, "response": "b"}', "line 1: Expected `str | null`, got `int`"),
        (b'{"prompt": "a", "response": " "}', "line 1: the response is empty"),
        (b'{"response": "a"}', "line 1: the prompt is empty"),
        (b'{"question": "a"}', "line 1: a line has `prompt` and `response`, or"),
        (b'{"text": "a", "prompt": "b"}', "and only one of these"),
        (b'{"text": ""}', "line 1: the text is empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "each assistant's turn must follow a user's"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "line 1: Invalid enum value 'robot'"),
        (b"", "the data is empty"),
        (b"x\n" * 7, "line 5: .*; and 2 more"),
    ],
)
def test_broken_lines_are_named(row: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(row)
    with pytest.raises(BadRequest, match=complaint):
        read(tmp_path / "data.jsonl", NANO.card)


def test_only_answers_are_learnt_and_nothing_is_too_long(tmp_path: Path) -> None:
    examples = read(lines(tmp_path, {"prompt": "Who?", "response": "Ada"}, {"text": "Once upon"}), NANO.card)
    asked, text = encode(examples, NANO.card, TOKENIZER, 100)
    assert TOKENIZER.decode(asked.tokens[asked.answer :]) == " Ada\n\n"
    assert TOKENIZER.decode(asked.tokens[: asked.answer]) == "User: Who?\n\nAssistant:"
    assert text.answer == 1 and text.tokens[-1] == 0 and TOKENIZER.decode(text.tokens) == "Once upon"
    with pytest.raises(BadRequest, match=f"line 1 has {len(asked.tokens)} tokens and batch_tokens is 8"):
        encode(examples, NANO.card, TOKENIZER, 8)


def test_lines_are_held_out_whole_and_by_the_seed() -> None:
    samples = [Sample(line, [1, 2], 1) for line in range(50) for _ in range(2)]
    learnt, held_out = split(samples, 0.2, 3)
    assert len(learnt) == 80 and len(held_out) == 20
    assert not {sample.line for sample in learnt} & {sample.line for sample in held_out}
    assert split(samples, 0.2, 3) == (learnt, held_out) != split(samples, 0.2, 4)
    assert [len(part) for part in split(samples[:4], 0.01, 0)] == [2, 2]
    with pytest.raises(BadRequest, match="at least two different examples"):
        split(samples[:2], 0.5, 0)


def test_the_plan_takes_every_sample_once_in_each_epoch() -> None:
    lengths = [5 + index % 11 for index in range(40)]
    batches = plan(lengths, 64, 300, 1)
    assert len(batches) == 300 and batches == plan(lengths, 64, 400, 1)[:300] != plan(lengths, 64, 300, 2)
    assert all(len(batch) * max(lengths[index] for index in batch) <= 64 for batch in batches)
    stream = [index for batch in batches for index in batch]
    epochs = [Counter(stream[start : start + 40]) for start in range(0, len(stream) - 40, 40)]
    assert len(epochs) > 10 and all(set(epoch.values()) == {1} and len(epoch) == 40 for epoch in epochs)
    assert stream[:40] != stream[40:80]
    assert list(islice(pack(range(3), [9, 9, 9], 9), 5)) == [[0], [1], [2]]
