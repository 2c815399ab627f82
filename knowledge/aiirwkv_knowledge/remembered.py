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

    chunk: int
    text: str
    label: str


class Task(msgspec.Struct, frozen=True):
    """What is to be read of a document, just as `chat` gives it to the model."""

    number: int
    reading: Reading
    portions: list[Portion]


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
            chunks = db.execute(
                "SELECT c.number, c.position, c.start, c.end, c.heading, c.text, c.enabled FROM chunks c JOIN"
                " documents d ON d.number = c.document AND d.live WHERE d.id = ? ORDER BY c.position",
                (document,),
            ).fetchall()
        if row is None:
            return None
        text = self._catalogue.text(document, 0, row["characters"])
        untouched = all(chunk["enabled"] and chunk["text"] == text[chunk["start"] : chunk["end"]] for chunk in chunks)
        if untouched and len(text.encode()) <= LONGEST and (not limit or token_estimate(text) <= limit):
            return Task(row["number"], "whole", [Portion(WHOLE, text, row["name"])])
        portions = [_portion(row["name"], chunk, len(chunks)) for chunk in chunks if chunk["enabled"]]
        return Task(row["number"], "passages", portions)

    def chunk(self, id: str) -> Task | None:
        """What to read now of a chunk, by its id, that was changed. None: its document is not read."""
        with self._catalogue.reading() as db:
            row = db.execute(
                "SELECT c.*, d.name, d.read, (SELECT count(*) FROM chunks o WHERE o.document = d.number) AS total"
                " FROM chunks c JOIN documents d ON d.number = c.document AND d.live WHERE c.id = ? AND d.read IS NOT"
                " NULL",
                (id,),
            ).fetchone()
        if row is None:
            return None
        portions = [_portion(row["name"], row, row["total"])] if row["enabled"] else []
        return Task(row["document"], row["read"], portions)

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
        now = {portion.chunk for portion in task.portions}
        with self._catalogue.writing() as db:
            for (chunk,) in db.execute("SELECT chunk FROM states WHERE document = ?", (task.number,)).fetchall():
                if chunk not in now:
                    db.execute("DELETE FROM states WHERE document = ? AND chunk = ?", (task.number, chunk))
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

    def forget_chunk(self, id: str) -> None:
        """No state of the chunk is needed."""
        with self._catalogue.writing() as db:
            db.execute("DELETE FROM states WHERE chunk = (SELECT number FROM chunks WHERE id = ?)", (id,))

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


def _portion(name: str, chunk: sqlite3.Row, total: int) -> Portion:
    label = f"{name}, passage {chunk['position'] + 1} of {total}"
    return Portion(chunk["number"], headed(chunk["heading"], chunk["text"]), label)


def _mark(db: sqlite3.Connection, number: int, reading: Reading | None, reason: str) -> Document | None:
    """Say on the document what of it is read, or why nothing is, behind the warnings that it has besides."""
    old = db.execute("SELECT reason FROM documents WHERE number = ?", (number,)).fetchone()
    if old is None:
        return None
    warnings = old["reason"].partition(NOT_READ)[0].rstrip("; ")
    said = "; ".join(part for part in (warnings, reason and NOT_READ + reason) if part)
    db.execute("UPDATE documents SET read = ?, reason = ? WHERE number = ?", (reading, said, number))
    return as_document(db.execute(f"{DOCUMENT} WHERE d.number = ?", (number,)).fetchone())
