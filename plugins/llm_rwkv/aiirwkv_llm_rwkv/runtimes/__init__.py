"""Who runs a model: plain torch, compiled for a CPU, on a GPU, or the `rwkv` package."""
