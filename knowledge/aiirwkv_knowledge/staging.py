"""Documents on their way in: put down unseen, given vectors, published in one step."""

from __future__ import annotations

import secrets
import sqlite3
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiirwkv import Conflict, Document, NotFound, headed

from .catalogue import DOCUMENT, TEXT_BLOCK, Catalogue, as_document, as_json, words_of
from .chunking import Piece
from .database import insert
from .keywords import terms


class Waiting(msgspec.Struct, frozen=True):
    """A chunk that has no vector yet."""

    number: int
    id: str
    position: int
    text: str
    heading: str

    @property
    def context(self) -> str:
        """What is embedded: the chunk under its heading."""
        return headed(self.heading, self.text)


class Staged(msgspec.Struct, frozen=True):
    """A document that is being read: no search sees it before `publish`."""

    number: int
    chunks: int
    done: int


class Staging:
    """Writes to the catalogue. Methods block; each is one transaction."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def stage(
        self,
        collection: str,
        document: Document,
        recipe: str,
        text: str,
        pieces: Sequence[Piece],
        original: Path,
    ) -> Staged:
        """Put down text and chunks of a document that no search sees yet. `original` is moved among the originals."""
        with self._catalogue.writing() as db:
            number = self._insert(db, collection, document, recipe)
            self._catalogue.keep(original, document.sha256)
            db.executemany(
                "INSERT INTO texts (document, start, text) VALUES (?,?,?)",
                ((number, start, text[start : start + TEXT_BLOCK]) for start in range(0, len(text), TEXT_BLOCK)),
            )
            version = secrets.token_hex(8)
            db.executemany(
                "INSERT INTO chunks (id, document, position, start, end, page, heading, text) VALUES (?,?,?,?,?,?,?,?)",
                (
                    (f"{version}-{position}", number, position, p.start, p.end, p.page, p.heading, p.text)
                    for position, p in enumerate(pieces)
                ),
            )
        return Staged(number, len(pieces), 0)

    def staged(self, collection: str, name: str, sha256: str, recipe: str) -> Staged | None:
        """What an interrupted reading of the same bytes has left."""
        with self._catalogue.reading() as db:
            row = db.execute(
                "SELECT d.number, count(c.number), count(v.chunk) FROM documents d JOIN chunks c ON c.document ="
                " d.number LEFT JOIN vectors v ON v.chunk = c.number WHERE d.collection = ? AND d.name = ? AND"
                " d.sha256 = ? AND d.recipe = ? AND NOT d.live GROUP BY d.number",
                (collection, name, sha256, recipe),
            ).fetchone()
        return Staged(*row) if row else None

    def waiting(self, document: int, after: int, limit: int) -> list[Waiting]:
        """The next chunks without a vector, behind position `after`."""
        with self._catalogue.reading() as db:
            rows = db.execute(
                "SELECT c.number, c.id, c.position, c.text, c.heading FROM chunks c WHERE c.document = ? AND"
                " c.position > ? AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.chunk = c.number)"
                " ORDER BY c.position LIMIT ?",
                (document, after, limit),
            ).fetchall()
        return [Waiting(*row) for row in rows]

    def add(self, collection: str, chunks: Sequence[Waiting], vectors: bytes) -> None:
        """Store the chunks' vectors (rows of little-endian float32) and words."""
        with self._catalogue.writing() as db:
            self._add(db, collection, chunks, vectors)

    def _add(self, db: sqlite3.Connection, collection: str, chunks: Sequence[Waiting], vectors: bytes) -> None:
        size = len(vectors) // len(chunks)
        rows = [vectors[start : start + size] for start in range(0, len(vectors), size)]
        try:
            for chunk, row in zip(chunks, rows, strict=True):
                db.execute("INSERT OR REPLACE INTO vectors (chunk, vector) VALUES (?,?)", (chunk.number, row))
        except sqlite3.IntegrityError:
            raise Conflict("the document was deleted or replaced while it was being read") from None
        db.executemany(
            f"INSERT OR REPLACE INTO {words_of(collection)} (rowid, words) VALUES (?,?)",
            ((chunk.number, " ".join(terms(chunk.context))) for chunk in chunks),
        )

    def publish(self, staged: Staged, tags: Sequence[str]) -> Document:
        """In one step: what was staged is seen, and what it replaces is gone."""
        with self._catalogue.writing() as db:
            new = db.execute("SELECT * FROM documents WHERE number = ? AND NOT live", (staged.number,)).fetchone()
            if new is None:
                raise Conflict("the document was deleted or replaced while it was being read")
            self._take_over(db, new["collection"], new["name"], staged.number)
            db.execute("UPDATE documents SET live = 1, tags = ? WHERE number = ?", (as_json(tags), staged.number))
            return as_document(db.execute(f"{DOCUMENT} WHERE d.number = ?", (staged.number,)).fetchone())

    def reject(self, collection: str, document: Document, original: Path) -> Document:
        """Write down why a document is not ready. An earlier version of it that is ready stays, with the reason."""
        with self._catalogue.writing() as db:
            where = "d.collection = ? AND d.name = ? AND d.live"
            old = db.execute(f"SELECT * FROM documents d WHERE {where}", (collection, document.name)).fetchone()
            if old and old["state"] == "ready":
                reason = f"the newer file could not be read: {document.reason} (its earlier version stays)"
                db.execute("UPDATE documents SET reason = ? WHERE number = ?", (reason, old["number"]))
                return msgspec.structs.replace(document, id=old["id"], reason=reason)
            number = self._insert(db, collection, document, "")
            if document.sha256:
                self._catalogue.keep(original, document.sha256)
            self._take_over(db, collection, document.name, number)
            db.execute("UPDATE documents SET live = 1 WHERE number = ?", (number,))
            return as_document(db.execute(f"{DOCUMENT} WHERE d.number = ?", (number,)).fetchone())

    def chunk(self, collection: str, id: str) -> Waiting:
        """A published chunk, as the embedder sees it."""
        with self._catalogue.reading() as db:
            row = db.execute(
                "SELECT c.number, c.id, c.position, c.text, c.heading FROM chunks c JOIN documents d ON d.number ="
                " c.document AND d.live WHERE d.collection = ? AND c.id = ?",
                (collection, id),
            ).fetchone()
        if row is None:
            raise NotFound(f"there is no chunk {id!r} in this collection; the action `chunks` lists them")
        return Waiting(*row)

    def rewrite(self, collection: str, chunk: Waiting, vector: bytes) -> None:
        """Give a chunk the text and vector of `chunk`."""
        with self._catalogue.writing() as db:
            db.execute("UPDATE chunks SET text = ? WHERE number = ?", (chunk.text, chunk.number))
            self._add(db, collection, [chunk], vector)

    def _insert(self, db: sqlite3.Connection, collection: str, document: Document, recipe: str) -> int:
        """Add a document unseen, in place of what was staged under its name."""
        self._catalogue.erase(db, "d.collection = ? AND d.name = ? AND NOT d.live", (collection, document.name))
        try:
            return insert(
                db,
                "documents",
                id=f"doc-{uuid.uuid4().hex}",
                collection=collection,
                name=document.name,
                live=False,
                state=document.state,
                reason=document.reason,
                recipe=recipe,
                pages=document.pages,
                characters=document.characters,
                size=document.size,
                sha256=document.sha256,
                media_type=document.media_type,
                tags=as_json(document.tags),
                created=time.time(),
            )
        except sqlite3.IntegrityError:
            raise NotFound("the collection was deleted while a document was being read into it") from None

    def _take_over(self, db: sqlite3.Connection, collection: str, name: str, number: int) -> None:
        """Give a document the id and the wish to be read of the one of the same name, which goes."""
        old = db.execute(
            "SELECT id, wanted FROM documents WHERE collection = ? AND name = ? AND live", (collection, name)
        ).fetchone()
        if old:
            self._catalogue.erase(db, "d.collection = ? AND d.name = ? AND d.live", (collection, name))
            db.execute("UPDATE documents SET id = ?, wanted = ? WHERE number = ?", (old["id"], old["wanted"], number))
