"""Which vectors there are, and which the vector store has still to forget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .catalogue import Catalogue, as_json, words_of


class Ledger:
    """The catalogue as the vector store's counterpart. Methods block."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def vector_ids(self, collection: str) -> list[str]:
        """The ids of all chunks with a vector, also of documents that are being read."""
        with self._catalogue.reading() as db:
            rows = db.execute(
                "SELECT c.id FROM vectors v JOIN chunks c ON c.number = v.chunk JOIN documents d ON d.number ="
                " c.document WHERE d.collection = ? ORDER BY c.number",
                (collection,),
            )
            return [row["id"] for row in rows]

    def vector_count(self, collection: str) -> int:
        with self._catalogue.reading() as db:
            return int(
                db.execute(
                    "SELECT count(*) FROM vectors v JOIN chunks c ON c.number = v.chunk JOIN documents d ON d.number ="
                    " c.document WHERE d.collection = ?",
                    (collection,),
                ).fetchone()[0]
            )

    def vectors(self, ids: Iterable[str]) -> tuple[list[str], bytes]:
        """The vectors of chunks that still exist: their ids, and rows of little-endian float32."""
        with self._catalogue.reading() as db:
            rows = db.execute(
                "SELECT c.id, v.vector FROM chunks c JOIN vectors v ON v.chunk = c.number WHERE c.id IN"
                " (SELECT value FROM json_each(?))",
                (as_json(list(ids)),),
            ).fetchall()
        return [row["id"] for row in rows], b"".join(row["vector"] for row in rows)

    def forgotten(self, limit: int) -> list[tuple[int, str, str]]:
        """What the vector store has still to forget: number, collection, chunk (empty: the whole collection)."""
        with self._catalogue.reading() as db:
            return [tuple(row) for row in db.execute("SELECT * FROM forgotten ORDER BY number LIMIT ?", (limit,))]

    def forget(self, numbers: Sequence[int]) -> None:
        """The vector store has forgotten these."""
        with self._catalogue.writing() as db:
            db.executemany("DELETE FROM forgotten WHERE number = ?", ((number,) for number in numbers))

    def problems(self, collection: str) -> list[str]:
        """What is wrong inside the catalogue itself, in words."""
        found = []
        with self._catalogue.reading() as db:
            bare, words, chunks = db.execute(
                "SELECT count(*) FILTER (WHERE v.chunk IS NULL),"
                f" count(*) FILTER (WHERE c.number IN (SELECT rowid FROM {words_of(collection)})), count(*)"
                " FROM chunks c JOIN documents d ON d.number = c.document AND d.live LEFT JOIN vectors v ON"
                " v.chunk = c.number WHERE d.collection = ?",
                (collection,),
            ).fetchone()
            hashes = db.execute(
                "SELECT name, sha256 FROM documents WHERE collection = ? AND live AND sha256 != ''", (collection,)
            ).fetchall()
        if bare:
            found.append(f"{bare} chunks have no vector; delete their documents and index them again")
        if words != chunks:
            found.append(
                f"{chunks - words} chunks are not in the keyword index; delete their documents and index them again"
            )
        for row in hashes:
            if not self._catalogue.original(row["sha256"]).exists():
                found.append(
                    f"the original of {row['name']!r} is missing from {self._catalogue.originals}; upload it again"
                )
        return found
