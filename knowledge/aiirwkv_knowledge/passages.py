"""The passages that a search may show, by words or by chunk id."""

from __future__ import annotations

import sqlite3

from aiirwkv import Hit

from .catalogue import Catalogue, as_json, words_of
from .keywords import expression
from .where import Where

VISIBLE = "chunks c JOIN documents d ON d.number = c.document AND d.live AND c.enabled"
HIT = (
    "c.id AS chunk, d.name AS document, d.id AS document_id, d.collection, c.start, c.end, c.page, c.text, c.heading,"
    " d.read"
)


class Passages:
    """Reads from the catalogue. Methods block."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def by_words(self, collection: str, query: str, where: Where, limit: int) -> list[Hit]:
        """The passages that BM25 ranks best for any of the query's terms; `score` is BM25, higher is better."""
        if not (match := expression(query)):
            return []
        words = words_of(collection)
        condition, values = where.sql()
        try:
            with self._catalogue.reading() as db:
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
        with self._catalogue.reading() as db:
            rows = db.execute(
                f"SELECT {HIT} FROM {VISIBLE} WHERE c.id IN (SELECT value FROM json_each(?)) AND d.collection = ?"
                f"{condition}",
                (as_json(list(scores)), collection, *values),
            ).fetchall()
        return sorted((_hit(row, scores[row["chunk"]]) for row in rows), key=lambda hit: -hit.score)

    def matching(self, collection: str, where: Where, limit: int) -> list[str]:
        """Up to `limit` ids of chunks that `where` allows."""
        condition, values = where.sql()
        with self._catalogue.reading() as db:
            rows = db.execute(
                f"SELECT c.id FROM {VISIBLE} WHERE d.collection = ?{condition} LIMIT ?",
                (collection, *values, limit),
            ).fetchall()
        return [row["id"] for row in rows]


def _hit(row: sqlite3.Row, score: float) -> Hit:
    fields = {field: row[field] for field in row.keys() if field != "score"}  # noqa: SIM118
    return Hit(**fields, score=score)
