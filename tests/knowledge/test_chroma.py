"""Chroma may lose everything: the catalogue makes it again, and answers meanwhile. Chroma on a server, too."""

import asyncio
import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from aiirwkv import Bus, Collections, ConfigError, Index, PluginError, Search, ServiceError, Source
from aiirwkv_index_chroma import IndexChroma
from aiirwkv_index_chroma.store import DATABASE, ChromaStore
from aiirwkv_knowledge.catalogue import Catalogue

from .conftest import World

TEXT = "\n\n".join(f"Sentence number {i} tells of thing {i}." for i in range(300))


async def filled(bus: Bus) -> int:
    return (await bus.call(Index("guide", [Source(text=TEXT, name="a.txt")]))).chunks


async def sound(bus: Bus, count: int) -> None:
    """Everything is there and found by the dense leg alone, sooner or later."""
    end = anyio.current_time() + 60
    while True:
        found, whole = await dense(bus), await bus.call(Collections("verify", name="guide"))
        if "thing 7" in found and not whole.problems:
            break
        assert anyio.current_time() < end, (found, whole.problems)
        await anyio.sleep(0.1)
    assert whole.count == count


async def dense(bus: Bus) -> str:
    hits = (await bus.call(Search("Sentence number 7 tells of thing 7.", ["guide"], mode="dense"))).hits
    return hits[0].text if hits else ""


async def test_chroma_holds_ids_and_vectors_only(bus: Bus, world: World) -> None:
    count = await filled(bus)
    client = world.index._store._client
    (collection,) = client.list_collections()
    kept = client.get_collection(collection.name, embedding_function=None)
    assert kept.count() == count and kept.configuration["hnsw"]["space"] == "cosine"
    assert kept.configuration["embedding_function"] is None
    rows = kept.get(limit=3)
    assert rows["documents"] == [None] * 3 and rows["metadatas"] == [None] * 3


@pytest.mark.parametrize("harm", ["missing", "database", "page", "index"])
async def test_a_lost_or_damaged_index_is_made_again(world: World, harm: str) -> None:
    folder = world.data / "index" / "chroma"
    async with world.serving() as bus:
        count = await filled(bus)
        if harm == "index":  # enough vectors for Chroma to write its index to files
            await bus.call(Index("more", [Source(text="\n\n".join(f"{TEXT} {i}" for i in range(4)))]))
    if harm == "missing":
        shutil.rmtree(folder)
    elif harm == "database":
        (folder / DATABASE).write_bytes(os.urandom(20_000))
    elif harm == "page":
        with (folder / DATABASE).open("r+b") as database:
            database.seek(40 * 1024)
            database.write(b"\xff" * 8192)
    else:
        damaged = list(folder.rglob("*.bin"))
        for file in damaged:
            file.write_bytes(os.urandom(5_000))
        assert damaged
    async with world.serving() as bus:
        hits = (await bus.call(Search("thing 7", ["guide"], top=50))).hits
        assert any("thing 7." in hit.text for hit in hits)
        await sound(bus, count)
        if harm == "index":
            with anyio.fail_after(20):
                while (await bus.call(Collections("verify", name="more"))).problems:
                    await anyio.sleep(0.1)
            assert (await bus.call(Search("thing 7", ["more"], mode="dense"))).hits
    assert bool(list(folder.parent.glob("chroma-damaged-*"))) == (harm in ("database", "page"))


async def test_a_folder_that_goes_while_it_is_open(world: World) -> None:
    async with world.serving() as bus:
        count = await filled(bus)
        shutil.rmtree(world.data / "index" / "chroma")
        with contextlib.suppress(ServiceError):  # Chroma may or may not notice at once
            await bus.call(Index("guide", [Source(text="The zebra is striped.", name="zebra.txt")]))
        (zebra,) = (await bus.call(Index("guide", [Source(text="The zebra is striped.", name="zebra.txt")]))).documents
        await bus.call(Collections("rebuild", name="guide"))
        await sound(bus, count + zebra.chunks)


