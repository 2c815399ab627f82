"""
The catalogue: collections, documents, chunks, vectors and the keyword index, in one SQLite file.

It is the truth; a vector store is an index of it that can be made again. What comes in goes through `staging`, what is
found through `passages`. It knows no permissions.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from aiirwkv import Access, Collection, Conflict, Document, NotFound, Passage

from .database import Database, insert
from .schema import MIGRATIONS

TEXT_BLOCK = 65_536
"""Characters per stored row of extracted text, so that a span of a long document is read without the rest."""

COLLECTION = """SELECT l.*,
    (SELECT count(*) FROM documents d WHERE d.collection = l.id AND d.live) AS documents,
    (SELECT count(*) FROM documents d JOIN chunks c ON c.document = d.number WHERE d.collection = l.id AND d.live)
        AS chunks
    FROM collections l"""
DOCUMENT = "SELECT d.*, (SELECT count(*) FROM chunks c WHERE c.document = d.number) AS chunks FROM documents d"
PASSAGE = "SELECT c.*, d.name FROM chunks c JOIN documents d ON d.number = c.document AND d.live"


class Catalogue(Database):
    """See the module. Methods block; each is one transaction."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "catalogue.db", MIGRATIONS)
        self.originals = folder / "originals"
        self.originals.mkdir(exist_ok=True)

    # Collections

    def create(self, collection: Collection) -> Collection:
        """Add a collection under a new id."""
        collection = msgspec.structs.replace(collection, id=f"kb-{uuid.uuid4().hex}", created=time.time())
        try:
            with self.writing() as db:
                insert(
                    db,
                    "collections",
                    id=collection.id,
                    name=collection.name,
                    description=collection.description,
                    owner=collection.owner,
                    shares=as_json(collection.shares),
                    embedder=collection.embedder,
                    fingerprint=collection.fingerprint,
                    chunk_size=collection.chunk_size,
                    chunk_overlap=collection.chunk_overlap,
                    created=collection.created,
                    read=collection.read,
                )
                # One index per collection: word statistics stay its own, and it goes with its collection.
                db.execute(
                    f"CREATE VIRTUAL TABLE {words_of(collection.id)} USING fts5(words, tokenize = 'porter unicode61')"
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a collection {collection.name!r} already; choose another name") from None
        return collection

    def collections(self) -> list[Collection]:
        """All collections, by name, with their counts."""
        with self.reading() as db:
            return [_collection(row) for row in db.execute(f"{COLLECTION} ORDER BY l.name, l.created")]

    def names(self) -> list[Collection]:
        """All collections without counts: cheap, for looking one up."""
        with self.reading() as db:
            return [_collection(row) for row in db.execute("SELECT * FROM collections ORDER BY name, created")]

    def collection(self, id: str) -> Collection:
        """A collection by its id."""
        with self.reading() as db:
            row = db.execute(f"{COLLECTION} WHERE l.id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound("the collection has been deleted")
        return _collection(row)

    def change(self, id: str, **fields: Any) -> None:
        """Set fields of a collection."""
        if "shares" in fields:
            fields["shares"] = as_json(fields["shares"])
        try:
            with self.writing() as db:
                db.execute(
                    f"UPDATE collections SET {', '.join(f'{field} = ?' for field in fields)} WHERE id = ?",
                    (*fields.values(), id),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a collection {fields['name']!r} already; choose another name") from None

    def drop(self, id: str) -> None:
        """Delete a collection with all it holds; its vectors are on the list to be forgotten."""
        with self.writing() as db:
            if db.execute("DELETE FROM collections WHERE id = ?", (id,)).rowcount:
                db.execute(f"DROP TABLE {words_of(id)}")
                db.execute("DELETE FROM forgotten WHERE collection = ?", (id,))
                db.execute("INSERT INTO forgotten (collection) VALUES (?)", (id,))

    # Documents and chunks

    def document(self, collection: str, name: str) -> Document | None:
        """A document by name or id."""
        with self.reading() as db:
            row = db.execute(
                f"{DOCUMENT} WHERE d.collection = ? AND d.live AND (d.id = ? OR d.name = ?) ORDER BY d.id = ? DESC",
                (collection, name, name, name),
            ).fetchone()
        return as_document(row) if row else None

    def same(self, collection: str, name: str, sha256: str, recipe: str, tags: Sequence[str]) -> Document | None:
        """The ready document of this name made from the same bytes in the same way; it gets the tags."""
        with self.writing() as db:
            row = db.execute(
                f"{DOCUMENT} WHERE d.collection = ? AND d.name = ? AND d.sha256 = ? AND d.recipe = ? AND d.live"
                " AND d.state = 'ready'",
                (collection, name, sha256, recipe),
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE documents SET tags = ?, reason = '' WHERE number = ?", (as_json(tags), row["number"]))
        return msgspec.structs.replace(as_document(row), tags=list(tags), reason="")

    def documents(
        self, collection: str, query: str = "", offset: int = 0, limit: int = -1
    ) -> tuple[list[Document], int]:
        """Documents whose name contains `query`, by name, and how many there are."""
        condition = "d.collection = ? AND d.live AND instr(lower(d.name), lower(?))"
        with self.reading() as db:
            count = db.execute(f"SELECT count(*) FROM documents d WHERE {condition}", (collection, query)).fetchone()[0]
            rows = db.execute(
                f"{DOCUMENT} WHERE {condition} ORDER BY d.name LIMIT ? OFFSET ?", (collection, query, limit, offset)
            ).fetchall()
        return [as_document(row) for row in rows], count

    def remove(self, collection: str, document: str) -> None:
        """Delete a document, by its id; its text is unfindable from now on, whatever the vector store does."""
        with self.writing() as db:
            name = db.execute("SELECT name FROM documents WHERE collection = ? AND id = ?", (collection, document))
            if row := name.fetchone():
                self.erase(db, "d.collection = ? AND d.name = ?", (collection, row["name"]))

    def text(self, document: str, start: int, end: int) -> str:
        """The extracted text of a document, by its id, from character `start` to `end`."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT t.start, t.text FROM texts t JOIN documents d ON d.number = t.document WHERE d.id = ? AND"
                " d.live AND t.start > ? AND t.start < ? ORDER BY t.start",
                (document, start - TEXT_BLOCK, end),
            ).fetchall()
        if not rows:
            return ""
        offset = rows[0]["start"]
        return "".join(row["text"] for row in rows)[start - offset : end - offset]

    def chunks(
        self, collection: str, document: str = "", query: str = "", offset: int = 0, limit: int = -1
    ) -> tuple[list[Passage], int]:
        """Chunks, of one document (by id) or of all, whose text contains `query`, in order; and how many."""
        condition = "d.collection = ? AND (? = '' OR d.id = ?) AND (? = '' OR instr(lower(c.text), lower(?)))"
        values = (collection, document, document, query, query)
        tables = "FROM chunks c JOIN documents d ON d.number = c.document AND d.live"
        with self.reading() as db:
            count = db.execute(f"SELECT count(*) {tables} WHERE {condition}", values).fetchone()[0]
            rows = db.execute(
                f"{PASSAGE} WHERE {condition} ORDER BY d.name, c.position LIMIT ? OFFSET ?", (*values, limit, offset)
            ).fetchall()
        return [_passage(row) for row in rows], count

    def chunk(self, collection: str, id: str) -> Passage:
        """A chunk by its id."""
        with self.reading() as db:
            row = db.execute(f"{PASSAGE} WHERE d.collection = ? AND c.id = ?", (collection, id)).fetchone()
        if row is None:
            raise NotFound(f"there is no chunk {id!r} in this collection; the action `chunks` lists them")
        return _passage(row)

    def enable(self, collection: str, id: str, enabled: bool) -> None:
        """Let searches find a chunk, or not."""
        with self.writing() as db:
            db.execute(
                "UPDATE chunks SET enabled = ? WHERE id = ? AND document IN (SELECT number FROM documents WHERE"
                " collection = ?)",
                (enabled, id, collection),
            )

    def erase(self, db: sqlite3.Connection, where: str, values: Sequence[Any]) -> None:
        """Delete documents; their vectors are on the list to be forgotten."""
        for number, collection in db.execute(
            f"SELECT number, collection FROM documents d WHERE {where}", values
        ).fetchall():
            chunks = "SELECT number FROM chunks WHERE document = ?"
            db.execute(f"DELETE FROM {words_of(collection)} WHERE rowid IN ({chunks})", (number,))
            db.execute(
                "INSERT INTO forgotten (collection, chunk) SELECT ?, c.id FROM chunks c WHERE c.document = ?",
                (collection, number),
            )
            db.execute("DELETE FROM documents WHERE number = ?", (number,))

    # Originals

    def original(self, sha256: str) -> Path:
        return self.originals / sha256[:2] / sha256

    def keep(self, incoming: Path, sha256: str) -> None:
        """Move a file among the originals; within the transaction that writes the document down."""
        place = self.original(sha256)
        place.parent.mkdir(exist_ok=True)
        os.replace(incoming, place)

    def clear_originals(self) -> None:
        """Remove the files of deleted documents, of which a trigger makes a list, that no other document needs."""
        with self.writing() as db:
            loose = db.execute("SELECT sha256 FROM loose WHERE sha256 NOT IN (SELECT sha256 FROM documents)")
            for (sha256,) in loose.fetchall():
                self.original(sha256).unlink(missing_ok=True)
            db.execute("DELETE FROM loose")


def words_of(collection: str) -> str:
    """The keyword table of a collection; its id is ours and hexadecimal."""
    return f"words_{int(collection.removeprefix('kb-'), 16):032x}"


def as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _collection(row: sqlite3.Row) -> Collection:
    shares = msgspec.json.decode(row["shares"], type=dict[str, Access])
    return Collection(**{**dict(row), "shares": shares, "read": bool(row["read"])})


def as_document(row: sqlite3.Row) -> Document:
    fields = {field: row[field] for field in Document.__struct_fields__}
    return Document(**{**fields, "tags": msgspec.json.decode(row["tags"], type=list[str])})


def _passage(row: sqlite3.Row) -> Passage:
    return Passage(
        id=row["id"],
        document=row["name"],
        number=row["position"],
        start=row["start"],
        end=row["end"],
        text=row["text"],
        page=row["page"],
        heading=row["heading"],
        enabled=bool(row["enabled"]),
    )
