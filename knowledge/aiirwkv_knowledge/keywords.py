"""What the keyword index sees of a text: words, and for Chinese, Japanese and Korean pairs of characters."""

from __future__ import annotations

import re
import unicodedata

CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002fa1f"
TOKEN = re.compile(rf"([{CJK}]+)|([^\W_{CJK}]+)")
MAX_TERMS = 64

ENGLISH = """
    a about am an and are as at be been being but by can could did do does for from had has have he her his how i if
    in into is it its many may might much most no not of on or s she should so such t than that the their them then
    there these they this to was we were what when where which who whom whose why will with would you your
"""
STOP_WORDS = frozenset(ENGLISH.split())


def terms(text: str) -> list[str]:
    """
    The index terms of a text, in order.

    A run of CJK characters gives its overlapping pairs and its last character, so that a word of two characters is a
    term of its own and a single character is the beginning of one. Stems are left to the index.
    """
    found: list[str] = []
    for match in TOKEN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match[0]
        if match[1]:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
            found.append(word[-1])
        else:
            found.append(word)
    return found


def expression(query: str) -> str:
    """An FTS5 query that finds any of the query's terms; empty if there is none. Stop words go, if others remain."""
    found: list[str] = []
    for match in TOKEN.finditer(unicodedata.normalize("NFKC", query).casefold()):
        word = match[0]
        if match[1] and len(word) > 1:
            found += [f'"{word[i : i + 2]}"' for i in range(len(word) - 1)]
        else:
            found.append(f'"{word}"*' if match[1] else f'"{word}"')
    unique = list(dict.fromkeys(found))
    telling = [term for term in unique if term.strip('"') not in STOP_WORDS]
    return " OR ".join((telling or unique)[:MAX_TERMS])
