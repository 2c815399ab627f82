"""Constrained text matches what was asked for whatever the model says, ends only where it may, and is UTF-8."""

from __future__ import annotations

import json
import random
import re
import time
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from aiirwkv.errors import BadRequest, ServiceError
from aiirwkv_llm_rwkv.card import Sampling
from aiirwkv_llm_rwkv.engine.grammar import Grammar, Grammars
from aiirwkv_llm_rwkv.engine.sampling import Sampler
from aiirwkv_llm_rwkv.shelf.library import WORLD, Files
from aiirwkv_llm_rwkv.tokenizer import Tokenizer

from .conftest import NANO

ROWS = {"nano": 1024, "World": WORLD}
WORDS = ["", "a", "é", "中文", "🙂", 'say "x"', "back\\slash", "two\nlines", "tab\t", "/", "\u2028", "\x7f", "Straße"]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer.load(NANO / "vocab.txt" if name == "nano" else Files.at(NANO).world())


@cache
def grammars_of(name: str) -> Grammars:
    return Grammars(tokenizer_of(name), ROWS[name])


def allowed(grammar: Grammar) -> set[int]:
    return set(np.flatnonzero(grammar.mask() == 0).tolist())


class Writer:
    """A model that says anything at all, with a liking for what ends things, so that its texts become ready."""

    def __init__(self, name: str) -> None:
        self.tokenizer, self.rows = tokenizer_of(name), ROWS[name]
        self.liking = torch.zeros(self.rows)
        self.liking[[0, *(id for id, token in self.tokenizer.tokens.items() if token in b'"}],0')]] = 9.0

    def write(self, grammar: Grammar, seed: int, tokens: int = 500) -> tuple[bytes, bool]:
        """The text, and whether it came to its end."""
        sampler = Sampler(Sampling(temperature=1, top_p=0.99), seed, grammar=grammar)
        noise = torch.Generator().manual_seed(seed)
        text = b""
        for _ in range(tokens):
            assert (0 in allowed(grammar)) == grammar.complete
            token = sampler.choose(2 * torch.randn(self.rows, generator=noise) + self.liking)
            if token == 0:
                return text, True
            text += self.tokenizer.tokens[token]
            if sampler.finished:
                assert grammar.complete and allowed(grammar) == {0}
                return text, True
        return text, False


def schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const", "date", "any"]
    kind = chance.choice(["object", "object", "array"] if depth == 0 else kinds + ["object", "array"] * (depth < 3))
    if kind == "object":
        names = chance.sample([word or "empty" for word in WORDS], chance.randint(1, 4))
        required = [name for name in names if chance.random() < 0.7]
        properties = {name: schema(chance, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = chance.randint(0, 2)
        return {"type": "array", "items": schema(chance, depth + 1), "minItems": least, "maxItems": least + 2}
    if kind == "string":
        return {"type": "string", "minLength": chance.randint(0, 3), "maxLength": chance.randint(3, 12)}
    if kind == "pattern":
        return {"type": "string", "pattern": chance.choice(["^[A-Z]{2}-[0-9]{3}$", "^(ja|nein|是|否)$", "^é+$"])}
    if kind in ("integer", "number"):
        low = chance.randint(-50, 50)
        return {"type": kind, "minimum": low, "maximum": low + chance.randint(0, 1000)}
    if kind == "enum":
        return {"enum": chance.sample([*WORDS, 1, -2.5, None, True, ["x"], {"k": "中"}], 4)}
    if kind == "const":
        return {"const": {"wörd": chance.choice(WORDS)}}
    if kind == "date":
        return {"type": "string", "format": "date"}
    if kind == "any":
        return {"anyOf": [{"type": "string", "maxLength": 5}, {"type": ["integer", "null"]}]}
    return {"type": kind}


@pytest.mark.parametrize("name", ["nano", "World"])
def test_json_of_any_schema(name: str) -> None:
    writer, ready = Writer(name), 0
    for seed in range(50):
        asked = schema(random.Random(seed))
        grammar = grammars_of(name).of("", asked)
        assert grammar
        text, ended = writer.write(grammar, seed)
        ready += ended
        if ended:
            value = json.loads(text.decode("utf-8"))
            jsonschema.Draft202012Validator(asked).validate(value)
            assert text == text.strip()
    assert ready >= 45


REGEXES = [
    "yes|no|ja|nein|是|否",
    "[0-9]{4}-[01][0-9]-[0-3][0-9]",
    "[a-z]+(\\.[a-z]+){0,2}@[a-z]{1,9}\\.(org|de|中国)",
    "([0-9]{1,3}\\.){3}[0-9]{1,3}",
    "a/b\\\\c\"d'{2}",
    "[가-힣]{2,4} [α-ω]+",
    ".{0,20}",
    "(?s:.{3,30})",
    "[^0-9]{5}",
    "🙂*é?",
    "(?i)straße|ÉCOLE",
    "\\d+(,\\d+)*",
    "(a|b|ab)*c",
    "\\n\\n- .{1,9}\\n",
]


@pytest.mark.parametrize("name", ["nano", "World"])
@pytest.mark.parametrize("regex", REGEXES)
def test_text_of_a_regex(name: str, regex: str) -> None:
    """At every token: the text may end exactly when it matches, as Python's own expressions see it."""
    tokenizer, chance = tokenizer_of(name), random.Random(regex)
    for _ in range(3):
        grammar = grammars_of(name).of(regex, None)
        assert grammar
        text = b""
        for _ in range(60):
            ids = allowed(grammar)
            try:
                matches = re.fullmatch(regex, text.decode("utf-8")) is not None
            except UnicodeDecodeError:
                matches = False
            assert grammar.complete == matches == (0 in ids), text
            assert ids and grammar.finished <= (ids == {0})
            if grammar.finished or (matches and chance.random() < 0.2):
                break
            token = chance.choice(sorted(ids - {0}) or [0])
            grammar.accept(token)
            text += tokenizer.raw([token])


@pytest.mark.parametrize("name", ["nano", "World"])
def test_exactly_the_tokens_that_can_go_on(name: str) -> None:
    """Whole words and parts of them, of characters too; nothing else."""
    tokenizer, chance = tokenizer_of(name), random.Random(1)
    words = [word for word in WORDS if word] + ["station", "stationary", "state", "中心", "the lib", "🙃"]
    for _ in range(6):
        grammar, text = grammars_of(name).of("|".join(map(re.escape, words)), None), b""
        assert grammar
        for _ in range(40):
            rests = [word.encode()[len(text) :] for word in words if word.encode().startswith(text)]
            expected = {id for id, token in tokenizer.tokens.items() if any(rest.startswith(token) for rest in rests)}
            if b"" in rests:
                expected.add(0)
            assert allowed(grammar) == expected
            token = chance.choice(sorted(expected))
            if token == 0:
                break
            grammar.accept(token)
            text += tokenizer.tokens[token]
        else:
            raise AssertionError(f"{text!r} came to no end")


def test_a_grammar_may_go_on_for_ever() -> None:
    """A text is not made to end: when its tokens are used up, it is cut off."""
    grammar = grammars_of("nano").of("[ab]+", None)
    assert grammar
    a = tokenizer_of("nano").encode("a")[0]
    assert 0 not in allowed(grammar)
    for _ in range(300):
        grammar.accept(a)
        assert grammar.complete and not grammar.finished and {0, a} <= allowed(grammar)
    grammar.accept(0)
    assert grammar.finished


def test_white_space_in_json_has_an_end() -> None:
    grammar = grammars_of("nano").of("", {"type": "array", "items": {"type": "integer"}, "minItems": 1})
    assert grammar
    tokenizer = tokenizer_of("nano")
    grammar.accept(tokenizer.encode("[")[0])
    white = {id for id, token in tokenizer.tokens.items() if not token.strip()}
    for _ in range(40):
        if not (spaces := allowed(grammar) & white):
            break
        grammar.accept(max(spaces, key=lambda id: len(tokenizer.tokens[id])))
    assert not allowed(grammar) & white


def test_forced_text_of_a_million_bytes_holds_nobody_up() -> None:
    grammar = grammars_of("World").of("x?(a{1000}){1000}", None)
    assert grammar
    grammar.accept(tokenizer_of("World").encode("x")[0])  # from here on there is nothing to choose
    seconds = []
    for _ in range(5):
        began = time.process_time()
        ids = allowed(grammar)
        seconds.append(time.process_time() - began)
        grammar.accept(max(ids))
    assert min(seconds) < 0.1


def test_copies_go_their_own_ways() -> None:
    tokenizer, first = tokenizer_of("nano"), grammars_of("nano").of("(ab|ac)d", None)
    assert first
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    first.accept(a)
    second = first.copy()
    first.accept(b)
    second.accept(c)
    assert allowed(first) == allowed(second) == {d}
    first.accept(d)
    assert first.finished and not second.finished


@pytest.mark.parametrize("name", ["nano", "World"])
def test_a_space_before_the_text(name: str) -> None:
    """As models want it after "Assistant:"; it is not the text's own."""
    tokenizer, grammars = tokenizer_of(name), grammars_of(name)
    space = tokenizer.encode(" ")[0]
    for regex, schema, lead in [
        ("yes|no", None, True),
        ("", {"type": "integer"}, True),
        (" ?yes", None, False),
        ("\\s*x", None, False),
        (".*", None, False),
        ("[^a]", None, False),
    ]:
        grammar = grammars.of(regex, schema, lead=True)
        assert grammar and grammar.lead == grammar.copy().lead == lead
        ids = allowed(grammar)
        assert space in ids
        if lead:
            grammar.accept(space)
            assert allowed(grammar) < ids and space not in allowed(grammar)
        plain = grammars.of(regex, schema)
        assert plain and not plain.lead and (space in allowed(plain)) != lead


def test_tokens_that_end_a_text_are_no_text() -> None:
    tokenizer = tokenizer_of("World")
    blank = 261
    assert tokenizer.tokens[blank] == b"\n\n"
    grammars = Grammars(tokenizer, WORLD + 64, (0, blank))
    grammar = grammars.of("a(\n\n)+b?", None)
    assert grammar and len(grammar.mask()) == WORLD + 64
    assert not {0, blank} & allowed(grammar)
    for letter in "a\n\n":
        (token,) = tokenizer.encode(letter)
        assert not grammar.complete and blank not in allowed(grammar)
        grammar.accept(token)
    assert {0, blank, *tokenizer.encode("\n"), *tokenizer.encode("b")} <= allowed(grammar)
    assert not {256, *range(tokenizer.size, WORLD + 64)} & allowed(grammar), "a byte that is in no text, and no tokens"
    grammar.accept(blank)
    assert grammar.finished


def test_what_is_not_allowed_is_refused() -> None:
    grammar = grammars_of("nano").of("abc", None)
    assert grammar
    with pytest.raises(ServiceError, match="satisfy the grammar"):
        grammar.accept(tokenizer_of("nano").encode("b")[0])
    with pytest.raises(ServiceError):
        grammar.mask()


def test_bans_and_damaged_logits() -> None:
    grammars, tokenizer = grammars_of("nano"), tokenizer_of("nano")
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    greedy = Sampling(temperature=0)
    assert Sampler(greedy, grammar=grammars.of("a|b", None), ban=[a]).choose(torch.zeros(1024)) == b
    with pytest.raises(BadRequest, match="`ban`, `logit_bias` and the grammar leave no token"):
        Sampler(greedy, grammar=grammars.of("a|b", None), ban=[a, b]).choose(torch.zeros(1024))
    damaged = torch.zeros(1024)
    damaged[5] = float("inf")
    for sampling in (greedy, Sampling(temperature=1)):
        with pytest.raises(ServiceError, match="logits are not finite"):
            Sampler(sampling, grammar=grammars.of("a|b", None)).choose(damaged * float("nan"))


LOOP: dict[str, Any] = {}
LOOP["properties"] = LOOP
DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("regex", "schema", "complaint"),
    [
        ("(a", None, "`regex` cannot be used: unclosed group$"),
        ("*", None, "`regex` cannot be used: repetition operator missing expression$"),
        ("a\\", None, "`regex` cannot be used: it ends with half an escape$"),
        ("(?=x)y", None, "`regex` cannot be used: look-around, .* is not supported$"),
        ("(a)\\1", None, "`regex` cannot be used: backreferences are not supported$"),
        ("(?-u:\\xff)", None, "`regex` cannot be used: pattern can match invalid UTF-8$"),
        ("[a&&b]", None, "`regex` cannot be used: no text matches it$"),
        ("\ud83d", None, "`regex` cannot be used: it holds half a character"),
        ("x\nstart: /y", {}, "takes either `regex` or `json_schema`"),
        ("", {"type": "strin"}, "`json_schema` cannot be used: Invalid type: strin$"),
        ("", {"not": {"type": "null"}}, '`json_schema` cannot be used: Unimplemented keys: \\["not"\\]$'),
        ("", {"x-guidance": {"lenient": True}, "not": {}}, "`json_schema` cannot be used: Unimplemented keys"),
        ("", {"oneOf": [{}, {"type": "null"}]}, "`json_schema` cannot be used: oneOf constraints are not supported.$"),
        ("", {"type": "string", "pattern": "(a"}, "`json_schema` cannot be used: unclosed group$"),
        ("", {"$ref": "http://127.0.0.1/x"}, "`json_schema` cannot be used: .*fetch"),
        ("", {"$ref": "#"}, "`json_schema` cannot be used: no text matches it$"),
        ("", {"enum": []}, "`json_schema` cannot be used: Unsatisfiable schema: anyOf is empty$"),
        ("", {"const": "\ud83d"}, "`json_schema` cannot be used: .*hex escape"),
        ("", {"const": float("nan")}, "`json_schema` is not JSON: Out of range float"),
        ("", LOOP, "`json_schema` is not JSON: Circular reference"),
        ("", DEEP, "`json_schema` cannot be used: .*recursion limit"),
        ("", {"enum": [f"value {i}" for i in range(200_000)]}, "`json_schema` cannot be used: .*too big"),
    ],
)
def test_what_cannot_be_used(regex: str, schema: dict[str, Any] | None, complaint: str) -> None:
    with pytest.raises(BadRequest, match=f"^generate:? {complaint}"):
        grammars_of("nano").of(regex, schema)


def test_no_grammar() -> None:
    assert grammars_of("nano").of("", None) is None
