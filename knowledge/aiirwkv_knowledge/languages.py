"""Whether an embedder can read a text: by the writing, which tells Chinese from English, not German from English."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

WRITTEN_BY = {
    "ARABIC": "ar fa ur",
    "CJK": "zh ja",
    "CYRILLIC": "ru uk bg sr mk be kk mn",
    "DEVANAGARI": "hi mr ne",
    "GREEK": "el",
    "HANGUL": "ko",
    "HEBREW": "he yi",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "THAI": "th",
}
"""Languages (ISO 639-1) by script, as Unicode names its letters. Any embedder reads Latin letters, for names."""
SHARE = 0.3
"""Of a text's letters, that an unknown script must make up."""


def unreadable(text: str, languages: Sequence[str]) -> str:
    """The script that makes up much of the text and that none of an embedder's languages is written in, or ""."""
    if not languages or "*" in languages:
        return ""
    known = {language.lower().split("-")[0] for language in languages}
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    for script, count in scripts.most_common():
        if count >= SHARE * scripts.total() and script in WRITTEN_BY and not known & set(WRITTEN_BY[script].split()):
            return script
    return ""
