"""HTML and what is made of it: web pages, e-books, mail. Scripts, styles and navigation are left out."""

from __future__ import annotations

import posixpath
import re
import zipfile
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from urllib.parse import unquote

from .encodings import encoding_of
from .output import Output, Unreadable

NOISE = ["script", "style", "nav", "noscript", "template", "svg", "iframe", "object", "button", "select", "head"]
CHARSET = re.compile(
    rb"""<meta[^>]{0,200}charset=["']?([\w-]+)|<\?xml[^>]{0,200}encoding=["']([\w-]+)""", re.IGNORECASE
)


def read_html(path: Path, name: str, out: Output) -> None:
    with path.open("rb") as file:
        found = CHARSET.search(file.read(4096))
    encoding = encoding_of(path, (found[1] or found[2]).decode() if found else "")
    write_html(path.read_text(encoding, "replace"), out)


def write_html(html: str, out: Output) -> None:
    """Append HTML as markdown; a title that is not known yet is taken from it."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    html = re.sub(r"^\s*<\?xml[^>]*>", "", html)  # a str that declares an encoding is refused by lxml
    soup = BeautifulSoup(html, "lxml")
    if not out.title and soup.title:
        out.title = " ".join(soup.title.get_text().split())
    for tag in soup(NOISE):
        tag.decompose()
    for image in soup("img"):
        image.replace_with(str(image.get("alt") or ""))
    for link in soup("a"):
        if not str(link.get("href") or "").startswith(("http:", "https:", "mailto:")):
            link.unwrap()
    converter = MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
        table_infer_header=True,
    )
    try:
        text = str(converter.convert_soup(soup))
    except RecursionError:
        text = soup.get_text("\n")
        out.warnings.append("the page is nested too deeply; its text is kept without headings")
    text = re.sub(r"[ \t\xa0]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    if text:
        out.markdown(text + "\n\n")


def read_epub(path: Path, name: str, out: Output) -> None:
    """The chapters in the order of the book's spine."""
    from lxml import etree  # type: ignore[import-untyped]

    parser = etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
    with zipfile.ZipFile(path) as archive:
        try:
            container = etree.fromstring(archive.read("META-INF/container.xml"), parser)
            package = unquote(container.xpath("string(//*[local-name()='rootfile']/@full-path)"))
            root = etree.fromstring(archive.read(package), parser)
        except (KeyError, etree.XMLSyntaxError) as error:
            raise Unreadable(f"damaged: the book's table of contents cannot be read ({error})") from error
        if "META-INF/encryption.xml" in archive.namelist() and b"adept" in archive.read("META-INF/encryption.xml"):
            raise Unreadable("the book is copy-protected")
        out.title = " ".join(root.xpath("string(//*[local-name()='title'])").split())
        files = {item.get("id"): item.get("href", "") for item in root.xpath("//*[local-name()='item']")}
        missing = 0
        for reference in root.xpath("//*[local-name()='itemref']"):
            href = unquote(files.get(reference.get("idref"), ""))
            try:
                chapter = archive.read(posixpath.normpath(posixpath.join(posixpath.dirname(package), href)))
            except KeyError:
                missing += 1
                continue
            write_html(chapter.decode("utf-8", "replace"), out)
    if missing:
        out.warnings.append(f"{missing} chapters are named in the book, but not in the file")


def read_mail(path: Path, name: str, out: Output) -> None:
    """Subject, sender, recipients, date and the text; attachments are named, not read."""
    with path.open("rb") as file:
        mail = BytesParser(policy=policy.default).parse(file)
    assert isinstance(mail, EmailMessage)
    if not mail.keys():
        raise Unreadable("damaged: this is not a mail, it has no headers")
    out.title = str(mail["subject"] or "")
    for header in ("Subject", "From", "To", "Cc", "Date"):
        if mail[header]:
            out.write(f"{header}: {mail[header]}\n")
    out.write("\n")
    if (body := mail.get_body(("plain", "html"))) is not None:
        try:
            text = body.get_content()
        except (LookupError, UnicodeError):
            data = body.get_payload(decode=True)
            text = data.decode("utf-8", "replace") if isinstance(data, bytes) else ""
        if body.get_content_subtype() == "html":
            write_html(text, out)
        else:
            out.write(text)
    if names := [part.get_filename() or part.get_content_type() for part in mail.iter_attachments()]:
        out.warnings.append(f"{len(names)} attachments are not read: {', '.join(names[:10])}")
