"""BGE-M3 embeddings (dense, sparse, a vector per token) and the BGE reranker, from local folders; downloads nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import anyio
import msgspec
from aiirwkv.errors import BadRequest, PluginError
from aiirwkv.hooks import Plugin, hookimpl
from aiirwkv.types import Embed, Embeddings, Rerank, Scores

__all__ = ["EmbedBge"]

T = TypeVar("T")

HEADS = ("sparse_linear.pt", "colbert_linear.pt")  # without them FlagEmbedding takes random ones and says nothing
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PAIR, QUESTION = 512, 384  # tokens of a reranked pair, and of these at most for its question


class EmbedBge(Plugin):
    """
    Serves `embed` and, with a reranker, `rerank`. FlagEmbedding loads the models; each has one thread, since tokenizer
    and model are not safe to share between several.

    model: folder of BAAI/bge-m3. reranker: folder of BAAI/bge-reranker-v2-m3. device: as torch names it. batch: texts
    computed together; others wait no longer than for one batch.
    """

    model: str = ""
    reranker: str = ""
    device: str = "cpu"
    batch: Annotated[int, msgspec.Meta(ge=1)] = 8

    async def __aenter__(self) -> Self:
        os.environ["HF_HUB_OFFLINE"] = "1"
        folder = self._folder("model", self.model, *HEADS)
        ranker = self._folder("reranker", self.reranker) if self.reranker else None
        self._embedding, self._reranking = ThreadPoolExecutor(1, "embed"), ThreadPoolExecutor(1, "rerank")
        self._about: dict[str, Any] = {
            "model": folder.name,
            "revision": await anyio.to_thread.run_sync(revision, folder),
            "languages": ["*"],
            "outputs": ["dense", "sparse", "multi"],
            "pooling": "cls",
            "normalised": True,
        }
        self._embedder = await anyio.to_thread.run_sync(self._load_embedder, folder)
        config = self._embedder.model.model.config
        self._tokens = config.max_position_embeddings - 2  # two positions are reserved
        self._about |= {"dimension": config.hidden_size, "max_tokens": self._tokens}
        self._ranker: Any = None
        if ranker:
            self._about["reranker"] = ranker.name
            self._ranker = await anyio.to_thread.run_sync(self._load_reranker, ranker)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for thread in (self._embedding, self._reranking):
            thread.shutdown(wait=False, cancel_futures=True)

    def about(self) -> dict[str, Any]:
        return self._about

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        """What is asked of dense (rows of length 1), sparse (token id to weight) and multi (a vector per token)."""
        found = await self._batches(self._embedding, request.texts, self._encode, set(request.outputs))
        reply = Embeddings(model=self._about["model"])
        if "dense" in request.outputs and found:
            import numpy as np

            reply = Embeddings.pack(np.stack([one["dense"] for one in found]), reply.model)
        if "sparse" in request.outputs:
            reply.sparse = [one["sparse"] for one in found]
        if "multi" in request.outputs:
            reply.multi = [one["multi"] for one in found]
        return reply

    @hookimpl
    async def rerank(self, request: Rerank) -> Scores:
        """The reranker's logits, one per text; beyond 512 tokens of question and text nothing is read."""
        if self._ranker is None:
            raise BadRequest(
                "embed_bge has no reranker: set `reranker` in [plugins.embed_bge] to a folder of bge-reranker-v2-m3"
            )
        scores = await self._batches(self._reranking, request.texts, self._score, request.query)
        return Scores(scores, self._about["reranker"])

    async def _batches(
        self, thread: Executor, texts: list[str], compute: Callable[..., list[T]], extra: object
    ) -> list[T]:
        """Compute small batches of texts of like length in the model's thread; between two, another request may go."""
        found: dict[int, T] = {}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            call = partial(compute, [texts[i] for i in some], extra)
            done = await asyncio.get_running_loop().run_in_executor(thread, call)
            found |= zip(some, done, strict=True)
        return [found[i] for i in range(len(texts))]

    def _folder(self, setting: str, path: str, *needed: str) -> Path:
        """The folder of a model, if it is whole. PluginError: what is missing."""
        what = f"embed_bge: `{setting}` in [plugins.embed_bge]"
        if not path:
            raise PluginError(
                f"{what} is not set; give it the path of a folder with BAAI/bge-m3 (nothing is downloaded)"
            )
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise PluginError(f"{what} is {path!r}, which is not a folder; download the model and give its path")
        missing = [name for name in ("config.json", *needed) if not (folder / name).is_file()]
        if not any((folder / name).is_file() for name in WEIGHTS):
            missing.append(" or ".join(WEIGHTS))
        if missing:
            raise PluginError(f"{what}: {folder} lacks {', '.join(missing)}; download the whole model")
        return folder

    def _load_embedder(self, folder: Path) -> Any:
        from FlagEmbedding import BGEM3FlagModel

        try:
            embedder = BGEM3FlagModel(str(folder), use_fp16=self.device != "cpu", devices=self.device)
        except Exception as error:
            raise PluginError(f"embed_bge: cannot load {folder}: {error}") from error
        embedder.model.to(self.device).eval()
        return embedder

    def _load_reranker(self, folder: Path) -> Any:
        from FlagEmbedding import FlagReranker

        architectures = json.loads((folder / "config.json").read_bytes()).get("architectures") or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise PluginError(f"embed_bge: {folder} holds {architectures}, not a reranker")
        try:
            reranker = FlagReranker(str(folder), use_fp16=self.device != "cpu", devices=self.device)
        except Exception as error:
            raise PluginError(f"embed_bge: cannot load {folder}: {error}") from error
        if self.device != "cpu":
            reranker.model.half()
        reranker.model.to(self.device).eval()
        return reranker

    # The models' forward passes are called directly: FlagEmbedding's `encode` and `compute_score` compute the first
    # batch twice, to find a batch size, and turn any error into a smaller one.

    def _encode(self, texts: list[str], outputs: set[str]) -> list[dict[str, Any]]:
        """For each text what is asked of dense: array (dim,), sparse: {token id: weight}, multi: [[…]] per token."""
        import torch

        tokenizer = self._embedder.tokenizer
        inputs = tokenizer(texts, truncation=True, max_length=self._tokens, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device)
        with torch.inference_mode():
            out = self._embedder.model(
                inputs,
                return_dense="dense" in outputs,
                return_sparse="sparse" in outputs,
                return_colbert_vecs="multi" in outputs,
            )
        found: list[dict[str, Any]] = [{} for _ in texts]
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, one in enumerate(found):
            if "dense" in outputs:
                one["dense"] = out["dense_vecs"][row].float().cpu().numpy()
            if "sparse" in outputs:
                weights = out["sparse_vecs"][row].float().flatten().tolist()
                one["sparse"] = heaviest(inputs["input_ids"][row].tolist(), weights, set(tokenizer.all_special_ids))
            if "multi" in outputs:  # one per token but the first, which stands for the whole
                one["multi"] = out["colbert_vecs"][row, : lengths[row] - 1].float().tolist()
        return found

    def _score(self, texts: list[str], query: str) -> list[float]:
        import torch

        tokenizer = self._ranker.tokenizer
        question = tokenizer(query, add_special_tokens=False)["input_ids"]
        if len(question) > QUESTION:
            query = tokenizer.decode(question[:QUESTION])
        inputs = tokenizer(
            [query] * len(texts), texts, truncation="only_second", max_length=PAIR, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = self._ranker.model(**inputs.to(self.device)).logits
        scores: list[float] = logits.view(-1).float().tolist()
        return scores


def heaviest(ids: Sequence[int], weights: Sequence[float], special: set[int]) -> dict[str, float]:
    """Each token's greatest weight; special tokens and weights of nothing are left out."""
    found: dict[str, float] = {}
    for token, weight in zip(ids, weights, strict=True):
        if weight > found.get(str(token), 0.0) and token not in special:
            found[str(token)] = weight
    return found


def revision(folder: Path) -> str:
    """SHA-256 over the weights and the heads, which decides whether two vectors can be compared."""
    digest = hashlib.sha256()
    for block in blocks(folder):
        digest.update(block)
    return digest.hexdigest()


def blocks(folder: Path) -> Iterator[bytes]:
    for name in (next(name for name in WEIGHTS if (folder / name).is_file()), *HEADS):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                yield block
