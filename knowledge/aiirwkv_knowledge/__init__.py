"""What every index plugin shares: the catalogue, chunks, keyword search, fusion and permissions."""

from __future__ import annotations

from .service import KnowledgePlugin as KnowledgePlugin
from .store import VectorStore as VectorStore
