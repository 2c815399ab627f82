"""Small files of every kind, made on the spot."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import Any


def pdf(pages: Sequence[str | None], password: str = "", title: str = "", outline: Sequence[str] = ()) -> bytes:
    """A PDF with a page per text; None makes a page that is only a picture."""
    from reportlab.lib.pagesizes import A5
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfgen.canvas import Canvas

    file = io.BytesIO()
    canvas = Canvas(file, A5, encrypt=password or None, invariant=1)
    canvas.setTitle(title)
    for number, page in enumerate(pages):
        if page is None:
            canvas.drawImage(ImageReader(picture()), 20, 20, 300, 300)
        else:
            lines = canvas.beginText(40, 500)
            lines.textLines(page)
            canvas.drawText(lines)
        if number < len(outline):
            canvas.bookmarkPage(f"p{number}")
            canvas.addOutlineEntry(outline[number], f"p{number}", 0)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def picture() -> Any:
    from PIL import Image

    return Image.effect_noise((64, 64), 50)


def docx(*parts: tuple[str, str], table: Sequence[Sequence[str]] = (), extra: str = "") -> bytes:
    """A Word file of (style, text) paragraphs; `extra` is XML put at its end."""
    from docx import Document
    from docx.oxml import parse_xml

    document = Document()
    for style, text in parts:
        document.add_paragraph(text, style)
    if table:
        grid = document.add_table(0, len(table[0]))
        for row in table:
            for cell, text in zip(grid.add_row().cells, row, strict=True):
                cell.text = text
    if extra:
        document.paragraphs[-1]._p.append(parse_xml(extra))
    return saved(document)


def saved(document: Any) -> bytes:
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def archive(*members: tuple[str, bytes]) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, data in members:
            new.writestr(name, data)
    return file.getvalue()


def repacked(data: bytes, members: dict[str, bytes]) -> bytes:
    """A zip archive with some members replaced."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in {**dict.fromkeys(old.namelist()), **members}:
            new.writestr(name, members[name] if name in members else old.read(name))
    return file.getvalue()


def epub() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        )
        book.writestr(
            "OEBPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
            '<dc:title>Two Chapters</dc:title></metadata><manifest><item id="a" href="one.xhtml"/>'
            '<item id="b" href="text/two%20b.xhtml"/></manifest>'
            '<spine><itemref idref="b"/><itemref idref="a"/></spine></package>',
        )
        page = '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><body>{}</body></html>'
        book.writestr("OEBPS/one.xhtml", page.format("<h1>Dusk</h1><p>The lamp is lit.</p>"))
        book.writestr("OEBPS/text/two b.xhtml", page.format("<h1>Dawn</h1><p>Die Sonne geht auf: schön.</p>"))
    return file.getvalue()