async def test_a_missing_set_is_noticed_and_stray_vectors_are_told(world: World) -> None:
    async with world.serving() as bus:
        count = await filled(bus)
        (collection,) = (await bus.call(Collections("list"))).collections
        store = world.index._store
        await store.delete(collection.id, list(await store.ids(collection.id))[:5])
        problems = (await bus.call(Collections("verify", name="guide"))).problems
        assert problems == [f"5 of {count} vectors are missing from the vector store; run `rebuild`"]
        await store.upsert(collection.id, ["stray"], bytes(4 * 64 - 1) + b"\x3f")
        problems = (await bus.call(Collections("verify", name="guide"))).problems
        assert problems[1] == "1 vectors of the vector store belong to no chunk; run `rebuild`"
        assert (await bus.call(Collections("rebuild", name="guide"))).count == count
        await sound(bus, count)
        await store.drop(collection.id)
        await sound(bus, count)  # the first dense search notices


async def test_deleting_while_the_store_is_down(world: World) -> None:
    """What is deleted is unfindable at once; the store forgets it when it is back."""
    async with world.serving() as bus:
        count = await filled(bus)
        await bus.call(Index("guide", [Source(text="The zebra is striped.", name="zebra.txt")]))
        with down(world.index._store):
            await bus.call(Collections("delete", name="guide", document="zebra.txt"))
            reply = await bus.call(Search("zebra", ["guide"]))
            assert not any("zebra" in hit.text for hit in reply.hits)
            assert any("left out" in stage.note and "down" in stage.note for stage in reply.receipt.stages)
            with pytest.raises(ServiceError, match="down"):
                await bus.call(Search("zebra", ["guide"], mode="dense"))
        for mode in ("dense", "keyword", "hybrid"):
            hits = (await bus.call(Search("zebra", ["guide"], mode=mode, top=200))).hits
            assert not any("zebra" in hit.text for hit in hits)
        await sound(bus, count)


@contextmanager
def down(store: ChromaStore) -> Iterator[None]:
    work = store._in_turn

    async def fail(*_: object) -> object:
        raise ServiceError("the store is down for this test")

    store._in_turn = fail  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        store._in_turn = work  # type: ignore[method-assign]


async def test_ready_within_two_seconds(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys, time; from pathlib import Path; from aiirwkv_index_chroma import IndexChroma\n"
        "assert 'chromadb' not in sys.modules and 'numpy' not in sys.modules\n"
        "began = time.perf_counter()\n"
        "async def main():\n"
        "    async with IndexChroma().attach(Path(sys.argv[1])): print(time.perf_counter() - began)\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", script, tmp_path]
    for _ in range(4):  # the machine may be busy with something else
        seconds = float(subprocess.run(command, check=True, capture_output=True).stdout)
        if seconds < 2.0:
            break
    assert seconds < 2.0


async def test_one_process_owns_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiirwkv_index_chroma.store.LOCK_PATIENCE", 0.3)
    async with IndexChroma().attach(tmp_path):
        with pytest.raises(PluginError, match="another process has the Chroma index"):
            async with IndexChroma().attach(tmp_path):
                pass
    async with IndexChroma().attach(tmp_path):
        pass


async def test_settings_are_checked(tmp_path: Path) -> None:
    for plugin in (IndexChroma(url="localhost:8000"), IndexChroma(chunk_size=10, chunk_overlap=10)):
        with pytest.raises(ConfigError):
            async with plugin.attach(tmp_path):
                pass


