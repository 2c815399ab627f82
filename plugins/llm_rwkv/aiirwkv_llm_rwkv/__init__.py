"""RWKV models, served: the hooks `generate` and `models`."""

from .plugin import LlmRwkv

__all__ = ["LlmRwkv"]
