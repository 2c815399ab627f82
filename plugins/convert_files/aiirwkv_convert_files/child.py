"""
Reads one file in a process that may be killed: `python -m aiirwkv_convert_files.child FILE FOLDER MEMORY SECONDS`.

The file's name and media type come as JSON on standard input. In FOLDER it leaves `text` and `result.json`: what
`aiirwkv.types.Converted` says besides the text, or {"error": why not}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .kinds import MEDIA_TYPES, kind_of, size
from .markup import read_epub, read_html, read_mail
from .office import read_docx, read_pptx, read_xlsx
from .output import Output, Unreadable
from .pdf import read_pdf
from .text import read_json, read_markdown, read_table, read_text

READERS: dict[str, Callable[[Path, str, Output], None]] = {
    "text": read_text,
    "markdown": read_markdown,
    "html": read_html,
    "table": read_table,
    "json": read_json,
    "mail": read_mail,
    "pdf": read_pdf,
    "docx": read_docx,
    "pptx": read_pptx,
    "xlsx": read_xlsx,
    "epub": read_epub,
}
FORBIDDEN = {
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
}


def main() -> None:
    source, folder, memory, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    about = json.load(sys.stdin)
    limit(memory, seconds)
    sys.addaudithook(refuse)
    try:
        result = read(source, folder / "text", about["name"], about["media_type"])
    except Unreadable as error:
        result = {"error": str(error)}
    except MemoryError:
        result = {"error": f"the file needs more than {size(memory)} of memory to read"}
    except Exception as error:
        result = {"error": f"damaged: the file cannot be read ({str(error)[:200] or type(error).__name__})"}
    (folder / "result.json").write_text(json.dumps(result))


def read(source: Path, target: Path, name: str, media_type: str) -> dict[str, Any]:
    kind = kind_of(source, name, media_type)
    out = Output(target)
    READERS[kind](source, name, out)
    out.close()
    if out.blank and not out.scanned:
        raise Unreadable("there is no text in the file")
    if out.lost:
        out.warnings.append(f"{out.lost} characters could not be read and are shown as \ufffd")
    return {
        "anchors": out.anchors,
        "title": out.title[:300],
        "media_type": MEDIA_TYPES[kind],
        "pages": out.pages,
        "scanned": out.scanned,
        "markdown": out.is_markdown,
        "warnings": out.warnings,
    }


def limit(memory: int, seconds: int) -> None:
    """Bounds for this process, where the system has them, and room for others."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only bound
        return
    os.nice(10)
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 5),
        (resource.RLIMIT_FSIZE, memory, memory),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a stricter limit holds already
            resource.setrlimit(what, (soft, hard))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """A parser has no business on the network or with other programs."""
    if event in FORBIDDEN:
        raise PermissionError(f"{event} is not allowed while reading a file")


if __name__ == "__main__":
    main()
