"""Which collections a caller may see, and what is said about the others: the same as if they did not exist."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from aiirwkv import BadRequest, Collection, Conflict, Context, Forbidden, NotFound
from aiirwkv.hooks import Action

MAX_NAME = 200


def readable(collections: Iterable[Collection], ctx: Context) -> list[Collection]:
    """The collections that the caller may read, the caller's own first."""
    seen = [collection for collection in collections if ctx.may("read", collection)]
    return sorted(seen, key=lambda collection: collection.owner != ctx.user.name)


def lookup(collections: Sequence[Collection], name: str, ctx: Context) -> Collection | None:
    """The collection of this name or id among those that the caller may read; the caller's own comes first."""
    name = unicodedata.normalize("NFC", name).strip()
    found = [collection for collection in readable(collections, ctx) if name in (collection.name, collection.id)]
    if len(found) > 1 and found[0].owner != ctx.user.name:
        choices = ", ".join(f"{collection.id} of {collection.owner}" for collection in found)
        raise Conflict(f"{len(found)} collections are called {name!r}; give the id of one: {choices}")
    return found[0] if found else None


def find(collections: Sequence[Collection], name: str, ctx: Context, action: Action) -> Collection:
    """The collection of this name or id, if the caller may do that with it."""
    collection = lookup(collections, name, ctx)
    if collection is None:
        raise unknown(name, [collection.name for collection in readable(collections, ctx)])
    if not ctx.may(action, collection):
        what = "change" if action == "write" else "rename, share or delete"
        raise Forbidden(f"{ctx.user.name} may not {what} the collection {name!r}; ask its owner, {collection.owner}")
    return collection


def unknown(name: str, visible: Sequence[str]) -> NotFound:
    if near := get_close_matches(name, visible, n=1):
        return NotFound(f"there is no collection {name!r}; did you mean {near[0]!r}?")
    return NotFound(f"there is no collection {name!r}; see what there is with: aiirwkv collections")


def is_id(name: str) -> bool:
    """Whether a name has the form of an id."""
    return name.startswith("kb-") and len(name) == 35


def checked(name: str) -> str:
    """A display name as it is stored: any Unicode, without control characters."""
    name = unicodedata.normalize("NFC", name).strip()
    if not name or len(name) > MAX_NAME:
        raise BadRequest(f"the name of a collection has {len(name)} characters; give it 1 to {MAX_NAME}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise BadRequest(f"the name {name!r} holds a control character; leave it out")
    if is_id(name):
        raise BadRequest(f"{name!r} has the form of an id; choose another name")
    return name
