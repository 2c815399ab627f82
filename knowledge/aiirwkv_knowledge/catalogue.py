"""
The catalogue: collections, documents, chunks, vectors and the keyword index, in one SQLite file.

It is the truth; a vector store is an index of it that can be made again. It knows no permissions.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from aiirwkv import Access, Collection, Conflict, Document, Hit, NotFound, Passage

from .chunking import Piece
from .database import Database
from .keywords import expression, terms
from .schema import MIGRATIONS
from .where import Where

TEXT_BLOCK = 65_536
"""Characters per stored row of extracted text, so that a span of a long document is read without the rest."""

COLLECTION = """SELECT l.*,
    (SELECT count(*) FROM documents d WHERE d.collection = l.id AND d.live) AS documents,
    (SELECT count(*) FROM documents d JOIN chunks c ON c.document = d.number WHERE d.collection = l.id AND d.live)
        AS chunks
    FROM collections l"""
DOCUMENT = "SELECT d.*, (SELECT count(*) FROM chunks c WHERE c.document = d.number) AS chunks FROM documents d"
PASSAGE = "SELECT c.*, d.name FROM chunks c JOIN documents d ON d.number = c.document AND d.live"
VISIBLE = "chunks c JOIN documents d ON d.number = c.document AND d.live AND c.enabled"
HIT = "c.id AS chunk, d.name AS document, d.id AS document_id, d.collection, c.start, c.end, c.page, c.text, c.heading"


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
        return self.text if not self.heading or self.heading in self.text else f"{self.heading}\n{self.text}"


class Staged(msgspec.Struct, frozen=True):
    """A document that is being read: no search sees it before `publish`."""

    number: int
    chunks: int
    done: int


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
                db.execute(
                    "INSERT INTO collections (id, name, description, owner, shares, embedder, fingerprint, chunk_size,"
                    " chunk_overlap, created) VALUES (?,?,?,?,?,?,?,?,?,?)",
                    (
                        collection.id,
                        collection.name,
                        collection.description,
                        collection.owner,
                        _json(collection.shares),
                        collection.embedder,
                        collection.fingerprint,
                        collection.chunk_size,
                        collection.chunk_overlap,
                        collection.created,
                    ),
                )
                # One index per collection: word statistics stay its own, and it goes with its collection.
                db.execute(
                    f"CREATE VIRTUAL TABLE {_words(collection.id)} USING fts5(words, tokenize = 'porter unicode61')"
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
            fields["shares"] = _json(fields["shares"])
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
                db.execute(f"DROP TABLE {_words(id)}")
                db.execute("DELETE FROM forgotten WHERE collection = ?", (id,))
                db.execute("INSERT INTO forgotten (collection) VALUES (?)", (id,))
                self._clear_originals(db)

    # Reading a document: stage, add, publish

    def stage(
        self,
        collection: str,
        document: Document,
        recipe: str,
        text: str,
        pieces: Sequence[Piece],
        original: Path | None,
    ) -> Staged:
        """Put down text and chunks of a document that no search sees yet. `original` is moved among the originals."""
        with self.writing() as db:
            self._erase(db, "d.collection = ? AND d.name = ? AND NOT d.live", (collection, document.name))
            number = self._insert(db, collection, document, recipe, live=False)
            if original:
                self._keep(original, document.sha256)
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
        with self.reading() as db:
            row = db.execute(
                "SELECT d.number, count(c.number), count(v.chunk) FROM documents d JOIN chunks c ON c.document ="
                " d.number LEFT JOIN vectors v ON v.chunk = c.number WHERE d.collection = ? AND d.name = ? AND"
                " d.sha256 = ? AND d.recipe = ? AND NOT d.live GROUP BY d.number",
                (collection, name, sha256, recipe),
            ).fetchone()
        return Staged(*row) if row else None

    def waiting(self, document: int, after: int, limit: int) -> list[Waiting]:
        """The next chunks without a vector, behind position `after`."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT c.number, c.id, c.position, c.text, c.heading FROM chunks c WHERE c.document = ? AND"
                " c.position > ? AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.chunk = c.number)"
                " ORDER BY c.position LIMIT ?",
                (document, after, limit),
            ).fetchall()
        return [Waiting(*row) for row in rows]

    def add(self, collection: str, chunks: Sequence[Waiting], vectors: bytes) -> None:
        """Store the chunks' vectors (rows of little-endian float32) and words."""
        with self.writing() as db:
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
            f"INSERT OR REPLACE INTO {_words(collection)} (rowid, words) VALUES (?,?)",
            ((chunk.number, " ".join(terms(chunk.context))) for chunk in chunks),
        )

    def publish(self, staged: Staged, tags: Sequence[str]) -> Document:
        """In one step: what was staged is seen, and what it replaces is gone."""
        with self.writing() as db:
            new = db.execute("SELECT * FROM documents WHERE number = ? AND NOT live", (staged.number,)).fetchone()
            if new is None:
                raise Conflict("the document was deleted or replaced while it was being read")
            self._take_over(db, new["collection"], new["name"], staged.number)
            db.execute("UPDATE documents SET live = 1, tags = ? WHERE number = ?", (_json(tags), staged.number))
            return _document(db.execute(f"{DOCUMENT} WHERE d.number = ?", (staged.number,)).fetchone())

    def reject(self, collection: str, document: Document, original: Path | None) -> Document:
        """Write down why a document is not ready. An earlier version of it that is ready stays, with the reason."""
        with self.writing() as db:
            if original:
                self._keep(original, document.sha256)
            where = "d.collection = ? AND d.name = ? AND d.live"
            old = db.execute(f"SELECT * FROM documents d WHERE {where}", (collection, document.name)).fetchone()
            if old and old["state"] == "ready":
                reason = f"the newer file could not be read: {document.reason} (its earlier version stays)"
                db.execute("UPDATE documents SET reason = ? WHERE number = ?", (reason, old["number"]))
                return msgspec.structs.replace(document, id=old["id"], reason=reason)
            number = self._insert(db, collection, document, "", live=False)
            self._take_over(db, collection, document.name, number)
            db.execute("UPDATE documents SET live = 1 WHERE number = ?", (number,))
            return _document(db.execute(f"{DOCUMENT} WHERE d.number = ?", (number,)).fetchone())

    def _insert(self, db: sqlite3.Connection, collection: str, document: Document, recipe: str, *, live: bool) -> int:
        self._erase(db, "d.collection = ? AND d.name = ? AND d.live = ?", (collection, document.name, live))
        try:
            cursor = db.execute(
                "INSERT INTO documents (id, collection, name, live, state, reason, recipe, pages, characters, size,"
                " sha256, media_type, tags, created) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    f"doc-{uuid.uuid4().hex}",
                    collection,
                    document.name,
                    live,
                    document.state,
                    document.reason,
                    recipe,
                    document.pages,
                    document.characters,
                    document.size,
                    document.sha256,
                    document.media_type,
                    _json(document.tags),
                    time.time(),
                ),
            )
        except sqlite3.IntegrityError:
            raise NotFound("the collection was deleted while a document was being read into it") from None
        return int(cursor.lastrowid or 0)

    def _take_over(self, db: sqlite3.Connection, collection: str, name: str, number: int) -> None:
        """Give a document the id of the one of the same name, which goes."""
        old = db.execute(
            "SELECT id FROM documents WHERE collection = ? AND name = ? AND live", (collection, name)
        ).fetchone()
        if old:
            self._erase(db, "d.collection = ? AND d.name = ? AND d.live", (collection, name))
            db.execute("UPDATE documents SET id = ? WHERE number = ?", (old["id"], number))

    # Documents and chunks

    def document(self, collection: str, name: str) -> Document | None:
        """A document by name or id."""
        with self.reading() as db:
            row = db.execute(
                f"{DOCUMENT} WHERE d.collection = ? AND d.live AND (d.id = ? OR d.name = ?) ORDER BY d.id = ? DESC",
                (collection, name, name, name),
            ).fetchone()
        return _document(row) if row else None

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
            db.execute("UPDATE documents SET tags = ?, reason = '' WHERE number = ?", (_json(tags), row["number"]))
        return msgspec.structs.replace(_document(row), tags=list(tags), reason="")

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
        return [_document(row) for row in rows], count

    def remove(self, collection: str, document: str) -> None:
        """Delete a document, by its id; its text is unfindable from now on, whatever the vector store does."""
        with self.writing() as db:
            name = db.execute("SELECT name FROM documents WHERE collection = ? AND id = ?", (collection, document))
            if row := name.fetchone():
                self._erase(db, "d.collection = ? AND d.name = ?", (collection, row["name"]))

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

    def chunk(self, collection: str, id: str) -> tuple[Passage, Waiting]:
        """A chunk, as people and as the embedder see it."""
        with self.reading() as db:
            row = db.execute(f"{PASSAGE} WHERE d.collection = ? AND c.id = ?", (collection, id)).fetchone()
        if row is None:
            raise NotFound(f"there is no chunk {id!r} in this collection; the action `chunks` lists them")
        return _passage(row), Waiting(row["number"], row["id"], row["position"], row["text"], row["heading"])

    def rewrite(self, collection: str, chunk: Waiting, vector: bytes) -> None:
        """Give a chunk the text and vector of `chunk`."""
        with self.writing() as db:
            db.execute("UPDATE chunks SET text = ? WHERE number = ?", (chunk.text, chunk.number))
            self._add(db, collection, [chunk], vector)

    def enable(self, chunk: int, enabled: bool) -> None:
        """Let searches find a chunk, or not."""
        with self.writing() as db:
            db.execute("UPDATE chunks SET enabled = ? WHERE number = ?", (enabled, chunk))

    def _erase(self, db: sqlite3.Connection, where: str, values: Sequence[Any]) -> None:
        """Delete documents; their vectors are on the list to be forgotten."""
        for number, collection in db.execute(
            f"SELECT number, collection FROM documents d WHERE {where}", values
        ).fetchall():
            chunks = "SELECT number FROM chunks WHERE document = ?"
            db.execute(f"DELETE FROM {_words(collection)} WHERE rowid IN ({chunks})", (number,))
            db.execute(
                "INSERT INTO forgotten (collection, chunk) SELECT ?, c.id FROM chunks c WHERE c.document = ?",
                (collection, number),
            )
            db.execute("DELETE FROM documents WHERE number = ?", (number,))
        self._clear_originals(db)

    # Search

    def by_words(self, collection: str, query: str, where: Where, limit: int) -> list[Hit]:
        """The passages that BM25 ranks best for any of the query's terms; `score` is BM25, higher is better."""
        if not (match := expression(query)):
            return []
        words = _words(collection)
        condition, values = where.sql()
        try:
            with self.reading() as db:
                rows = db.execute(
                    f"SELECT {HIT}, -w.rank AS score FROM {words} w JOIN {VISIBLE} AND c.number = w.rowid"
                    f" WHERE w.words MATCH ? AND d.collection = ?{condition} ORDER BY w.rank LIMIT ?",
                    (match, collection, *values, limit),
                ).fetchall()
        except sqlite3.OperationalError as exc:
            if "no such table" in str(exc):  # deleted since it was looked up
                return []
            raise
        return [_hit(row, row["score"]) for row in rows]

    def visible(self, collection: str, scores: dict[str, float], where: Where) -> list[Hit]:
        """Of the chunk ids, those that a search may show, with their scores, best first."""
        condition, values = where.sql()
        with self.reading() as db:
            rows = db.execute(
                f"SELECT {HIT} FROM {VISIBLE} WHERE c.id IN (SELECT value FROM json_each(?)) AND d.collection = ?"
                f"{condition}",
                (_json(list(scores)), collection, *values),
            ).fetchall()
        return sorted((_hit(row, scores[row["chunk"]]) for row in rows), key=lambda hit: -hit.score)

    def matching(self, collection: str, where: Where, limit: int) -> list[str]:
        """Up to `limit` ids of chunks that `where` allows."""
        condition, values = where.sql()
        with self.reading() as db:
            rows = db.execute(
                f"SELECT c.id FROM {VISIBLE} WHERE d.collection = ?{condition} LIMIT ?",
                (collection, *values, limit),
            ).fetchall()
        return [row["id"] for row in rows]

    # In step with the vector store

    def vector_ids(self, collection: str) -> list[str]:
        """The ids of all chunks with a vector, also of documents that are being read."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT c.id FROM vectors v JOIN chunks c ON c.number = v.chunk JOIN documents d ON d.number ="
                " c.document WHERE d.collection = ? ORDER BY c.number",
                (collection,),
            )
            return [row["id"] for row in rows]

    def vector_count(self, collection: str) -> int:
        with self.reading() as db:
            return int(
                db.execute(
                    "SELECT count(*) FROM vectors v JOIN chunks c ON c.number = v.chunk JOIN documents d ON d.number ="
                    " c.document WHERE d.collection = ?",
                    (collection,),
                ).fetchone()[0]
            )

    def vectors(self, ids: Iterable[str]) -> tuple[list[str], bytes]:
        """The vectors of chunks that still exist: their ids, and rows of little-endian float32."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT c.id, v.vector FROM chunks c JOIN vectors v ON v.chunk = c.number WHERE c.id IN"
                " (SELECT value FROM json_each(?))",
                (_json(list(ids)),),
            ).fetchall()
        return [row["id"] for row in rows], b"".join(row["vector"] for row in rows)

    def forgotten(self, limit: int) -> list[tuple[int, str, str]]:
        """What the vector store has still to forget: number, collection, chunk (empty: the whole collection)."""
        with self.reading() as db:
            return [tuple(row) for row in db.execute("SELECT * FROM forgotten ORDER BY number LIMIT ?", (limit,))]

    def forget(self, numbers: Sequence[int]) -> None:
        """The vector store has forgotten these."""
        with self.writing() as db:
            db.executemany("DELETE FROM forgotten WHERE number = ?", ((number,) for number in numbers))

    def problems(self, collection: str) -> list[str]:
        """What is wrong inside the catalogue itself, in words."""
        found = []
        with self.reading() as db:
            bare, words, chunks = db.execute(
                "SELECT count(*) FILTER (WHERE v.chunk IS NULL),"
                f" count(*) FILTER (WHERE c.number IN (SELECT rowid FROM {_words(collection)})), count(*)"
                " FROM chunks c JOIN documents d ON d.number = c.document AND d.live LEFT JOIN vectors v ON"
                " v.chunk = c.number WHERE d.collection = ?",
                (collection,),
            ).fetchone()
            hashes = db.execute(
                "SELECT name, sha256 FROM documents WHERE collection = ? AND live AND media_type != ''", (collection,)
            ).fetchall()
        if bare:
            found.append(f"{bare} chunks have no vector; index their documents again")
        if words != chunks:
            found.append(f"{chunks - words} chunks are not in the keyword index; index their documents again")
        for row in hashes:
            if not self.original(row["sha256"]).exists():
                found.append(f"the original of {row['name']!r} is missing from {self.originals}; upload it again")
        return found

    # Originals

    def original(self, sha256: str) -> Path:
        return self.originals / sha256[:2] / sha256

    def _keep(self, incoming: Path, sha256: str) -> None:
        place = self.original(sha256)
        place.parent.mkdir(exist_ok=True)
        os.replace(incoming, place)

    def _clear_originals(self, db: sqlite3.Connection) -> None:
        """Remove the files that no document needs any more; triggers list the hashes of deleted documents."""
        for (sha256,) in db.execute(
            "SELECT sha256 FROM loose WHERE sha256 NOT IN (SELECT sha256 FROM documents)"
        ).fetchall():
            self.original(sha256).unlink(missing_ok=True)
        db.execute("DELETE FROM loose")


def _words(collection: str) -> str:
    """The keyword table of a collection; its id is ours and hexadecimal."""
    return f"words_{int(collection.removeprefix('kb-'), 16):032x}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _collection(row: sqlite3.Row) -> Collection:
    return Collection(**{**dict(row), "shares": msgspec.json.decode(row["shares"], type=dict[str, Access])})


def _document(row: sqlite3.Row) -> Document:
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


def _hit(row: sqlite3.Row, score: float) -> Hit:
    fields = {field: row[field] for field in row.keys() if field != "score"}  # noqa: SIM118
    return Hit(**fields, score=score)
