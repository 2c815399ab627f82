"""BGE-M3 and its reranker, on tiny random checkpoints of the true layout: the same numbers as FlagEmbedding's own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiirwkv.errors import BadRequest, PluginError
from aiirwkv.testing import running
from aiirwkv.types import Embed, Rerank
from aiirwkv_embed_bge import EmbedBge

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["The museum opens at nine.", "", "tea " * 80, "Prices: tea 3, cake 4.", "On Mondays it stays closed all day."]
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:", "▁the", "▁museum", "▁tea", "▁open", "s", "▁at", "▁cake", "▁day"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `m3` and `reranker` with the files of the published models, but 2 layers of 64."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        PreTrainedTokenizerFast,
        XLMRobertaConfig,
        XLMRobertaForSequenceClassification,
        XLMRobertaModel,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -3.0) for word in ["▁", *WORDS])]
    raw = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    special |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    config: dict[str, Any] = {"vocab_size": len(pieces) + 1, "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 514, "type_vocab_size": 1}
    config |= {"initializer_range": 0.5}  # wide enough that texts differ
    for name, model in (
        ("m3", XLMRobertaModel(XLMRobertaConfig(**config))),
        ("reranker", XLMRobertaForSequenceClassification(XLMRobertaConfig(**config, num_labels=1))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        described = json.loads((folder / name / "tokenizer_config.json").read_text())
        described["tokenizer_class"] = "XLMRobertaTokenizer"
        (folder / name / "tokenizer_config.json").write_text(json.dumps(described))
    torch.save(torch.nn.Linear(64, 64).state_dict(), folder / "m3" / "colbert_linear.pt")
    torch.save(torch.nn.Linear(64, 1).state_dict(), folder / "m3" / "sparse_linear.pt")
    return folder


async def test_all_outputs_are_those_of_flagembedding(models: Path, tmp_path: Path) -> None:
    from FlagEmbedding import BGEM3FlagModel

    theirs = BGEM3FlagModel(str(models / "m3"), use_fp16=False, devices="cpu").encode(
        TEXTS, return_dense=True, return_sparse=True, return_colbert_vecs=True, max_length=512
    )
    async with running({"embed_bge": EmbedBge(model=str(models / "m3"), batch=2)}, tmp_path) as bus:
        ours = await bus.call(Embed(TEXTS, outputs=["dense", "sparse", "multi"]))
        about = await bus.about("embed", "embed_bge")
    assert np.abs(np.array(ours.rows()) - theirs["dense_vecs"]).max() < 1e-5
    assert about["dimension"] == ours.dim == 64 and about["max_tokens"] == 512
    assert any(ours.sparse)
    for mine, their in zip(ours.sparse, theirs["lexical_weights"], strict=True):
        assert mine == pytest.approx({token: float(weight) for token, weight in their.items()}, abs=1e-5)
    for vectors, expected in zip(ours.multi, theirs["colbert_vecs"], strict=True):
        assert np.array(vectors) == pytest.approx(expected, abs=1e-5)


async def test_only_what_is_asked_is_given(models: Path, tmp_path: Path) -> None:
    async with running({"embed_bge": EmbedBge(model=str(models / "m3"))}, tmp_path) as bus:
        reply = await bus.call(Embed(["tea at the museum"], outputs=["sparse"]))
        assert reply.sparse and not reply.rows() and not reply.multi
        assert (await bus.call(Embed([]))).rows() == []
        with pytest.raises(BadRequest, match="set `reranker` in"):
            await bus.call(Rerank("tea", ["tea"]))


async def test_many_at_once_get_what_each_gets_alone(models: Path, tmp_path: Path) -> None:
    plugin = EmbedBge(model=str(models / "m3"), reranker=str(models / "reranker"), batch=2)
    async with running({"embed_bge": plugin}, tmp_path) as bus:
        requests = [Embed([text, *TEXTS], outputs=["dense", "sparse"]) for text in TEXTS]
        long = [
            f"{text} " + "tea at the museum, " * 150 for text in TEXTS
        ]  # the tokenizer's truncation is shared state
        pairs = [Rerank(query, long) for query in ("tea", "cake", *long[2:])]
        alone = [await bus.call(request) for request in requests]
        scores = [await bus.call(request) for request in pairs]
        together = await asyncio.gather(*(bus.call(request) for request in requests * 4))
        assert await asyncio.gather(*(bus.call(request) for request in pairs * 4)) == scores * 4
        for reply, expected in zip(together, alone * 4, strict=True):
            assert np.array(reply.rows()) == pytest.approx(np.array(expected.rows()), abs=1e-6)
            assert [set(row) for row in reply.sparse] == [set(row) for row in expected.sparse]


async def test_scores_are_those_of_flagembedding(models: Path, tmp_path: Path) -> None:
    from FlagEmbedding import FlagReranker

    # FlagEmbedding turns tokens back into text on the way, which changes unknown characters and drops an empty text
    texts = [text.lower() for text in TEXTS if text]
    pairs = [("when does the museum open", text) for text in texts]
    theirs = FlagReranker(str(models / "reranker"), use_fp16=False, devices="cpu").compute_score(pairs)
    plugin = EmbedBge(model=str(models / "m3"), reranker=str(models / "reranker"), batch=2)
    async with running({"embed_bge": plugin}, tmp_path) as bus:
        ours = await bus.call(Rerank(pairs[0][0], texts))
        assert ours.scores == pytest.approx(theirs, abs=1e-4)
        assert (await bus.call(Rerank("tea", []))).scores == []
        assert len((await bus.call(Rerank("tea at the museum, " * 200, ["tea", "cake"]))).scores) == 2


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({}, r"`model` in \[plugins\.embed_bge\] is not set"),
        ({"model": "BAAI/bge-m3"}, "is not a folder"),
        ({"model": "{models}/reranker"}, r"lacks sparse_linear\.pt, colbert_linear\.pt"),
        ({"model": "{models}"}, r"lacks config\.json"),
        ({"model": "{models}/m3", "reranker": "{models}/m3"}, "not a reranker"),
        ({"model": "{models}/m3", "reranker": "BAAI/bge-reranker-v2-m3"}, "`reranker`.* is not a folder"),
    ],
)
async def test_what_is_missing_is_named(models: Path, tmp_path: Path, settings: dict[str, str], reason: str) -> None:
    filled = {key: value.format(models=models) for key, value in settings.items()}
    with pytest.raises(PluginError, match=reason):
        async with EmbedBge(**filled).attach(tmp_path):
            pass
