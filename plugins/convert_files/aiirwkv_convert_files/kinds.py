"""What a file is: by its content where that is clear, else by its name or media type."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from .output import Unreadable

MEDIA_TYPES = {
    "text": "text/plain",
    "markdown": "text/markdown",
    "html": "text/html",
    "table": "text/csv",
    "json": "application/json",
    "mail": "message/rfc822",
    "pdf": "application/pdf",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "epub": "application/epub+zip",
}
"""Kind of file to media type."""

ALIASES = {
    "text/x-markdown": "markdown",
    "application/xhtml+xml": "html",
    "text/tab-separated-values": "table",
    "application/jsonl": "json",
    "application/x-ndjson": "json",
}
"""Further media types."""

PLAIN = """
.txt .text .log .rst .adoc .tex .bib .srt .vtt .xml .yaml .yml .toml .ini .cfg .conf .properties .diff .patch
.py .pyi .js .mjs .ts .tsx .jsx .java .kt .scala .c .h .cc .cpp .hpp .cu .cs .go .rs .rb .php .pl .lua .r .jl .m .swift
.dart .hs .ml .ex .erl .clj .lisp .sql .sh .bash .zsh .ps1 .bat .css .scss .vue .svelte .proto .graphql .cmake .gradle
"""

SUFFIXES = {
    **dict.fromkeys([".md", ".markdown", ".mdx"], "markdown"),
    **dict.fromkeys([".html", ".htm", ".xhtml"], "html"),
    **dict.fromkeys([".csv", ".tsv"], "table"),
    **dict.fromkeys([".json", ".jsonl", ".ndjson", ".ipynb"], "json"),
    ".eml": "mail",
    ".pdf": "pdf",
    **dict.fromkeys([".docx", ".docm"], "docx"),
    **dict.fromkeys([".pptx", ".pptm"], "pptx"),
    **dict.fromkeys([".xlsx", ".xlsm"], "xlsx"),
    ".epub": "epub",
    **dict.fromkeys(PLAIN.split(), "text"),
}
"""Suffix to kind of file; source code is text."""

SUPPORTED = "pdf, docx, pptx, xlsx, epub, html, md, txt, csv, json, jsonl, eml and source code"
BINARY = {"pdf", "docx", "pptx", "xlsx", "epub"}
MEMBERS = {"word/document.xml": "docx", "ppt/presentation.xml": "pptx", "xl/workbook.xml": "xlsx"}
FOREIGN = {
    b"{\\rtf": "a rich text file; save it as docx or pdf",
    b"%!PS": "a PostScript file; save it as pdf",
    b"\x89PNG": "an image; text in images is read by an OCR plugin",
    b"\xff\xd8\xff": "an image; text in images is read by an OCR plugin",
    b"GIF8": "an image; text in images is read by an OCR plugin",
    b"\x1f\x8b": "a compressed file; unpack it first",
    b"7z\xbc\xaf": "a compressed file; unpack it first",
    b"Rar!": "a compressed file; unpack it first",
}
COMPOUND = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # Word 97 and friends; also what holds an encrypted docx

MAX_ENTRIES, MAX_TOTAL, MAX_RATIO = 10_000, 512 << 20, 100
SMALL = 16 << 20  # whatever its ratio, this much does no harm


def kind_of(path: Path, name: str = "", media_type: str = "") -> str:
    """The kind of a file, a key of `MEDIA_TYPES`. Unreadable: it is empty, encrypted, a bomb, or of no kind we read."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise Unreadable("the file is empty")
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        return zipped(path)
    if head.startswith(COMPOUND):
        if "EncryptedPackage".encode("utf-16-le") in path.read_bytes():
            raise Unreadable("the file is password-protected; save it without a password")
        raise Unreadable("this is an old Office format (doc, xls, ppt); save it as docx, xlsx or pptx")
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise Unreadable(f"this is {what}. Supported: {SUPPORTED}")
    suffix = Path(name).suffix.lower()
    kind = SUFFIXES.get(suffix) or by_media_type(media_type) or "text"
    if kind in BINARY:  # named like one, but its content is not
        kind = "text"
    if kind == "text" and re.match(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html)", head, re.IGNORECASE):
        return "html"
    return kind


def by_media_type(media_type: str) -> str | None:
    plain = media_type.partition(";")[0].strip().lower()
    return next((kind for kind, known in MEDIA_TYPES.items() if known == plain), ALIASES.get(plain))


def zipped(path: Path) -> str:
    """The kind of a zip archive, after a look at what it would unpack to."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            mimetype = archive.open("mimetype").read(100) if "mimetype" in names else b""
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise Unreadable(f"damaged: the file is cut off or broken ({error})") from error
    total, packed = sum(entry.file_size for entry in entries), path.stat().st_size
    if len(entries) > MAX_ENTRIES:
        raise Unreadable(f"the file holds {len(entries)} parts, more than {MAX_ENTRIES}; this looks like a zip bomb")
    if total > MAX_TOTAL or (total > SMALL and total > packed * MAX_RATIO):
        raise Unreadable(f"the file unpacks from {size(packed)} to {size(total)}; this looks like a zip bomb")
    if any(entry.flag_bits & 1 for entry in entries):
        raise Unreadable("the file is password-protected; save it without a password")
    for member, kind in MEMBERS.items():
        if member in names:
            return kind
    if mimetype.startswith(b"application/epub+zip") or "META-INF/container.xml" in names:
        return "epub"
    raise Unreadable(f"this is a zip archive of no kind that can be read; unpack it first. Supported: {SUPPORTED}")


def size(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GB"
