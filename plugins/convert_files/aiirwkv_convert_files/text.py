"""Files that are text: plain, markdown, tables, JSON. Read in blocks, so that size costs no memory."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from .encodings import encoding_of
from .output import Output

BLOCK = 1 << 20
LONG = 2000  # characters: a JSON file with a longer line is laid out anew


def open_text(path: Path, out: Output, newline: str | None = None) -> TextIOWrapper:
    """The file as text in its encoding."""
    encoding = encoding_of(path)
    if encoding not in ("utf-8", "utf-8-sig"):
        out.warnings.append(f"read as {encoding}")
    return path.open(encoding=encoding, errors="replace", newline=newline)


def read_text(path: Path, name: str, out: Output) -> None:
    with open_text(path, out) as file:
        while block := file.read(BLOCK):
            out.write(block)


def read_markdown(path: Path, name: str, out: Output) -> None:
    with open_text(path, out) as file:
        first = file.readline(BLOCK)
        if first.rstrip() == "---":  # front matter: its end is no underline of a heading
            out.write(first)
            while line := file.readline(BLOCK):
                out.write(line)
                if found := re.match(r"title:\s*[\"']?(.*?)[\"']?\s*$", line):
                    out.title = found[1]
                if line.rstrip() in ("---", "..."):
                    break
        else:
            out.markdown(first)
        while line := file.readline(BLOCK):
            out.markdown(line)


def read_table(path: Path, name: str, out: Output) -> None:
    """CSV and the like as one markdown table; the delimiter is the one that the first lines agree on."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path, out, newline="") as file:
        sample = "".join(file.readline(BLOCK) for _ in range(20))
        try:
            dialect: type[csv.Dialect] = csv.Sniffer().sniff(sample, ",;\t|")
        except csv.Error:
            dialect = csv.excel_tab if "\t" in sample else csv.excel
        file.seek(0)
        out.table(csv.reader((line.replace("\0", "") for line in file), dialect))


def read_json(path: Path, name: str, out: Output) -> None:
    """As it is, unless that hides its text: `\\u4e2d` becomes the character, and an endless line is laid out."""
    with open_text(path, out) as file:
        lines = file.readlines()
    if not any("\\u" in line or len(line) > LONG for line in lines):
        out.write("".join(lines))
        return
    try:
        for record in records(lines):
            out.write(json.dumps(record, ensure_ascii=False, indent=None if len(lines) > 1 else 1) + "\n")
    except (ValueError, RecursionError) as error:
        if not out.position:  # nothing is laid out yet
            out.write("".join(lines))
        out.warnings.append(f"not valid JSON ({error}); read as plain text")


def records(lines: list[str]) -> Iterator[object]:
    """One document, or one per line."""
    try:
        whole = json.loads("".join(lines))
    except ValueError:
        if len(lines) < 2:
            raise
        yield from [json.loads(line) for line in lines if line.strip()]
    else:
        yield whole
