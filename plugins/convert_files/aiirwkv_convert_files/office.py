"""Word, PowerPoint and Excel files of the zipped XML kind."""

from __future__ import annotations

import datetime
import io
import itertools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .markup import write_html
from .output import Output

STYLES = "p[style-name='Title'] => h1:fresh\np[style-name='Subtitle'] => p:fresh"
MATHS = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


def read_docx(path: Path, name: str, out: Output) -> None:
    import mammoth  # type: ignore[import-untyped]

    with path.open("rb") as file:
        html = mammoth.convert_to_html(
            with_formulas(file), style_map=STYLES, convert_image=lambda image: [], ignore_empty_paragraphs=True
        ).value
    with zipfile.ZipFile(path) as archive:
        if "docProps/core.xml" in archive.namelist():
            out.title = core_title(archive.read("docProps/core.xml"))
    write_html(html, out)


def with_formulas(file: io.BufferedReader) -> io.BufferedIOBase:
    """The document with formulas as plain runs of their characters, which would be left out otherwise."""
    with zipfile.ZipFile(file) as archive:
        document = archive.read("word/document.xml")
        if b"oMath" not in document:
            file.seek(0)
            return file
        from lxml import etree  # type: ignore[import-untyped]

        root = etree.fromstring(document, etree.XMLParser(resolve_entities=False, no_network=True))
        for formula in list(root.iter(f"{MATHS}oMath")):
            run = etree.Element(f"{WORD}r")
            etree.SubElement(run, f"{WORD}t").text = "".join(part.text or "" for part in formula.iter(f"{MATHS}t"))
            run.tail = formula.tail
            formula.getparent().replace(formula, run)
        for display in list(root.iter(f"{MATHS}oMathPara")):
            display.tag = f"{WORD}hyperlink"  # a harmless wrapper of runs
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as target:
            for entry in archive.infolist():
                data = etree.tostring(root) if entry.filename == "word/document.xml" else archive.read(entry)
                target.writestr(entry.filename, data)
    copy.seek(0)
    return copy


def core_title(xml: bytes) -> str:
    from lxml import etree

    root = etree.fromstring(xml, etree.XMLParser(resolve_entities=False, no_network=True, recover=True))
    return " ".join(root.xpath("string(//*[local-name()='title'])").split()) if root is not None else ""


def read_pptx(path: Path, name: str, out: Output) -> None:
    """Each slide is a page: its title as a heading, text, tables, charts' numbers and the speaker's notes."""
    from pptx import Presentation

    deck = Presentation(str(path))
    out.title = deck.core_properties.title or ""
    for slide in deck.slides:
        start = out.position
        title = slide.shapes.title
        if title is not None and title.has_text_frame and title.text_frame.text.strip():
            out.markdown(f"## {' '.join(title.text_frame.text.split())}\n\n")
        for shape in flatten(slide.shapes):
            if title is not None and shape.shape_id == title.shape_id:
                continue
            if shape.has_text_frame and shape.text_frame.text.strip():
                out.write(shape.text_frame.text.strip() + "\n\n")
            if getattr(shape, "has_table", False):
                out.table([cell.text for cell in row.cells] for row in shape.table.rows)
                out.write("\n")
            if getattr(shape, "has_chart", False):
                out.table(chart_rows(shape.chart))
                out.write("\n")
        if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) is not None and notes.text.strip():
            out.write(f"Notes: {notes.text.strip()}\n\n")
        out.pages += 1
        out.anchor("page", start, page=out.pages)


def flatten(shapes: Iterable[Any]) -> Iterator[Any]:
    """The shapes, those in groups too."""
    for shape in shapes:
        if hasattr(shape, "shapes"):
            yield from flatten(shape.shapes)
        else:
            yield shape


def chart_rows(chart: Any) -> Iterator[list[str]]:
    plots = list(chart.plots)
    yield ["", *(series.name for plot in plots for series in plot.series)]
    columns = [list(series.values) for plot in plots for series in plot.series]
    for row, category in enumerate(plots[0].categories if plots else []):
        yield [str(category), *(cell(column[row]) if row < len(column) else "" for column in columns)]


def read_xlsx(path: Path, name: str, out: Output) -> None:
    """Each sheet is a heading and a table of values; a formula that was never computed is shown as it is."""
    from openpyxl import load_workbook  # type: ignore[import-untyped]

    # as open files, since openpyxl refuses a path whose suffix it does not know
    book = load_workbook(path.open("rb"), read_only=True, data_only=True)
    formulas = load_workbook(path.open("rb"), read_only=True) if has_formulas(path) else None
    out.title = book.properties.title or ""
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # what a file says of its size is often wrong
        values = sheet.iter_rows(values_only=True)
        if formulas is not None:
            twin = formulas[sheet.title]
            twin.reset_dimensions()
            values = merged(values, twin.iter_rows(values_only=True))
        rows = ([cell(value) for value in row] for row in values)
        if (first := next((row for row in rows if any(row)), None)) is None:
            out.warnings.append(f"sheet {sheet.title!r} is empty")
            continue
        out.markdown(f"## {' '.join(sheet.title.split())}\n\n")
        out.table(itertools.chain([first], rows), sheet.title)
        out.write("\n")


def has_formulas(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        sheets = [name for name in archive.namelist() if name.startswith("xl/worksheets/") and name.endswith(".xml")]
        for name in sheets:
            with archive.open(name) as file:
                tail = b""
                while block := file.read(1 << 20):
                    if b"<f>" in tail + block or b"<f " in tail + block:
                        return True
                    tail = block[-2:]
    return False


def merged(values: Iterable[tuple[Any, ...]], formulas: Iterable[tuple[Any, ...]]) -> Iterator[list[Any]]:
    for row, twin in zip(values, formulas, strict=False):
        yield [formula if value is None else value for value, formula in zip(row, twin, strict=False)]


def cell(value: Any) -> str:
    """A cell as a person reads it: nothing for nothing, 3 for 3.0, a date without midnight."""
    if value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ", "seconds")
    return str(getattr(value, "text", value))  # an array formula keeps its text
