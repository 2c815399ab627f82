"""
What kind of answer an English question expects, and whether a sentence offers one.

Patterns only, no model: they say "perhaps" too often rather than "no". Other languages are of no known kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .words import alike, content, names, stem

__all__ = ["closed", "offers"]

Offer = Callable[[str, str], bool | None]
"""Question and sentence → whether the sentence offers such an answer."""

_NUMERALS = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen several few no
"""
_COUNT = rf"(?:\d[\d.,]*|\b(?:{'|'.join(_NUMERALS.split())})\b)"
_NUMBER = rf"(?:{_COUNT}|\b(?:half|an?|couple|twice|once)\b)"
_MONTH = r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b"
_DAY = r"\b(?:(?:mon|tues|wednes|thurs|fri|satur|sun)days?|weekdays?|weekends?)\b"
_ORDINAL = (
    r"\d(?:st|nd|rd|th)\b|\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last)\s+"
    r"(?:day|week|month|year)|" + _DAY
)
_HOUR = (
    r"(?:[01]?\d|2[0-4]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b(?![,.]\d|\s*(?:[%€$£]|euro|"
    r"pound|dollar|cent|per ?cent|kilo|mile|met))"
)
_CLOCK = (
    r"\b\d{1,2}[:.]\d{2}\b|\b\d{1,2}\s?[ap]\.?m\b|\bnoon|\bmidnight|o'clock|\ball day|\bany (?:time|hour)|\bhalf past|"
    rf"\bquarter (?:to|past)|\b(?:at|from|until|till|to|by|before|after|between|past)\s+{_HOUR}"
)
_YEAR = r"\b1\d{3}s?\b|\b20\d\ds?\b"
_SEASON = r"centur|\b(?:spring|summer|autumn|fall|winter)\b"
_DATE = (
    rf"{_DAY}|{_MONTH}|{_YEAR}|{_SEASON}|{_ORDINAL}|\bclosed\b|daily|weekly|monthly|yearly|annual|every|morning|"
    r"afternoon|evening|"
    r"night|tomorrow|today|yesterday|\b(?:before|after|during|when|while|once|until|since|within|as soon as|ago|later|"
    r"earlier)\b"
)
_SPAN = r"(?:second|minute|hour|day|night|week|month|year|decade|centur)"
_LENGTH = (
    r"(?:m|cm|mm|km|(?:centi|milli|kilo)?met(?:er|re)s?|miles?|feet|foot|ft|inch(?:es)?|yards?|stor(?:ey|ies|y)s?|"
    r"characters?|words?|pages?)\b"
)
_AREA = r"(?:hectares?|acres?|square|sq|m²|km²|litres?|liters?|seats?|rooms?|floors?|gb|mb|tb)\b"
_WEIGHT = r"(?:kg|g|kilo(?:gram)?s?|grams?|pounds?|lbs?|tons?|tonnes?|ounces?)\b"
_MONEY = (
    r"[€$£¥%]|\b(?:euros?|pounds?|dollars?|cents?|pence|p|usd|eur|gbp|chf|francs?|yen|crowns?|rupees?|free|gratis|"
    r"included|no (?:extra )?charge|per ?cent)\b"
)
_PERSON = (
    r"\b(?:everyone|everybody|anyone|nobody|child(?:ren)?|adults?|students?|pupils?|guests?|members?|"
    r"visitors?|staff|employees?|teachers?|parents?|owners?|seniors?|residents?|groups?|team|department|"
    r"mother|father|sister|brother|son|daughter|wife|husband|neighbours?|managers?|caretaker|technicians?)\b"
)
_PLACE = (
    r"\b(?:in|at|on|near|beside|behind|opposite|from|to|into|under|above|between|next|around|outside|inside|over|"
    r"through|across|along|by|via|towards?|north|south|east|west|upstairs|downstairs|here|there|address|location|"
    r"place)\b"
)
_STREET = (
    r"\b(?:[Aa]ddress|[Ss]treet|St|Road|Rd|Lane|Avenue|Square|Way|Drive|Court|Quay|PO)\b|\b\d+[a-z]?\s+[A-Z]|"
    r"(?<=[a-z,] )[A-Z]\w+\s+\d+\b"
)
_APART = frozenset(("for", "per", "at", "from", "until", "and", "euros", "pounds"))
_LINKS = frozenset(("with", "is", "are", "was", "were", "of", "at", "only", "about"))
_PHONE = r"(?:\d[ ()/-]{0,2}){5,}|\bextension \d|\b(?:call|dial|phone|tel)\w*\W+(?:\w+\W+){0,4}\d{3}"


def _has(*patterns: str, case: int = re.IGNORECASE) -> Offer:
    found = re.compile("|".join(patterns), case).search
    return lambda question, sentence: found(sentence) is not None


def _named(question: str, sentence: str) -> bool:
    """A name that the question does not say itself."""
    return bool(names(sentence) - names(question, first=True))


def _persons(question: str, sentence: str) -> bool:
    """A name, or a kind of people that the question does not say itself."""
    kinds = {stem(word) for word in re.findall(_PERSON, sentence, re.IGNORECASE)}
    return _named(question, sentence) or bool(kinds - set(content(question)))


