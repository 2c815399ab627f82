"""RWKV as torch modules: definitions, checkpoints, conversion."""
