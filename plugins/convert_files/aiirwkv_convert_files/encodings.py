"""Which encoding a text file is in. Short texts count: six Chinese characters must not turn Korean."""

from __future__ import annotations

import codecs
import re
from functools import cache
from pathlib import Path

from .output import NOT_TEXT, Unreadable

SAMPLE = 256 << 10
BLOCK = 1 << 20
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins like UTF-16's, so it is asked first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TYPOGRAPHY = set("‘’‚“”„–—…€£©®™°§«»·•¡¿´×÷±²³½¼¾\xa0\xad†‡‰‹›")
CHINESE_MARKS = set("　、。〈〉《》「」『』【】〔〕（），．！？：；“”‘’—…～·％￥－／＋＝")
# A third of any Chinese text, but a fortieth of Korean that is misread as Chinese.
USUAL = set(
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
    "民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天日"
)
OTHERS = "cp1251 koi8_r shift_jis euc_jp euc_kr big5 gb18030 cp1250 cp1253 cp1254 cp1255 cp1256 cp874 iso8859_2"


def encoding_of(path: Path, declared: str = "") -> str:
    """
    The encoding of a file: by its byte order mark, UTF-8 if it is valid or nearly so, UTF-16, the one that the document
    declares, GB18030, Big5 or Windows-1252 by plausibility, else what charset-normalizer finds. Unreadable: not text.
    """
    with path.open("rb") as file:
        sample = file.read(SAMPLE)
    for mark, name in MARKS.items():
        if sample.startswith(mark):
            return name
    if 0 in sample:
        return utf16(sample)
    bad, good = utf8_errors(path)
    if not bad:
        must_be_text(sample.decode("utf-8", "ignore"))
        return "utf-8"
    if declared and fits(sample, declared):
        return declared
    if bad * 20 < good:
        return "utf-8"
    chinese = {name: chinese_share(sample, name) for name in ("gb18030", "big5hkscs")}
    best = max(chinese, key=lambda name: chinese[name])
    if chinese[best] > 0.8:
        return sibling(sample, best) or best
    if western(sample):
        return "cp1252"
    if chinese[best] > 0.6:
        return best
    for name in ("utf-16-le", "utf-16-be"):  # Chinese without a space or line end holds no NUL
        text = decode(sample, name)
        if sum("\u4e00" <= c <= "\u9fff" or c in CHINESE_MARKS for c in text) > 0.95 * len(text) and USUAL & set(text):
            return name
    from charset_normalizer import from_bytes

    if (match := from_bytes(sample[: 64 << 10], cp_isolation=OTHERS.split()).best()) is None:
        raise Unreadable("this is not text: its bytes are in no known encoding")
    must_be_text(str(match))
    return match.encoding


def decode(sample: bytes, name: str) -> str:
    """The sample as text; a character that the sample's end cuts is left out."""
    return codecs.getincrementaldecoder(name)("replace").decode(sample, final=len(sample) < SAMPLE)


def fits(sample: bytes, name: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(name)().decode(sample, final=len(sample) < SAMPLE)
    except (LookupError, UnicodeError, TypeError):
        return False
    return not NOT_TEXT.search(text)


def utf8_errors(path: Path) -> tuple[int, int]:
    """How many characters of a file are not valid UTF-8, and how many beyond ASCII are."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    bad = good = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            text = decoder.decode(block)
            if not text.isascii():
                wrong = text.count("\ufffd")
                bad += wrong
                good += sum(not c.isascii() for c in text) - wrong if wrong else len(text.encode()) - len(text)
    return bad + decoder.decode(b"", final=True).count("\ufffd"), good


def utf16(sample: bytes) -> str:
    """UTF-16 without a mark: the byte order that gives ASCII and common scripts, if either does."""
    best, share = "", 0.0
    for name in ("utf-16-le", "utf-16-be"):
        text = decode(sample[: len(sample) // 2 * 2], name)
        common = sum(c in "\n\r\t" or " " <= c <= "ӿ" or "\u2010" <= c <= "\u9fff" or c >= "\uff00" for c in text)
        common -= sum("\x7f" <= c <= "\x9f" or c >= "\ufffd" for c in text)
        ascii_too = sum(c.isascii() for c in text) / 1000  # with a NUL in it, right order gives some ASCII
        if (common + ascii_too) / len(text) > share:
            best, share = name, (common + ascii_too) / len(text)
    if share < 0.95:
        raise Unreadable("this is not text: it holds binary data")
    return best


def must_be_text(text: str) -> None:
    if len(NOT_TEXT.findall(text)) * 100 > len(text):
        raise Unreadable("this is not text: it holds binary data")


@cache
def frequent(name: str) -> frozenset[str]:
    """Level 1 of GB 2312 (3 755 characters) or Big5 (5 401): those that the standard calls frequent."""
    if name == "gb18030":
        pairs = [(a, b) for a in range(0xB0, 0xD8) for b in range(0xA1, 0xFF)]
    else:
        trails = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
        pairs = [(a, b) for a in range(0xA4, 0xC7) for b in trails if (a, b) <= (0xC6, 0x7E)]
    return frozenset("".join(bytes(pair).decode(name, "ignore") for pair in pairs)) | CHINESE_MARKS


def chinese_share(sample: bytes, name: str) -> float:
    """The share of frequent Chinese characters among all beyond ASCII; unreadable ones weigh five times."""
    beyond = [c for c in decode(sample, name) if not c.isascii()]
    good = sum(c in frequent(name) for c in beyond)
    return (good - 4 * beyond.count("\ufffd")) / max(1, len(beyond))


def sibling(sample: bytes, name: str) -> str | None:
    """Japanese or Korean, whose EUC encodings share their bytes with Chinese: kana, or Hangul in words with spaces."""
    text = decode(sample, "euc_jp")
    beyond = [c for c in text if not c.isascii()]
    kana = sum("\u3040" <= c <= "\u30ff" for c in beyond) > 0.2 * len(beyond) and "\ufffd" not in text
    if kana and (name == "gb18030" or len(set(text) & set("のにはをがでと")) > 2):  # some Big5 may look like kana
        return "euc_jp"
    if name != "gb18030":
        return None
    chinese = decode(sample, "gb18030")
    text = decode(sample, "euc_kr")
    hangul = sum("가" <= c <= "힣" for c in text)
    if hangul * 20 < sum(not c.isascii() for c in text) * 19 or text.count(" ") * 12 < hangul:
        return None
    return None if sum(c in USUAL for c in chinese) * 8 > len(chinese) else "euc_kr"


def western(sample: bytes) -> bool:
    """Windows-1252, which holds Latin-1: mostly ASCII, the rest letters and typography."""
    text = decode(sample, "cp1252")
    beyond = [c for c in text if not c.isascii()]
    if len(beyond) * 2 > len(text) or NOT_TEXT.search(text):
        return False
    if not all(c.isalpha() or c in TYPOGRAPHY for c in beyond):
        return False
    runs = sum(map(len, re.findall(r"[^\x00-\x7f]{3,}", text)))  # whole words of accents: another alphabet, misread
    return runs * 5 <= len(beyond)
