"""Where a file to pull is: an address, or a file in a repository of a model hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, urlsplit

from aiirwkv.errors import BadRequest

__all__ = ["HUB", "Source", "checked", "source"]

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Source:
    """Where a file is. The token goes to this host only, not to where it redirects."""

    url: str
    token: str = field(default="", repr=False)

    @property
    def file(self) -> str:
        """The name of the file, as the address has it."""
        return urlsplit(self.url).path.rpartition("/")[2]

    @property
    def public(self) -> str:
        """The address without what may be secret in it."""
        return self.url.partition("?")[0].partition("#")[0]


def source(url: str = "", hub: str = "", file: str = "", mirror: str = "") -> Source:
    """
    The file at `url`, or `file` of the repository `hub` (owner/name). Raises BadRequest.

    The hub is `mirror`, else HF_ENDPOINT, else huggingface.co; HF_TOKEN is the token for it.
    """
    endpoint = (mirror or os.environ.get("HF_ENDPOINT", "") or HUB).rstrip("/")
    if bool(url) == bool(hub):
        raise BadRequest("models: pull needs either `url` or `hub`")
    if hub:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub, re.ASCII):
            raise BadRequest(f"models: `hub` is {hub!r}; it must be owner/name")
        if not file or any(part in ("", ".", "..") for part in file.split("/")):
            raise BadRequest(f"models: `file` is {file!r}; with `hub`, it must name a file of that repository")
        url = f"{endpoint}/{hub}/resolve/main/{quote(file)}"
    elif url.startswith(f"{endpoint}/"):
        url = url.replace("/blob/", "/resolve/", 1)  # the address of the page that shows the file
    parts = checked(url)
    if parts.username or parts.password:
        raise BadRequest("models: an address may hold no user and password; give HF_TOKEN to the worker instead")
    return Source(url, os.environ.get("HF_TOKEN", "") if url.startswith(f"{endpoint}/") else "")


def checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise BadRequest(f"models: the address {url!r} begins with neither http:// nor https://")
        if not parts.hostname or not parts.hostname.isascii() or re.search(r"[\x00-\x20\x7f]", url):
            raise ValueError
        _ = parts.port
    except ValueError:
        raise BadRequest(f"models: {url!r} is no address of a file") from None
    return parts
