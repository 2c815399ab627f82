"""Answers from collections, with citations that hold: search, weigh, read, check."""

from .plugin import Rag

__all__ = ["Rag"]
