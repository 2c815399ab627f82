"""What a vector store must be able to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class VectorStore(Protocol):
    """
    Vectors by chunk id, in one set per collection, compared by cosine. An index of the catalogue, not the truth.

    Vectors are rows of little-endian float32. A set is made when it is first written to. A failure is a ServiceError.
    """

    async def upsert(self, collection: str, ids: Sequence[str], vectors: bytes) -> None:
        """Add vectors, or replace those of the same ids."""

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Remove vectors; ids that are not there are no error."""

    async def query(
        self, collection: str, vector: bytes, top: int, among: Collection[str] | None = None
    ) -> list[tuple[str, float]]:
        """The ids nearest to a vector, best first, with cosine similarity; only `among` these, if given."""
        ...

    async def count(self, collection: str) -> int | None:
        """How many vectors there are; None if the set is missing or cannot be read."""
        ...

    async def ids(self, collection: str) -> set[str]:
        """The ids of all vectors."""
        ...

    async def drop(self, collection: str) -> None:
        """Remove the whole set; it is no error if it is not there."""
