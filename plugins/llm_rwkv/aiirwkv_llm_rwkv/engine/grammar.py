"""
Text that must match a regular expression or a JSON schema: which tokens may come next, kept by llguidance.

Every token that is allowed can be completed to such a text, and a text ends only where it is one. A text that is not
complete when its tokens are used up is cut off there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from aiirwkv.errors import BadRequest, ServiceError
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from ..tokenizer import Tokenizer

__all__ = ["Grammar", "Grammars"]

LAYOUT = {"whitespace_pattern": r" |\n {0,32}", "lenient": False, "coerce_one_of": False}
"""JSON on one line or indented. A model that is lost cannot write white space for ever, and no keyword is ignored."""

# What is added to the logits of eight tokens, for each byte of llguidance's bits.
_EIGHT = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], 1, bitorder="little"), 0, -np.inf)
_EIGHT = _EIGHT.astype(np.float32)


class Grammars:
    """
    Makes the grammars for one model.

    `rows` is the number of its logits. `end` are the token ids that end a text: these stand for no text here.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, end: Collection[int] = (0,)) -> None:
        self._tokenizer, self._rows, self._end = tokenizer, rows, sorted({0, *end})

    def of(self, regex: str, json_schema: Mapping[str, Any] | None, lead: bool = False) -> Grammar | None:
        """
        A new grammar for one text, or None when there is neither.

        `lead` allows a space before it, as models want it after "Assistant:"; not if the text may begin with white
        space of its own. Raises BadRequest.
        """
        if regex and json_schema is not None:
            raise BadRequest("generate takes either `regex` or `json_schema`, not both")
        if regex:
            field, rule = "regex", _regex(regex)
        elif json_schema is not None:
            field, rule = "json_schema", _schema(json_schema)
        else:
            return None
        try:
            grammar = self._grammar(rule)
            if lead and not (grammar.mask()[self._white] == 0).any():
                return self._grammar(f'" "? {rule}', lead=True)
            return grammar
        except ServiceError as error:
            raise BadRequest(f"generate: `{field}` cannot be used: {error}") from None

    def _grammar(self, rule: str, lead: bool = False) -> Grammar:
        # Forced stretches are not looked for: they can be a million bytes long, which would hold up other texts.
        lark = LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\nstart: {rule}')
        grammar = Grammar(LLMatcher(self._vocabulary, lark, log_level=0, limits=_LIMITS), self._rows, lead)
        grammar.mask()  # the first one takes longest, and shows whether any text matches
        return grammar

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        vocabulary: Any = _Vocabulary(self._tokenizer, self._rows, self._end)
        return LLTokenizer(vocabulary, self._rows, self._end)

    @cached_property
    def _white(self) -> list[int]:
        return [id for id, token in self._tokenizer.tokens.items() if token[:1].isspace()]


class Grammar:
    """Where one text is in its grammar."""

    def __init__(self, matcher: LLMatcher, rows: int, lead: bool = False) -> None:
        self._matcher, self._rows = matcher, rows
        self._bits = np.zeros((rows + 31) // 32, np.int32)
        self.lead = lead
        """Whether a space may come before the text, which does not belong to it."""
        self._check()

    def copy(self) -> Grammar:
        """Another text, as far as this one."""
        return Grammar(self._matcher.deep_copy(), self._rows, self.lead)

    @property
    def complete(self) -> bool:
        """The text may end here."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """The text must end here."""
        return self._matcher.is_stopped()

    def mask(self) -> NDArray[np.float32]:
        """What to add to the logits [V]: 0 for a token that may come next, else -inf. Raises ServiceError."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return _EIGHT.take(self._bits.view(np.uint8), 0).reshape(-1)[: self._rows]

    def accept(self, token: int) -> None:
        """The token that was chosen. Raises ServiceError when it was not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ServiceError(_reason(self._matcher.get_error()))


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, rows: int, end: list[int]) -> None:
        self.tokens = [tokenizer.tokens.get(id, b"") for id in range(rows)]
        for id in end:
            self.tokens[id] = b"<end %d>" % id
        self.eos_token_id = end[0]
        self.special_token_ids = end
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_bytes(text.encode())


_LIMITS = LLParserLimits(verbose_errors=False)


def _regex(pattern: str) -> str:
    """As a rule of llguidance's grammars."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise BadRequest("generate: `regex` cannot be used: it ends with half an escape")
    try:
        return f"/{regex_to_lark(pattern, '')}/"
    except UnicodeEncodeError:
        raise BadRequest("generate: `regex` cannot be used: it holds half a character (a lone surrogate)") from None


def _schema(schema: Mapping[str, Any]) -> str:
    """As a rule of llguidance's grammars."""
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': LAYOUT}, allow_nan=False)}"
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRequest(f"generate: `json_schema` is not JSON: {error}") from None


def _reason(error: str) -> str:
    """What went wrong in one line, without the places in a grammar that nobody has seen."""
    text = error.partition("\n   1 | ")[0].removesuffix("<non-verbose/>")
    for mark in ("failed to compile JSON schema: ", "(in regex): ", "\nerror: "):
        text = text.rpartition(mark)[2]
    text = " ".join(text.partition(" Enable '")[0].split())  # an option of llguidance, which nobody can set here
    return "no text matches it" if text.startswith("NoExtension") else text