def _counts(question: str, sentence: str) -> bool:
    """How many THINGS: a number at most two words before the things, or after them."""
    asked = re.search(r"how many\s+([\w-]+)(?:\s+([\w-]+))?", question, re.IGNORECASE)
    things = set(content(" ".join(filter(None, asked.groups())))) if asked else set()
    words = re.findall(r"[\w.,:-]*\w", sentence)
    places = [i for i, word in enumerate(words) if re.fullmatch(_COUNT, word, re.IGNORECASE)]
    for i in places:
        for j in (i - 2, i - 1, i + 1, i + 2, i + 3):
            between = {word.lower() for word in words[min(i, j) + 1 : max(i, j)]}
            linked = not between & _APART if j > i else between <= _LINKS
            if linked and 0 <= j < len(words) and things & set(content(words[j])):
                return True
    return bool(places) and not things


def _things(question: str, sentence: str) -> bool | None:
    """Which THING: perhaps, when the thing itself is named."""
    asked = re.search(r"\b(?:which|what)\s+([\w-]+)(?:\s+([\w-]+))?", question, re.IGNORECASE)
    things = content(" ".join(filter(None, asked.groups()))) if asked else []
    here = content(sentence)
    # The first of the two words is the thing; the second may be its verb.
    return True if any(thing == word or alike(thing, word) for thing in things[:1] for word in here) else None


_KINDS: list[tuple[str, Offer]] = [
    (r"\be-?mail", _has(r"@|e-?mail")),
    (r"\bweb ?(?:site|page|address)|\burl\b", _has(r"www\.|https?:|\.[a-z]{2,}\b")),
    (
        r"\bwhom?\b.*\b(?:call|phone|ring)\b",
        lambda question, text: _persons(question, text) or _has(_PHONE)(question, text),
    ),
    (
        r"\b(?:phone|telephone) (?:number|of)|\bby phone\b|\bnumber\b.*\b(?:call|dial|ring)|\bcall\b.*\bnumber|"
        r"\b(?:extension|hotline|fax)\b",
        _has(_PHONE),
    ),
    (r"\bhow many\b", _counts),
    (
        r"\bhow (?:old|young)\b|\bage\b",
        _has(
            r"years?[ -]old|\bborn\b|\bage[ds]?\b",
            rf"{_COUNT}\s+years?\b",
            r"\b(?:under|over) \d",
            rf"\b(?:built|founded|dates)\b.*(?:{_YEAR})",
        ),
    ),
    (
        r"\bhow long\b",
        _has(
            rf"{_NUMBER}[ -]*(?:\w+[ -])?(?:{_SPAN}|{_LENGTH})",
            r"forever|permanent|\bfrom\b.*\b(?:to|until)\b|\buntil\b|\bsince\b",
        ),
    ),
    (r"\bhow (?:hot|warm|cold)\b|temperature|boiling|melting point", _has(r"degree|°|celsius|fahrenheit|\bkelvin")),
    (r"\bhow (?:tall|high|wide|deep|thick|far)\b", _has(rf"{_NUMBER}[ -]*(?:{_LENGTH}|by\b|minutes?\b|{_AREA})")),
    (r"\bhow (?:large|big|small)\b", _has(rf"{_NUMBER}[ -]*(?:{_LENGTH}|{_AREA}|by\b|{_WEIGHT})", r"\bsize\b")),
    (r"\bhow heavy\b|\bweigh", _has(rf"{_NUMBER}[ -]*{_WEIGHT}")),
    (
        r"\bhow much (?:is|are|was|were|for)\b|"
        r"^(?!\W*(?:when|where|who|why|how (?!much))\b).*\b(?:costs?|prices?|pay|fees?|fares?|charged?|expensive)\b",
        _has(_MONEY),
    ),
    (r"\bhow fast\b|\bspeed\b", _has(rf"{_COUNT}.*(?:per (?:second|minute|hour)|km/h|mph|knots|bits?\b)")),
    (r"\bhow much\b", _has(_NUMBER)),
    (r"\b(?:what|which) day", _has(_DAY, _MONTH, _ORDINAL, r"daily|every day|today|tomorrow|yesterday")),
    (r"\b(?:what|which) year", _has(r"\b\d{3,4}s?\b")),
    (r"\bwhen\b.*\bclose\b|\bhow late\b", _has(_CLOCK, _MONTH, _SEASON, r"\bclosed: ", rf"{_DAY}: ")),
    (r"\bwhat time|\bopening hours", _has(_CLOCK, r"morning|evening|night|closed|daily")),
    (
        r"\bwhen\b|\b(?:what|which) (?:date|month|season|century|decade)|\bhow (?:early|soon)\b",
        _has(_CLOCK, _DATE, rf"{_COUNT}[ -]*{_SPAN}"),
    ),
    (r"\bhow often\b", _has(r"every|daily|weekly|monthly|year|twice|once|times|each", _DAY)),
    (r"'s name\b|\bname of the \w+(?:er|or|ist|ant|man|woman|ian)\b", _named),
    (r"^\W*who|\bwhom\b|\bwhose\b", _persons),
    (r"\baddress\b", _has(_STREET, case=0)),
    (r"\bwhere\b", _has(_PLACE)),
    (r"\b(?:which|what)\s", _things),
]
_RULES = [(re.compile(pattern, re.IGNORECASE), offer) for pattern, offer in _KINDS]
_CLOSED = re.compile(
    r"\W*(?:is|are|was|were|do|does|did|can|could|may|must|will|would|should|has|have)\b(?!.*\bor\b)", re.IGNORECASE
)


def offers(question: str, sentence: str) -> bool | None:
    """Whether the sentence holds something of the kind that is asked for; None: that cannot be told."""
    for asks, offer in _RULES:
        if asks.search(question):
            return offer(question, sentence)
    return None


def closed(question: str) -> bool:
    """Whether the question asks for yes or no."""
    return _CLOSED.match(question) is not None
