"""PDF: text page by page, headings from the outline; says how many pages are only pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .output import Output, Unreadable

FEW = 16  # letters: a page with fewer, and a picture, was scanned
OUTLINES = 100  # shapes: a page with as many and no text is text drawn as curves


def read_pdf(path: Path, name: str, out: Output) -> None:
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("the PDF is password-protected; save it without a password") from error
        if "Success" in str(error):  # how PDFium says that it found nothing to show
            raise Unreadable("the PDF has no pages") from error
        raise Unreadable(f"damaged: the PDF is cut off or broken ({error})") from error
    with pdf:
        title = pdf.get_metadata_value("Title").strip("\0 ")
        out.title = "" if title.lower() == "untitled" else title
        scanned = broken = 0
        for number in range(len(pdf)):
            try:
                page = pdf[number]
                text = page_text(page)
                scanned += len("".join(text.split())) < FEW and drawn(page)
                page.close()
            except pypdfium2.PdfiumError:
                text = ""
                broken += 1
            out.page(text)
        outline(pdf, out)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2048))
        if b"%%EOF" not in file.read():
            out.warnings.append("the file seems to be cut off; pages may be missing")
    if broken == out.pages:
        raise Unreadable("damaged: no page of the PDF can be read")
    if broken:
        out.warnings.append(f"{broken} of {out.pages} pages are damaged and left out")
    if scanned:
        out.scanned = scanned
        out.warnings.append(f"{scanned} of {out.pages} pages have no text; OCR is needed")


def page_text(page: Any) -> str:
    """The text in reading order, lines as they are set; a word that was hyphenated at a line's end is joined."""
    text: str = page.get_textpage().get_text_bounded(errors="replace")
    return re.sub("[\ufffe\x02](\r?\n)?", "", text).strip()


def drawn(page: Any) -> bool:
    """Whether the page shows something besides text: a picture, or text as curves."""
    from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE

    kinds = [thing.type for thing in page.get_objects(max_depth=3)]
    return FPDF_PAGEOBJ_IMAGE in kinds or len(kinds) > OUTLINES


def outline(pdf: Any, out: Output) -> None:
    """Headings from the outline: at their words on the page, where they stand there, else at the page's beginning."""
    pages = [anchor for anchor in out.anchors if anchor["kind"] == "page"]
    if not any(True for _ in pdf.get_toc(max_depth=1)):
        return
    out.file.flush()
    text = Path(out.file.name).read_text(encoding="utf-8")
    for entry in pdf.get_toc(max_depth=6):
        target = entry.get_dest()
        number = target.get_index() if target else None
        title = " ".join(entry.get_title().split())
        if number is None or number >= len(pages) or not title:
            continue
        page = pages[number]
        found = re.compile(r"\s+".join(map(re.escape, title.split()))).search(text, page["start"], page["end"])
        out.heading(entry.level + 1, title, found.start() if found else page["start"])