async def test_a_chroma_server(world: World) -> None:
    port = free_port()
    world.index = IndexChroma(url=f"http://127.0.0.1:{port}", chunk_size=16)
    async with world.serving() as bus:
        with pytest.raises(ServiceError, match=rf"cannot reach the Chroma server at http://127.0.0.1:{port}"):
            await filled(bus)
        with chroma_server(world.data / "server", port):
            count = await filled(bus)
            await sound(bus, count)
            await bus.call(Collections("delete", name="guide", document="a.txt"))
            assert (await bus.call(Collections("verify", name="guide"))).count == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def chroma_server(folder: Path, port: int) -> Iterator[None]:
    command = [Path(sys.executable).with_name("chroma"), "run", "--path", folder, "--host", "127.0.0.1"]
    with subprocess.Popen(
        [*map(str, command), "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            give_up = time.monotonic() + 20
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/heartbeat", timeout=1).close()
                    break
                except OSError:
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(0.1)
            yield
        finally:
            server.terminate()


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        with pytest.raises(ServiceError, match=f"cannot write to {folder}/knowledge: .*right to write"):
            Catalogue(folder / "knowledge")
    finally:
        os.seteuid(user)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ServiceError, match=f"cannot write to {tmp_path}/file/knowledge"):
        Catalogue(tmp_path / "file" / "knowledge")


def test_a_damaged_or_newer_catalogue_is_named(tmp_path: Path) -> None:
    newer = sqlite3.connect(tmp_path / "catalogue.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(PluginError, match="newer AIIRWKV"):
        Catalogue(tmp_path)
    (tmp_path / "catalogue.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(ServiceError, match=f"{tmp_path} holds a damaged database"):
        Catalogue(tmp_path)


FULL = """
import asyncio, resource, sys
from pathlib import Path
from aiirwkv import Collections, Index, Search, ServiceError, Source
sys.path.insert(0, sys.argv[2])
from conftest import World

async def main():
    world = World(Path(sys.argv[1]))
    async with world.serving() as bus:
        await bus.call(Index("guide", [Source(text="The museum opens at nine.", name="a.txt")]))
        files = [path for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
        limit = max(path.stat().st_size for path in files)
        text = "\\n\\n".join(f"Sentence number {i} tells of thing {i}." for i in range(6000))
        for more in (0, 300_000, 600_000, 1_200_000, 1_800_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit + more, resource.RLIM_INFINITY))
            try:
                await bus.call(Index("guide", [Source(text=text, name="big.txt")]), timeout=100)
            except ServiceError as exc:
                print("REFUSED", exc)
            print("FOUND", (await bus.call(Search("museum opens", ["guide"], mode="keyword"))).hits[0].document)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        indexed = await bus.call(Index("guide", [Source(text=text, name="big.txt")]), timeout=100)
        print("AGAIN", indexed.documents[0].state, indexed.chunks)
        reply = await bus.call(Collections("verify", name="guide"))
        print("VERIFIED", reply.count, reply.problems)

asyncio.run(main())
"""


async def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=110)
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    refusals = [text for name, text in lines if name == "REFUSED"]
    assert len(refusals) >= 3, done.stderr[-3000:]
    for text in refusals:
        assert text.startswith(f"cannot write to {tmp_path}") and "nothing that was stored is lost" in text
    assert {text for name, text in lines if name == "FOUND"} == {"a.txt"}
    assert lines[-2:] == [["AGAIN", "ready 6000"], ["VERIFIED", "6001 []"]]


FULL_CHROMA = """
import asyncio, resource, sys
from pathlib import Path
from aiirwkv import ServiceError
from aiirwkv_index_chroma.store import ChromaStore

async def main():
    store = ChromaStore(Path(sys.argv[1]))
    await store.open()
    vector = bytes(4 * 384 - 1) + b"?"
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
    batches = 0
    try:
        while True:
            await store.upsert("kb-1", [f"{batches}-{i}" for i in range(64)], vector * 64)
            batches += 1
    except ServiceError as exc:
        print("REFUSED", exc)
    print("KEPT", await store.count("kb-1") == 64 * batches)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for batch in range(30):  # Chroma once waited here for its own lock
        await store.upsert("kb-1", [f"again-{batch}-{i}" for i in range(64)], vector * 64)
    print("AGAIN", await store.count("kb-1") == 64 * (batches + 30) == len(await store.ids("kb-1")))
    await store.close()

asyncio.run(main())
"""


async def test_chroma_works_again_after_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_CHROMA, str(tmp_path / "chroma")]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    refused, *rest = done.stdout.splitlines()
    assert refused.startswith(f"REFUSED cannot write to {tmp_path}/chroma: Chroma says")
    assert rest == ["KEPT True", "AGAIN True"]
