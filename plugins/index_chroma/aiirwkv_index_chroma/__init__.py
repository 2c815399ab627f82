"""Collections in SQLite and Chroma: embedded in this worker, or a Chroma server."""

from __future__ import annotations

from typing import Any

from aiirwkv_knowledge import KnowledgePlugin, VectorStore

from .store import ChromaStore


class IndexChroma(KnowledgePlugin):
    """
    Without `url`, Chroma runs in this worker and keeps its files in the data directory, under index/chroma.

    `url` is that of a Chroma server, such as http://127.0.0.1:8000.
    """

    url: str | None = None

    async def open_store(self) -> VectorStore:
        self._store = ChromaStore(self.data / "index" / "chroma", self.url)
        await self._store.open()
        return self._store

    async def close_store(self) -> None:
        await self._store.close()

    def about(self) -> dict[str, Any]:
        return {"store": f"Chroma server at {self.url}" if self.url else "Chroma, embedded", "modes": MODES}


MODES = ["hybrid", "dense", "keyword"]

__all__ = ["IndexChroma"]
