"""Every kind of file gives its text with places in it; every bad file gives a reason that a person understands."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiirwkv.errors import BadRequest, NotFound
from aiirwkv.testing import running
from aiirwkv.types import Convert, Converted
from aiirwkv_convert_files import ConvertFiles

from .samples import archive, docx, epub, pdf, repacked, saved

Read = Callable[..., Awaitable[Converted]]


@pytest.fixture
async def read(tmp_path: Path) -> AsyncIterator[Read]:
    """Converts bytes under a name, over the bus; the text is filled in from its object."""
    async with running({"convert_files": ConvertFiles(seconds=20)}, tmp_path) as bus:

        async def convert(data: bytes, name: str, media_type: str = "") -> Converted:
            stored = await bus.put(data, name, media_type)
            reply = await bus.call(Convert(stored.id))
            if reply.object:
                reply.text = (await bus.read(reply.object)).decode()
            return reply

        yield convert


def places(reply: Converted, kind: str) -> list[tuple[Any, str]]:
    """(page, title) and the text of each anchor of a kind."""
    return [(a.page or a.title, reply.text[a.start : a.end]) for a in reply.anchors if a.kind == kind]


# text


async def test_plain_text_is_kept_as_it_is(read: Read) -> None:
    reply = await read("Line one.\r\nZeile zwei: schön 😀\n第三行\n".encode(), "notes.txt")
    assert reply.text == "Line one.\nZeile zwei: schön 😀\n第三行\n"
    assert reply.media_type == "text/plain" and not reply.warnings


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("gb18030", "九点开门。\n"),
        ("gb18030", "营业时间"),
        ("gb18030", "名称,价格\n苹果,3.5\n"),
        ("gb18030", "博物馆的营业时间是上午九点到下午五点，星期一闭馆。" * 20),
        ("big5", "營業時間為上午九點至下午五點，星期一公休。"),
        ("big5", "電腦檔案"),
        ("latin-1", "Das Café schließt um fünf Uhr."),
        ("cp1252", "“Déjà vu” – 30 €"),
        ("utf-16", "文档 and words"),
        ("utf-16-le", "Opening hours: 9 to 5\n"),
        ("utf-16-be", "营业时间 9 点\n"),
        ("utf-8-sig", "With a mark: é"),
        ("utf-32", "Wide: é"),
        ("euc_kr", "박물관은 아침 아홉 시에 열고 저녁 다섯 시에 닫습니다."),
        ("cp1251", "Время работы музея с девяти до пяти, кроме понедельника."),
    ],
)
async def test_an_encoding_is_found_for_short_texts_too(read: Read, encoding: str, text: str) -> None:
    assert (await read(text.encode(encoding), "a.txt")).text == text


async def test_a_few_broken_bytes_do_not_make_mojibake_of_the_rest(read: Read) -> None:
    reply = await read("Größe und Länge, schön. ".encode() * 50 + b"\xff\xfe", "a.txt")
    assert reply.text.startswith("Größe und Länge") and reply.text.endswith("\ufffd\ufffd")
    assert "2 characters could not be read" in reply.warnings[0]


async def test_markdown_headings_span_their_sections(read: Read) -> None:
    text = "---\ntitle: Guide\n---\nIntro\n\n# One\na\n```\n# no heading\n```\n## Two\nb\n\nThree\n=====\nc\n"
    reply = await read(text.encode(), "guide.md")
    assert reply.text == text and reply.title == "Guide"
    assert [(a.level, a.title) for a in reply.anchors] == [(1, "One"), (2, "Two"), (1, "Three")]
    assert places(reply, "heading")[0][1] == text[text.index("# One") : text.index("Three")]
    assert places(reply, "heading")[1][1] == "## Two\nb\n\n"


async def test_csv_is_a_table_whatever_its_delimiter(read: Read) -> None:
    reply = await read(b'name;price\napple;3,50\n"pear | green";"4\n5"\n', "prices.csv")
    assert reply.text == "| name | price |\n| --- | --- |\n| apple | 3,50 |\n| pear \\| green | 4 5 |\n"
    assert places(reply, "table") == [("", reply.text)]


async def test_json_is_kept_unless_it_hides_its_text(read: Read) -> None:
    assert (await read(b'{"price": 1.10}', "a.json")).text == '{"price": 1.10}'
    assert '"城市": "北京"' in (await read(rb'{"\u57ce\u5e02": "\u5317\u4eac"}', "a.json")).text
    lines = (await read(b'{"a": "\\u4e2d"}\n\n{"a": 2}\n', "a.jsonl")).text
    assert lines == '{"a": "中"}\n{"a": 2}\n'
    broken = await read(rb'{"a": "\u4e2d", ', "a.json")
    assert broken.text == r'{"a": "\u4e2d", ' and "not valid JSON" in broken.warnings[0]


async def test_source_code_and_unknown_names_are_text(read: Read) -> None:
    assert (await read(b"def f():\n\treturn 1\n", "f.py")).text == "def f():\n\treturn 1\n"
    assert (await read(b"all:\n\tmake it\n", "Makefile")).text == "all:\n\tmake it\n"


# pages


async def test_pdf_pages_and_outline_are_found_again(read: Read) -> None:
    data = pdf(
        ["First page\nHours: nine to five", "", "Third\nPrices"], title="A guide", outline=["Hours", "x", "Prices"]
    )
    reply = await read(data, "guide.pdf")
    assert reply.pages == 3 and reply.title == "A guide" and not reply.warnings
    assert places(reply, "page") == [(1, "First page\nHours: nine to five"), (2, ""), (3, "Third\nPrices")]
    headings = [(title, text[:6]) for title, text in places(reply, "heading")]
    assert headings == [("Hours", "Hours:"), ("x", "\n\nThir"), ("Prices", "Prices")]


async def test_scanned_pages_are_counted(read: Read) -> None:
    mixed = await read(pdf(["A page with enough words on it", None, None]), "scan.pdf")
    assert mixed.warnings == ["2 of 3 pages have no text; OCR is needed"] and "enough words" in mixed.text
    whole = await read(pdf([None]), "scan.pdf")
    assert whole.warnings == ["1 of 1 pages have no text; OCR is needed"] and not whole.text.strip()


# office and the web


async def test_docx_keeps_headings_tables_and_formulas(read: Read) -> None:
    space = "http://schemas.openxmlformats.org/officeDocument/2006/math"
    formula = f'<m:oMath xmlns:m="{space}"><m:r><m:t>E=mc²</m:t></m:r></m:oMath>'
    data = docx(
        ("Title", "The museum"),
        ("Normal", "Open snake_case *daily*."),
        ("Heading 1", "Prices"),
        ("List Bullet", "Adults: 8 €"),
        table=[["who", "price"], ["child", "3"]],
    )
    reply = await read(data, "museum.docx")
    assert [(a.level, a.title) for a in reply.anchors if a.kind == "heading"] == [(1, "The museum"), (1, "Prices")]
    assert "Open snake_case *daily*." in reply.text and "- Adults: 8 €" in reply.text
    assert "| who | price |\n| --- | --- |\n| child | 3 |" in reply.text
    assert "Energy: E=mc²" in (await read(docx(("Normal", "Energy: "), extra=formula), "energy.docx")).text


async def test_xlsx_has_no_noise(read: Read) -> None:
    import datetime

    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = "Price list"
    for row in (
        ["item", "price", "since", None],
        ["tea", 3.0, datetime.datetime(2024, 5, 1), None],
        [],
        ["cake", 4.25],
    ):
        sheet.append(row)
    sheet.append(["sum", "=B2+B4"])
    book.create_sheet("Empty")
    reply = await read(saved(book), "prices.xlsx")
    assert reply.text == (
        "## Price list\n\n| item | price | since |\n| --- | --- | --- |\n| tea | 3 | 2024-05-01 |\n"
        "| cake | 4.25 |  |\n| sum | =B2+B4 |  |\n\n"
    )
    assert [title for title, _ in places(reply, "table")] == ["Price list"]
    assert reply.warnings == ["sheet 'Empty' is empty"]


async def test_pptx_slides_are_pages(read: Read) -> None:
    from pptx import Presentation
    from pptx.util import Inches

    deck = Presentation()
    for number in (1, 2):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text = f"Slide {number}"
        slide.placeholders[1].text = f"Point {number}"
        slide.notes_slide.notes_text_frame.text = f"Say {number}"
    grid = slide.shapes.add_table(1, 2, Inches(1), Inches(1), Inches(3), Inches(1)).table
    grid.cell(0, 0).text, grid.cell(0, 1).text = "tea", "3"
    reply = await read(saved(deck), "talk.pptx")
    assert reply.pages == 2
    assert places(reply, "page")[0] == (1, "## Slide 1\n\nPoint 1\n\nNotes: Say 1\n\n")
    assert "| tea | 3 |" in places(reply, "page")[1][1]
    assert [title for title, _ in places(reply, "heading")] == ["Slide 1", "Slide 2"]


async def test_html_without_script_style_and_navigation(read: Read) -> None:
    html = (
        "<!doctype html><html><head><title>The page</title><style>p{color:red}</style></head><body>"
        "<nav><a href='/'>Home</a></nav><h1>Hours</h1><script>steal()</script><p>Open <b>daily</b>, "
        "see <a href='https://example.org/x'>here</a> or <a href='javascript:steal()'>there</a>."
        "<img src='data:image/png;base64,AAAA' alt='a door'></p>"
        "<table><tr><td>tea</td><td>3</td></tr></table></body></html>"
    )
    reply = await read(html.encode(), "page.html")
    assert reply.title == "The page"
    assert reply.text.startswith("# Hours\n\nOpen **daily**, see [here](https://example.org/x) or there.a door\n\n")
    assert "| tea | 3 |" in reply.text
    assert not any(word in reply.text for word in ("steal", "color", "Home", "base64"))


async def test_html_in_its_declared_encoding(read: Read) -> None:
    html = "<html><head><meta charset='shift_jis'></head><body><p>営業時間</p></body></html>"
    assert (await read(html.encode("shift_jis"), "page.htm")).text == "営業時間\n\n"


async def test_deeply_nested_html_keeps_its_text(read: Read) -> None:
    reply = await read(b"<html><body>" + b"<div>" * 20_000 + b"deep down" + b"</div>" * 20_000, "deep.html")
    assert "deep down" in reply.text


async def test_epub_in_the_order_of_its_spine(read: Read) -> None:
    reply = await read(epub(), "book.epub")
    assert reply.text == "# Dawn\n\nDie Sonne geht auf: schön.\n\n# Dusk\n\nThe lamp is lit.\n\n"
    assert reply.title == "Two Chapters"


async def test_mail(read: Read) -> None:
    from email.message import EmailMessage

    mail = EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = "Öffnungszeiten", "a@example.org", "b@example.org"
    mail.set_content("Wir öffnen um neun.")
    mail.add_attachment(b"x", maintype="application", subtype="pdf", filename="plan.pdf")
    reply = await read(mail.as_bytes(), "hours.eml")
    assert reply.text.startswith("Subject: Öffnungszeiten\nFrom: a@example.org\n")
    assert "Wir öffnen um neun." in reply.text
    assert reply.warnings == ["1 attachments are not read: plan.pdf"]


# by content, not by name


async def test_a_wrong_suffix_is_seen_through(read: Read) -> None:
    assert (await read(b"Just words.", "words.pdf")).media_type == "text/plain"
    assert "Hello" in (await read(docx(("Normal", "Hello")), "letter.pdf")).text
    assert (await read(pdf(["A page of text"]), "page.docx")).pages == 1
    assert (await read(b"<html><p>Hi</p></html>", "page.txt")).text == "Hi\n\n"


async def test_the_media_type_helps_when_the_name_does_not(read: Read) -> None:
    assert (await read(b"# Title\n", "download", "text/markdown; charset=utf-8")).anchors[0].title == "Title"


# what cannot be read

WORDS = docx(("Normal", "Hello world"))


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n\t", "no text"),
        ("noise.txt", random.Random(1).randbytes(2600), "not text"),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(100), r"an image.*Supported: pdf, docx"),
        ("old.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "old Office format"),
        (
            "locked.docx",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"),
            "password-protected",
        ),
        ("things.zip", archive(("a.txt", b"words")), "unpack it first. Supported"),
        ("cut.docx", WORDS[: len(WORDS) // 2], "damaged"),
        ("broken.docx", repacked(WORDS, {"word/document.xml": b"<w:document"}), "damaged"),
        ("cut.pdf", pdf(["some words " * 5] * 3)[:300], "damaged"),
        ("junk.pdf", b"%PDF-1.7\n" + random.Random(2).randbytes(500), "damaged"),
        ("locked.pdf", pdf(["secret words"], password="open sesame"), "password-protected"),
        ("rich.rtf", b"{\\rtf1 words}", "save it as docx"),
    ],
)
async def test_a_bad_file_gives_a_reason(read: Read, name: str, data: bytes, reason: str) -> None:
    with pytest.raises(BadRequest, match=rf"cannot read {name}: .*({reason})") as caught:
        await read(data, name)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


async def test_a_pdf_without_pages(read: Read) -> None:
    data = (
        b"%PDF-1.4\n1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n2 0 obj\n<</Type/Pages/Kids[]/Count 0>>\nendobj\n"
    )
    starts = (0, data.index(b"1 0 obj"), data.index(b"2 0 obj"))
    table = b"".join(b"%010d %05d %c \n" % (start, 0 if start else 65535, b"n" if start else b"f") for start in starts)
    data += b"xref\n0 3\n" + table + b"trailer\n<</Size 3/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % len(data)
    with pytest.raises(BadRequest, match="the PDF has no pages"):
        await read(data, "none.pdf")


async def test_a_zip_bomb_is_not_unpacked(read: Read) -> None:
    bomb = repacked(WORDS, {"word/media/zeros.bin": bytes(200 << 20)})
    assert len(bomb) < 1 << 20
    start = time.perf_counter()
    with pytest.raises(BadRequest, match="zip bomb"):
        await read(bomb, "bomb.docx")
    assert time.perf_counter() - start < 5


async def test_too_many_parts(read: Read) -> None:
    with pytest.raises(BadRequest, match="10001 parts"):
        await read(archive(*((str(number), b"") for number in range(10_001))), "parts.xlsx")


async def test_an_entity_bomb_is_harmless(read: Read) -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    xml = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e0 "lol">{entities}]><w:document>&e11;</w:document>'
    with pytest.raises(BadRequest, match=r"cannot read lol\.docx"):
        await read(repacked(WORDS, {"word/document.xml": xml.encode()}), "lol.docx")


# limits


async def test_too_much_memory_is_said(tmp_path: Path) -> None:
    data = b'["' + b"\\u4e2d" * (20 << 20) + b'"]'
    async with running({"convert_files": ConvertFiles(memory=256 << 20)}, tmp_path) as bus:
        stored = await bus.put(data, "huge.json")
        with pytest.raises(BadRequest, match=r"needs more than 256 MB of memory"):
            await bus.call(Convert(stored.id))


async def test_too_much_time_is_said_and_the_child_ends(tmp_path: Path) -> None:
    slow = docx(("Normal", "word"))
    paragraph = b"<w:p><w:r><w:t>many</w:t></w:r></w:p>"
    with zipfile.ZipFile(io.BytesIO(slow)) as archive:
        document = archive.read("word/document.xml").replace(b"<w:body>", b"<w:body>" + paragraph * 300_000)
    async with running({"convert_files": ConvertFiles(seconds=1)}, tmp_path) as bus:
        stored = await bus.put(repacked(slow, {"word/document.xml": document}), "slow.docx")
        start = time.perf_counter()
        with pytest.raises(BadRequest, match="longer than 1 seconds"):
            await bus.call(Convert(stored.id))
        assert time.perf_counter() - start < 10


async def test_long_text_comes_as_an_object_and_costs_little_memory(read: Read) -> None:
    reply = await read("Ein Satz über alles. ".encode() * 200_000, "long.txt")
    assert reply.object and len(reply.text) == 4_200_000


async def test_one_endless_line(tmp_path: Path) -> None:
    async with running({"convert_files": ConvertFiles(memory=256 << 20)}, tmp_path) as bus:
        stored = await bus.put(b"x" * (30 << 20), "line.md")
        reply = await bus.call(Convert(stored.id), timeout=60)
        assert (await bus.get(reply.object, tmp_path / "out")).size == 30 << 20


def test_a_text_file_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("Opening hours: nine to five.")
    code = (
        "import sys; from pathlib import Path; from aiirwkv_convert_files.child import read\n"
        "read(Path(sys.argv[1], 'file'), Path(sys.argv[1], 'text'), 'a.txt', '')\n"
        "heavy = {'bs4', 'lxml', 'mammoth', 'openpyxl', 'pptx', 'pypdfium2', 'charset_normalizer', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "text").read_text() == "Opening hours: nine to five."


async def test_nothing_there(tmp_path: Path) -> None:
    async with running({"convert_files": ConvertFiles()}, tmp_path) as bus:
        with pytest.raises(NotFound):
            await bus.call(Convert("no-such-object"))


async def test_what_it_takes_is_told(tmp_path: Path) -> None:
    async with running({"convert_files": ConvertFiles()}, tmp_path) as bus:
        about = await bus.about("convert", "convert_files")
    assert {".pdf", ".docx", ".txt", ".py"} <= set(about["suffixes"])
    assert "application/pdf" in about["media_types"]
