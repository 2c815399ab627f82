"""Models that are loaded, used and unloaded while they serve; each kind of checkpoint behind the same hook."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import msgspec
import pytest
from aiirwkv import Bus
from aiirwkv.errors import BadRequest, Conflict, NotFound, PluginError, ServiceError
from aiirwkv.plugins import load
from aiirwkv.testing import running
from aiirwkv.types import Generate, Message, Model, Models, States
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_llm_rwkv.shelf.library import BUILT_IN

from bench import random_checkpoint

NANO = BUILT_IN / "rwkv7-nano"
HELLO = Generate("The library", max_tokens=4, temperature=0)


def make(data: Path, name: str, version: str = "rwkv7", **card: object) -> Path:
    """A model of random weights with the vocabulary of the built-in one."""
    folder = data / "models" / name
    folder.mkdir(parents=True)
    random_checkpoint.make(folder / "model.safetensors", version, 2, 64, vocabulary=1024)
    shutil.copy(NANO / "vocab.txt", folder)
    (folder / "card.json").write_text(json.dumps({"name": name, "version": version, **card}))
    return folder


@pytest.fixture
def llm() -> LlmRwkv:
    return LlmRwkv(threads=1)


@pytest.fixture
async def bus(llm: LlmRwkv, tmp_path: Path) -> AsyncIterator[Bus]:
    make(tmp_path, "other")
    make(tmp_path, "six", "rwkv6")
    async with running({"llm_rwkv": llm}, data=tmp_path) as bus:
        yield bus


async def loaded(bus: Bus) -> dict[str, Model]:
    models = (await bus.call(Models())).models
    return {model.name: model for model in models if model.loaded}


async def test_another_model_is_used_while_serving(bus: Bus, llm: LlmRwkv) -> None:
    async with bus.stream(Generate("Once", max_tokens=3000, temperature=0, ban=[0], seed=1)) as long:
        pieces = aiter(long)
        await anext(pieces)
        (used,) = (await bus.call(Models("use", name="other"), timeout=60)).models
        assert used.name == "other" and used.loaded and used.default
        assert list(await loaded(bus)) == ["other"]
        assert (await bus.call(HELLO)).model == "other"
        with pytest.raises(NotFound, match="'rwkv7-nano' is not loaded; this worker serves other: aiirwkv models load"):
            await bus.call(msgspec.structs.replace(HELLO, model="rwkv7-nano"))
        with anyio.fail_after(60):
            *_, last = [piece async for piece in pieces]
    assert last.model == "rwkv7-nano", "running work finishes first"
    assert last.usage is not None and last.usage.completion == 3000


async def test_two_models_at_once(bus: Bus) -> None:
    (six,) = (await bus.call(Models("load", name="six"), timeout=60)).models
    assert six.loaded and not six.default and six.version == "rwkv6"
    assert (await bus.call(msgspec.structs.replace(HELLO, model="llm_rwkv/six"))).model == "six"
    assert (await bus.call(HELLO)).model == "rwkv7-nano"
    with pytest.raises(Conflict, match="answers by default"):
        await bus.call(Models("unload", name="rwkv7-nano"))
    with pytest.raises(Conflict, match="is loaded"):
        await bus.call(Models("delete", name="six"))
    await bus.call(Models("unload", name="six"))
    assert list(await loaded(bus)) == ["rwkv7-nano"]
    await bus.call(Models("delete", name="six"))
    with pytest.raises(NotFound, match="no model 'six'"):
        await bus.call(Models("load", name="six"))


async def test_what_was_chosen_is_remembered_until_the_configuration_changes(tmp_path: Path) -> None:
    make(tmp_path, "other")
    make(tmp_path, "third")
    async with running({"llm_rwkv": LlmRwkv(threads=1)}, data=tmp_path) as bus:
        await bus.call(Models("use", name="other"), timeout=60)
        await bus.call(Models("load", name="third"), timeout=60)
    async with running({"llm_rwkv": LlmRwkv(threads=1)}, data=tmp_path) as bus:
        assert {name: model.default for name, model in (await loaded(bus)).items()} == {"other": True, "third": False}
    async with running({"llm_rwkv": LlmRwkv(model="third", threads=1)}, data=tmp_path) as bus:
        assert {name: model.default for name, model in (await loaded(bus)).items()} == {"third": True}
    shutil.rmtree(tmp_path / "models" / "other")
    async with running({"llm_rwkv": LlmRwkv(threads=1)}, data=tmp_path) as bus:
        assert list(await loaded(bus)) == ["rwkv7-nano"], "what was chosen is gone: the configuration holds"


async def test_workers_with_the_same_data_follow_one_another(tmp_path: Path) -> None:
    make(tmp_path, "other")
    async with LlmRwkv(threads=1).attach(tmp_path) as one, LlmRwkv(threads=1).attach(tmp_path) as two:
        one._serving.use("other")
        with anyio.fail_after(20):
            while two.about()["model"] != "other":
                await anyio.sleep(0.1)
        assert two.about()["loaded"] == ["other"]


@pytest.mark.parametrize("version", ["rwkv6", "rwkv5.2", "rwkv4"])
async def test_other_versions(version: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "old", version)
    (folder / "card.json").unlink()
    (folder / "model.safetensors").rename(folder / "old.safetensors")
    llm = LlmRwkv(model=str(folder / "old.safetensors"), threads=1)
    async with running({"llm_rwkv": llm}, data=tmp_path) as bus:
        first = await bus.call(HELLO, timeout=60)
        assert first.usage.completion == 4 and first.usage.cached == 0
        again = await bus.call(msgspec.structs.replace(HELLO, prompt=HELLO.prompt + " of the town"), timeout=60)
        assert again.usage.completion == 4
        about = await bus.about("generate")
        assert about["version"] == version.partition(".")[0] and about["precision"] == "float32"
        assert ("package" in llm.stats()["runtime"]["runtime"]) == (version != "rwkv6")


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
async def test_precisions(precision: str, tmp_path: Path) -> None:
    async with running({"llm_rwkv": LlmRwkv(precision=precision, threads=1)}, data=tmp_path) as bus:
        passage = "The library opens at half past six. It is closed on Sundays."
        asked = Generate(messages=[Message("user", "When does the library open?")], documents=[passage])
        answer = await bus.call(asked, timeout=60)
        assert (await bus.about("generate"))["precision"] == precision
        assert "half past six" in answer.text or precision == "int4"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"precision": "int2"}, "must be one of auto, float32, bfloat16, int8, int4"),
        ({"precision": "nf4", "device": "cpu"}, "must be one of"),
        ({"device": "quantum"}, "cannot be used here"),
        ({"model": "nanu"}, "no model 'nanu'"),
    ],
)
async def test_settings_that_cannot_be(settings: dict[str, str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=complaint):
        async with LlmRwkv(**settings).attach(tmp_path):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("name", ["threads", "rows", "longest_prompt", "states_memory", "states_disk"])
def test_numbers_that_cannot_be(name: str) -> None:
    with pytest.raises(PluginError, match=rf"\[plugins\.llm_rwkv\] {name}: expected `int` >= "):
        load("llm_rwkv", {name: -1})


async def test_a_vocabulary_that_does_not_match(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    random_checkpoint.make(folder / "model.safetensors", "rwkv7", 2, 64, vocabulary=512)
    shutil.copy(NANO / "vocab.txt", folder)
    with pytest.raises(PluginError, match=r"does not belong to .*: its ids go up to 1023, the model's up to 511"):
        async with LlmRwkv(model=str(folder)).attach(tmp_path):
            pass


async def test_a_model_too_large_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiirwkv_llm_rwkv.service._available", lambda device: 1_000_000)
    with pytest.raises(PluginError, match=r"needs about 0.0 GB in float32, and 0.0 GB are free on cpu: unload"):
        async with LlmRwkv().attach(tmp_path):
            pass


async def test_texts_are_read_once(bus: Bus) -> None:
    passage = "The library of Bergen opens at half past six. " * 3
    read = States("read", documents=[passage], label="opening hours")
    first = await bus.call(read)
    (kept,) = first.states
    assert (
        kept.label == "opening hours"
        and kept.pinned
        and kept.model == "rwkv7-nano"
        and kept.tokens == first.usage.prompt
    )
    assert (await bus.call(read)).usage.cached == kept.tokens
    asked = Generate(messages=[Message("user", "When does the library open?")], documents=[passage])
    answer = await bus.call(asked)
    assert answer.usage.cached == kept.tokens and answer.usage.hits == 1 and answer.usage.bytes == kept.bytes
    assert answer.text == (await bus.call(msgspec.structs.replace(asked, cache=False))).text
    listed = await bus.call(States())
    assert kept.id in {state.id for state in listed.states} and listed.cache.tokens_saved >= kept.tokens
    exported = (await bus.call(States("export", id=kept.id))).object
    assert exported is not None
    await bus.call(States("drop", id=kept.id))
    assert (await bus.call(asked)).usage.cached in (0, answer.usage.prompt), (
        "only the state after the whole prompt is left"
    )
    await bus.call(States("drop"))
    assert not (await bus.call(States())).states
    (back,) = (await bus.call(States("import", object=exported.id, label="again"))).states
    assert back.tokens == kept.tokens and back.label == "again"
    assert (await bus.call(asked)).usage.cached == kept.tokens


@pytest.mark.parametrize(
    ("request_", "error", "complaint"),
    [
        (States("read"), BadRequest, "needs `documents`, `messages` or `prompt`"),
        (States("read", prompt="a", documents=["b"]), BadRequest, "either `prompt`"),
        (States("read", documents=["a"], model="nanu"), NotFound, "no model 'nanu'"),
        (States("export"), BadRequest, "needs `id`"),
        (States("export", id="abc"), NotFound, "no kept state 'abc'"),
        (States("drop", id="abc"), NotFound, "no kept state 'abc'"),
        (States("import"), BadRequest, "needs `object`"),
    ],
)
async def test_wrong_states(request_: States, error: type[Exception], complaint: str, bus: Bus) -> None:
    with pytest.raises(error, match=complaint):
        await bus.call(request_)


async def test_a_foreign_file_is_no_state(bus: Bus, tmp_path: Path) -> None:
    for data in (b"", b"nonsense" * 100, (NANO / "model.safetensors").read_bytes()[:5000]):
        object = await bus.put(data, "x.state")
        with pytest.raises(ServiceError):
            await bus.call(States("import", object=object.id))


async def test_a_state_for_another_base(bus: Bus) -> None:
    await bus.call(Models("load", name="other"), timeout=60)
    (kept,) = (
        await bus.call(States("read", prompt="The library opens at half past six, they say.", model="other"))
    ).states
    exported = (await bus.call(States("export", id=kept.id))).object
    assert exported is not None
    with pytest.raises(Conflict, match="model"):
        await bus.call(States("import", object=exported.id))
    await bus.call(States("import", object=exported.id, model="other"))
