"""Which states a language model keeps of documents, in the catalogue, and which of them nobody needs any more."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec
from aiirwkv import Document, Reading, headed, token_estimate

from .catalogue import DOCUMENT, Catalogue, as_document

LONGEST = 700_000
"""Bytes of a document that is read as a whole; a question about it must fit one message."""
WHOLE = 0
"""In place of a chunk's number, for the text of the whole document."""
NOT_READ = "not read by the model: "


class Portion(msgspec.Struct, frozen=True):
    """A text of which a state is kept: a chunk's, or the whole document's."""

    position: int
    chunk: int
    text: str
    label: str


class Task(msgspec.Struct, frozen=True):
    """What is to be read of a document: its whole text, all chunks that searches find, or one of them."""

    number: int
    name: str
    reading: Reading
    total: int
    text: str = ""
    chunk: int | None = None


class Wish(msgspec.Struct, frozen=True):
    """Whether a document is to be read, as it is set or else its collection; and whether a state of it is kept."""

    number: int
    wanted: bool
    kept: bool


class Remembered:
    """Methods block; each is one transaction. A document's number changes with its text, its id does not."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def task(self, document: str, limit: int) -> Task | None:
        """
        What to read of a document, by its id: the whole text, if it has at most `limit` tokens (0: no limit) and no
        chunk was changed by hand; else each chunk that searches find. None: there is none, or it is not ready.
        """
        with self._catalogue.reading() as db:
            row = db.execute(f"{DOCUMENT} WHERE d.id = ? AND d.live AND d.state = 'ready'", (document,)).fetchone()
        if row is None:
            return None
        if row["characters"] <= LONGEST:
            text = self._catalogue.text(document, 0, row["characters"])
            fits = len(text.encode()) <= LONGEST and (not limit or token_estimate(text) <= limit)
            if fits and self._untouched(row["number"], text):
                return Task(row["number"], row["name"], "whole", 1, text)
        with self._catalogue.reading() as db:
            enabled = db.execute("SELECT count(*) FROM chunks WHERE document = ? AND enabled", (row["number"],))
            return Task(row["number"], row["name"], "passages", enabled.fetchone()[0])

    def _untouched(self, number: int, text: str) -> bool:
        """Searches find all chunks, and each as it stands in the text."""
        with self._catalogue.reading() as db:
            chunks = db.execute("SELECT start, end, text, enabled FROM chunks WHERE document = ?", (number,))
            return all(chunk["enabled"] and chunk["text"] == text[chunk["start"] : chunk["end"]] for chunk in chunks)

    def changed(self, chunk: str) -> Task | None:
        """What to read now of a chunk, by its id, that was changed. None: its document is not read."""
        with self._catalogue.reading() as db:
            row = db.execute(
                "SELECT d.number, d.name, d.read, c.number AS chunk FROM chunks c JOIN documents d ON d.number ="
                " c.document AND d.live WHERE c.id = ? AND d.read IS NOT NULL",
                (chunk,),
            ).fetchone()
        return Task(row["number"], row["name"], row["read"], 1, chunk=row["chunk"]) if row else None

    def portions(self, task: Task, after: int, limit: int) -> list[Portion]:
        """The next texts of a task, behind position `after` (at first -1), just as `chat` gives them to the model."""
        if task.reading == "whole":
            return [Portion(0, WHOLE, task.text, task.name)] if after < 0 else []
        with self._catalogue.reading() as db:
            rows = db.execute(
                "SELECT number, position, heading, text, (SELECT count(*) FROM chunks WHERE document = :number) AS"
                " total FROM chunks WHERE document = :number AND position > :after AND enabled AND"
                " (:chunk IS NULL OR number = :chunk) ORDER BY position LIMIT :limit",
                {"number": task.number, "after": after, "chunk": task.chunk, "limit": limit},
            ).fetchall()
        return [
            Portion(
                row["position"],
                row["number"],
                headed(row["heading"], row["text"]),
                f"{task.name}, passage {row['position'] + 1} of {row['total']}",
            )
            for row in rows
        ]

    def keep(self, number: int, chunk: int, state: str) -> bool:
        """Write down the state of a portion. False, and it is not needed: the document has changed or gone."""
        with self._catalogue.writing() as db:
            if db.execute("SELECT 1 FROM documents WHERE number = ?", (number,)).fetchone() is None:
                db.execute("INSERT OR IGNORE INTO unneeded VALUES (?)", (state,))
                return False
            db.execute("DELETE FROM states WHERE document = ? AND chunk = ? AND id != ?", (number, chunk, state))
            db.execute("INSERT OR IGNORE INTO states (document, chunk, id) VALUES (?,?,?)", (number, chunk, state))
        return True

    def done(self, task: Task) -> Document | None:
        """All of the task is read; what is kept besides is not needed. None: the document has changed or gone."""
        others = (
            "chunk != ?1" if task.reading == "whole" else "(chunk = ?1 OR chunk NOT IN (SELECT number FROM enabled))"
        )
        with self._catalogue.writing() as db:
            db.execute(
                "WITH enabled AS (SELECT number FROM chunks WHERE document = ?2 AND enabled)"
                f" DELETE FROM states WHERE document = ?2 AND {others}",
                (WHOLE, task.number),
            )
            return _mark(db, task.number, task.reading, "")

    def note(self, number: int, reading: Reading | None, reason: str) -> Document | None:
        """What of the document is read stays as it is; `reason` says what could not be read."""
        with self._catalogue.writing() as db:
            return _mark(db, number, reading, reason)

    def forget(self, number: int, reason: str = "") -> Document | None:
        """No state of the document is needed. `reason`: why not, although it should be read."""
        with self._catalogue.writing() as db:
            db.execute("DELETE FROM states WHERE document = ?", (number,))
            return _mark(db, number, None, reason)

    def forget_chunk(self, number: int, chunk: int) -> None:
        """No state of the chunk is needed."""
        with self._catalogue.writing() as db:
            db.execute("DELETE FROM states WHERE document = ? AND chunk = ?", (number, chunk))

    # What is wanted

    def wish(self, document: str, wanted: bool | None) -> None:
        """Set a document apart from its collection (None: no longer)."""
        with self._catalogue.writing() as db:
            db.execute("UPDATE documents SET wanted = ? WHERE id = ? AND live", (wanted, document))

    def wished(self, document: str) -> Wish:
        """What is wanted of a document, by its id, and what there is."""
        with self._catalogue.reading() as db:
            row = db.execute(
                "SELECT d.number, coalesce(d.wanted, l.read), EXISTS (SELECT 1 FROM states s WHERE s.document ="
                " d.number) FROM documents d JOIN collections l ON l.id = d.collection WHERE d.id = ? AND d.live",
                (document,),
            ).fetchone()
        return Wish(*row) if row else Wish(0, False, False)

    def switch(self, collection: str, on: bool) -> list[tuple[int, Document]]:
        """Set a collection, and all in it: its documents, by name, with their numbers."""
        with self._catalogue.writing() as db:
            db.execute("UPDATE collections SET read = ? WHERE id = ?", (on, collection))
            db.execute("UPDATE documents SET wanted = NULL WHERE collection = ?", (collection,))
            rows = db.execute(
                f"{DOCUMENT} WHERE d.collection = ? AND d.live AND d.state = 'ready' ORDER BY d.name", (collection,)
            ).fetchall()
        return [(row["number"], as_document(row)) for row in rows]

    # What is not needed

    def unneeded(self, limit: int) -> list[str]:
        """States that the model may drop."""
        with self._catalogue.writing() as db:
            db.execute("DELETE FROM unneeded WHERE id IN (SELECT id FROM states)")
            return [row["id"] for row in db.execute("SELECT id FROM unneeded LIMIT ?", (limit,))]

    def dropped(self, states: Sequence[str]) -> None:
        """The model has dropped them."""
        with self._catalogue.writing() as db:
            db.executemany("DELETE FROM unneeded WHERE id = ?", ((state,) for state in states))


def _mark(db: sqlite3.Connection, number: int, reading: Reading | None, reason: str) -> Document | None:
    """Say on the document what of it is read, or why nothing is, behind the warnings that it has besides."""
    old = db.execute("SELECT reason FROM documents WHERE number = ?", (number,)).fetchone()
    if old is None:
        return None
    warnings = old["reason"].partition(NOT_READ)[0].rstrip("; ")
    said = "; ".join(part for part in (warnings, reason and NOT_READ + reason) if part)
    db.execute("UPDATE documents SET read = ?, reason = ? WHERE number = ?", (reading, said, number))
    return as_document(db.execute(f"{DOCUMENT} WHERE d.number = ?", (number,)).fetchone())
