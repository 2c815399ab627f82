"""Words that carry meaning, compared by their stems. English; East Asian scripts by pairs of characters."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["alike", "content", "names", "stem", "topical", "topical_words"]

_FUNCTION_WORDS = """
a an the this that these those and or but if of in on at to for from by with about into over under as than then is are
was were be been being am do does did done have has had can could may might must shall should will would i me my you
your yours we us our they them their it its he him his she her there here what which who whom whose when where why how
much many long often not no yes any some all one also so such only just please tell get gets got give gives gave given
put take takes taken took need needs want find make makes made use used goes go come comes s t d ll re ve m
"""
_FUNCTION = frozenset(_FUNCTION_WORDS.split())
_ANSWER_WORDS = """
cost costs price prices pay fee fees fare charge phone telephone extension number call dial ring reach email mail
address time year day date age name
"""
_KIND_WORDS = frozenset(_ANSWER_WORDS.split())
_IRREGULAR_FORMS = """
began:begin begun:begin bought:buy brought:bring built:build chose:choose drove:drive grew:grow grown:grow held:hold
kept:keep knew:know known:know led:lead left:leave lent:lend lost:lose meant:mean met:meet paid:pay ran:run sang:sing
sent:send shut:close sold:sell spent:spend spoke:speak spoken:speak stood:stand taught:teach told:tell went:go won:win
wrote:write written:write children:child men:man women:woman people:person
"""
_IRREGULAR = dict(pair.split(":") for pair in _IRREGULAR_FORMS.split())
_DEGREE = re.compile(r"\bhow\s+(?!to\b|do|does|can)\w+", re.IGNORECASE)
_DAYS = {day: "weekday" for day in ("monday", "tuesday", "wednesday", "thursday", "friday")}
_WORD = re.compile(r"[^\W_]+(?:['’.][^\W_]+)*")
_EAST_ASIAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+")
_ENDINGS = (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("es", ""), ("ly", ""), ("s", ""), ("e", ""))
_DERIVED = ("er", "or", "r", "ist", "ion", "ation", "ment", "al", "ness", "ship", "ity")


@lru_cache(50_000)
def stem(word: str) -> str:
    """An English word in lower case, without its commonest endings."""
    word = word.lower().replace("’", "'").removesuffix("'s").removesuffix("'")
    word = _IRREGULAR.get(word, word)
    for ending, put in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending) + put
            break
    if len(word) > 4 and word[-1] == word[-2]:
        word = word[:-1]
    elif len(word) > 4:
        word = word.removesuffix("e")
    return word


def content(text: str) -> list[str]:
    """The words that carry meaning: stems of English words, pairs of characters of East Asian ones."""
    words = []
    for word in _WORD.findall(text):
        if _EAST_ASIAN.search(word):
            for run in _EAST_ASIAN.findall(word):
                words += [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        elif word.lower() not in _FUNCTION:
            words.append(stem(word))
    return words


def topical_words(question: str) -> list[str]:
    """The words of a question that carry meaning, without those that only say what kind of answer it expects."""
    question = _DEGREE.sub("", question)
    return [word for word in _WORD.findall(question) if word.lower() not in _KIND_WORDS | _FUNCTION]


def topical(question: str) -> list[str]:
    """The same as `content` gives them."""
    return content(" ".join(topical_words(question)))


@lru_cache(50_000)
def alike(a: str, b: str) -> bool:
    """Whether two stems are of one word family: own and owner, member and membership."""
    if _DAYS.get(a, a) == b:
        return True
    short, long = sorted((a, b), key=len)
    return len(short) >= 3 and long.startswith(short) and long[len(short) :] in _DERIVED


def names(text: str, first: bool = False) -> set[str]:
    """Words with a capital letter; without `first`, not those that only begin a sentence."""
    found = set()
    for match in _WORD.finditer(text):
        if not match[0][0].isupper() or match[0].lower() in _FUNCTION:
            continue
        left = text[: match.start()].rstrip(" \"'“‘(*-")
        begins = not left or left[-1] in ".!?:"
        if first or not begins or re.match(r"\s+[A-Z]", text[match.end() :]):
            found.add(re.sub(r"['’]s$", "", match[0]).lower())
    return found
