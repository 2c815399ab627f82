"""Tuning of RWKV models: the hook `tune`."""

from .plugin import TunePeft

__all__ = ["TunePeft"]
