"""The state cache: prefixes, owners, budgets, files, forged files, threads."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv.errors import BadRequest, Conflict, NotFound
from aiirwkv_llm_rwkv.cache import disk as state_disk
from aiirwkv_llm_rwkv.cache import file as state_file
from aiirwkv_llm_rwkv.cache.states import Found, StateCache
from torch import Tensor

SIZE, VOCABULARY = 512, 100
BYTES = 2 * SIZE
"""Of a state, without its token ids."""
BIG = 10_000_000
MODEL = "a" * 64


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def state(seed: int = 0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def logits(seed: int = 0) -> Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


class Caches:
    """Caches on one folder, closed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, list[StateCache]()

    def __call__(self, memory: int = BIG, disk: int = BIG, fingerprint: str = MODEL, **more: Any) -> StateCache:
        cache = StateCache(self.folder, memory, disk, fingerprint, SIZE, **{"vocabulary": VOCABULARY, **more})
        self.open.append(cache)
        return cache

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Caches]:
    caches = Caches(tmp_path / "states")
    yield caches
    for cache in caches.open:
        cache.close()


def keep(cache: StateCache, tokens: list[int], seed: int = 0, owner: str = "ann", **more: Any) -> Any:
    return cache.keep(cache.root(owner), tokens, state(seed), owner=owner, **more)


def longest(cache: StateCache, tokens: list[int], limit: int | None = None, owner: str = "ann") -> Found | None:
    return cache.longest(cache.root(owner), tokens, limit)


def holds(cache: StateCache, tokens: list[int], owner: str = "ann") -> bool:
    """Without using it."""
    ids = {kept.id for kept in cache.list(owner)}
    return cache.keys(cache.root(owner), tokens, [len(tokens)])[0].hex() in ids


# Prefixes


def test_the_longest_kept_prefix_is_found_wherever_texts_were_cut(caches: Caches) -> None:
    cache, words = caches(), text(3000)
    cuts = [1, 7, 255, 256, 257, 300, 511, 512, 1000, 1024, 2999]
    for cut in cuts:
        keep(cache, words[:cut], cut)
        keep(cache, [*words[: cut - 1], (words[cut - 1] + 1) % VOCABULARY], 10_000 + cut)  # parts at the last token
    for limit in [*cuts, *(cut + 1 for cut in cuts), *(cut - 1 for cut in cuts), 3000]:
        expected = max((cut for cut in cuts if cut <= limit), default=0)
        found = longest(cache, words, limit)
        assert (found.length if found else 0) == expected
        if found:
            torch.testing.assert_close(found.state, state(expected), atol=2e-3, rtol=1e-3)
            assert found.state.dtype == torch.float32
    other = [*words[:400], *text(600, 1)]
    found = longest(cache, other)
    assert found is not None and found.length == 300
    assert longest(cache, text(100, 2)) is None
    assert longest(cache, []) is None


def test_a_found_state_is_ones_own(caches: Caches) -> None:
    cache, words = caches(precision="float32"), text(10)
    keep(cache, words)
    first = longest(cache, [*words, 1])
    assert first is not None
    first.state.zero_()
    second = longest(cache, [*words, 1])
    assert second is not None and second.state.equal(state())


def test_float32_is_exact_and_what_float16_cannot_hold_is_kept_in_float32(caches: Caches) -> None:
    words = text(10)
    exact = caches(precision="float32")
    exact.keep(exact.root("ann"), words, state(), logits(), owner="ann")
    found = longest(exact, words)
    assert found is not None and found.logits is not None
    assert found.state.equal(state()) and found.logits.equal(logits())

    half = StateCache(None, BIG, 0, MODEL, SIZE)
    half.keep(half.root("ann"), words, state() * 1e5, owner="ann")
    found = longest(half, [*words, 1])
    assert found is not None and found.state.equal(state() * 1e5)


def test_a_whole_text_is_found_only_with_its_logits(caches: Caches) -> None:
    cache, words = caches(), text(20)
    keep(cache, words[:10], 1)
    keep(cache, words, 2)
    found = longest(cache, words)
    assert found is not None and found.length == 10 and found.logits is None
    found = longest(cache, [*words, 1], 20)
    assert found is not None and found.length == 20
    cache.keep(cache.root("ann"), words, state(3), logits(), owner="ann")
    found = longest(cache, words)
    assert found is not None and found.length == 20 and found.logits is not None
    torch.testing.assert_close(found.logits, logits(), atol=2e-3, rtol=1e-3)
    keep(cache, words, 4, label="again")  # does not cost it its logits
    found = longest(cache, words)
    assert found is not None and found.logits is not None and found.entry.header.label == "again"
    torch.testing.assert_close(found.state, state(3), atol=2e-3, rtol=1e-3)
    assert cache.stats().states == 2


def test_namespaces_are_apart(caches: Caches) -> None:
    cache, words = caches(), text(300)
    kept = keep(cache, words)
    more = [*words, 1]
    assert longest(cache, more, owner="ben") is None
    assert cache.longest(cache.root("ann", "tuned"), more) is None
    assert cache.longest(cache.root("ann", "", "tuned"), more) is None
    assert cache.root("ann", "x", "") != cache.root("ann", "", "x") != cache.root("annx", "", "")
    assert longest(cache, more) is not None

    assert cache.list("ben") == [] and [state.id for state in cache.list("ann")] == [kept.id]
    assert [state.owner for state in cache.list(None)] == ["ann"]
    for forbidden in (cache.drop, cache.export):
        with pytest.raises(NotFound):
            forbidden("ben", kept.id)
    for unknown in ("", "xyz", "00" * 16):
        with pytest.raises(NotFound):
            cache.drop("ann", unknown)
    assert cache.drop_all("ben") == []
    with pytest.raises(ValueError, match="owner"):
        cache.keep(cache.root("ann"), words, state(), owner="ben")
    keep(cache, words, owner="ben")
    assert [state.owner for state in cache.drop_all("ann")] == ["ann"]
    assert longest(cache, more) is None and longest(cache, more, owner="ben") is not None
    assert cache.drop(None, cache.list(None)[0].id).owner == "ben"
    assert cache.stats().states == 0


def test_keeping_again_refreshes_and_adds(caches: Caches) -> None:
    cache, words = caches(), text(300)
    first = keep(cache, words, 1)
    assert keep(cache, words, 2) is first
    again = keep(cache, words, 3, label="a book\ud800", pin=True)
    assert again.header.pinned and again.header.label == "a book?"
    keep(cache, words, 4)
    kept = cache.list("ann")
    assert [(state.label, state.pinned) for state in kept] == [("a book?", True)]
    found = longest(cache, [*words, 1])
    assert found is not None
    torch.testing.assert_close(found.state, state(1), atol=2e-3, rtol=1e-3)
    assert cache.flush() and cache.list("ann")[0].disk
    keep(cache, words, 5, label="the same book")
    assert cache.flush()
    assert [state_file.peek(path)[0].label for path in caches.files()] == ["the same book"]


def test_numbers_that_are_not_finite_are_not_kept(caches: Caches, caplog: pytest.LogCaptureFixture) -> None:
    cache, words = caches(), text(10)
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = state()
        broken[7] = bad
        assert cache.keep(cache.root("ann"), words, broken, owner="ann") is None
        with pytest.raises(Conflict, match="not finite"):
            cache.keep(cache.root("ann"), words, broken, owner="ann", pin=True)
        with pytest.raises(Conflict, match="not finite"):
            cache.keep(cache.root("ann"), words, state(), torch.full((VOCABULARY,), bad), owner="ann", pin=True)
    assert cache.stats().states == 0 and "not finite" in caplog.text
    with pytest.raises(ValueError, match="floats"):
        cache.keep(cache.root("ann"), words, state()[1:], owner="ann")
    with pytest.raises(ValueError, match="some tokens"):
        keep(cache, [])


def test_shared_tells_where_texts_part(caches: Caches) -> None:
    cache, words = caches(), text(1000)
    assert cache.shared(cache.root("ann"), words) == 0
    entry = keep(cache, words)
    other = [*words[:600], *text(400, 1)]
    assert longest(cache, other) is None
    assert cache.shared(cache.root("ann"), other) == 512
    assert cache.shared(cache.root("ann"), words[:255]) == 0
    assert cache.shared(cache.root("ben"), other) == 0
    cache.drop("ann", entry.id)
    assert cache.shared(cache.root("ann"), other) == 0


def test_what_is_being_read_is_not_read_twice(caches: Caches) -> None:
    cache, words = caches(), text(1000)
    root = cache.root("ann")
    mine = cache.keys(root, words, [200, 600, 1000])
    theirs = cache.keys(root, [*words[:700], *text(300, 1)], [200, 600, 1000])
    assert mine[:2] == theirs[:2] and mine[2] != theirs[2]
    assert cache.begin(*mine)
    assert not cache.begin(*theirs)
    assert cache.begin(theirs[2])  # the refusal above has claimed nothing
    cache.done(theirs[2])
    keep(cache, words[:200])
    cache.done(mine[0])
    assert not cache.begin(*theirs)
    keep(cache, words[:600])
    cache.done(mine[1])
    assert cache.begin(*theirs)
    assert not cache.begin(mine[2])
    found = longest(cache, [*words[:700], *text(300, 1)])
    assert found is not None and found.length == 600
    cache.done(*mine)  # failed: nothing is kept, and somebody else may begin
    assert cache.begin(mine[2])


# Budgets


def test_what_is_worth_least_leaves_memory_first() -> None:
    cache = StateCache(None, 4 * (BYTES + 4 * 120), 0, MODEL, SIZE)
    texts = [text(100 + number, number) for number in range(6)]
    for words in texts[:4]:
        keep(cache, words)
    assert longest(cache, [*texts[0], 1]) is not None  # used: now worth most
    keep(cache, texts[4])
    assert [holds(cache, words) for words in texts] == [True, False, True, True, True, False]
    keep(cache, texts[5])
    assert [holds(cache, words) for words in texts] == [True, False, False, True, True, True]
    stats = cache.stats()
    assert (stats.states, stats.dropped, stats.disk, stats.disk_budget) == (4, 2, 0, 0)
    assert 0 < stats.memory <= stats.memory_budget


def test_old_merit_fades() -> None:
    cache = StateCache(None, 3 * (BYTES + 4 * 110), 0, MODEL, SIZE)
    once = text(100)
    keep(cache, once)
    for _ in range(5):
        longest(cache, [*once, 1])
    lasted = 0
    while holds(cache, once):
        keep(cache, text(100, lasted + 1))
        lasted += 1
        assert lasted < 100
    assert lasted > 5


def test_a_state_is_worth_what_it_spares_beyond_the_next_shorter_one() -> None:
    room = 2 * BYTES + 4 * (1000 + 1010 + 50)
    cache = StateCache(None, room, 0, MODEL, SIZE)
    words = text(1010)
    keep(cache, words[:1000])
    keep(cache, words)  # spares 10 tokens more
    keep(cache, text(50, 1))
    assert holds(cache, words[:1000]) and not holds(cache, words)

    cache = StateCache(None, room, 0, MODEL, SIZE)
    first = keep(cache, words[:1000])
    keep(cache, words)
    cache.drop("ann", first.id)  # now it spares all 1010
    for number in range(1, 6):
        keep(cache, text(50, number))
    assert holds(cache, words) and not holds(cache, text(50, 1))


def test_states_leave_memory_for_the_disk_if_they_are_worth_a_file(caches: Caches) -> None:
    cache = caches(memory=BYTES + 4 * 600)
    short, used, long = text(50), text(60, 1), text(500, 2)
    keep(cache, short)
    keep(cache, used)  # short is not worth a file
    assert longest(cache, [*used, 1]) is not None
    keep(cache, long)
    cache.flush()
    keep(cache, text(600, 3))
    cache.flush()
    assert [holds(cache, words) for words in (short, used, long)] == [False, True, True]
    kept = {state.tokens: state for state in cache.list("ann")}
    assert (kept[60].memory, kept[60].disk) == (False, True)
    assert len(caches.files()) == cache.stats().states - 1
    found = longest(cache, [*long, 1])  # back from the disk
    assert found is not None
    torch.testing.assert_close(found.state, state(), atol=2e-3, rtol=1e-3)
    assert {state.tokens: state.memory for state in cache.list("ann")}[500]
    cache.flush()
    assert cache.stats().memory <= cache.stats().memory_budget


def test_the_disk_keeps_its_budget_and_drops_what_is_worth_least(caches: Caches) -> None:
    cache = caches(memory=0, disk=3 * 5000)  # a file has 4608 bytes
    texts = [text(700, number) for number in range(5)]
    for words in texts[:3]:
        keep(cache, words)
        assert cache.flush()
    assert longest(cache, [*texts[0], 1]) is not None
    for words in texts[3:]:
        keep(cache, words)
        assert cache.flush()
    assert [holds(cache, words) for words in texts] == [True, False, False, True, True]
    stats = cache.stats()
    assert stats.dropped == 2 and stats.memory == 0
    assert stats.disk == sum(path.stat().st_size for path in caches.files()) <= stats.disk_budget


def test_what_is_worth_less_than_all_on_disk_does_not_push_it_out(caches: Caches) -> None:
    cache = caches(disk=2 * 5000)
    texts = [text(700, number) for number in range(2)]
    for words in texts:
        keep(cache, words)
    cache.close()
    cache = caches(memory=2 * (BYTES + 4 * 700), disk=2 * 5000)
    for words in texts:
        longest(cache, [*words, 1])
    keep(cache, text(300, 9))
    for words in texts:
        longest(cache, [*words, 1])
    cache.flush()
    assert [holds(cache, words) for words in texts] == [True, True] and cache.stats().states == 2


def test_pinned_states_stay_and_are_refused_when_they_are_too_many(caches: Caches) -> None:
    cache = caches(memory=0, disk=3 * 5000)
    pinned = [keep(cache, text(700, number), pin=True) for number in range(2)]
    for number in range(10, 20):
        keep(cache, text(700, number))
        longest(cache, [*text(700, number), 1])
        cache.flush()
    assert [holds(cache, text(700, number)) for number in range(2)] == [True, True]
    assert len(caches.files()) == 3
    keep(cache, text(700, 2), pin=True)
    with pytest.raises(Conflict, match=r"needs 0\.0 MB .*drop some states or raise plugins\.llm_rwkv\.states_disk"):
        keep(cache, text(700, 3), pin=True)
    assert not holds(cache, text(700, 3))
    keep(cache, text(700, 1), pin=True)  # is one of them already
    cache.flush()
    assert len(caches.files()) == 3 and cache.stats().disk <= 3 * 5000
    cache.drop("ann", pinned[0].id)
    keep(cache, text(700, 3), pin=True)
    cache.flush()
    assert sorted(state.disk for state in cache.list("ann")) == [True] * 3
    with pytest.raises(Conflict, match="states_disk"):
        keep(StateCache(None, BIG, BIG, MODEL, SIZE), text(10), pin=True)


# Files


def test_states_survive_a_restart(caches: Caches) -> None:
    cache = caches()
    words = text(800)
    cache.keep(cache.root("ann", "tuned"), words, state(1), logits(), owner="ann", model="m", label="a book", pin=True)
    keep(cache, text(300, 2), 2, owner="ben")
    keep(cache, text(20, 3), 3)  # short and never used
    used = keep(cache, text(20, 4), 4)
    assert longest(cache, [*text(20, 4), 1]) is not None
    before = cache.list(None)
    cache.close()
    assert [stat.S_IMODE(path.stat().st_mode) for path in caches.files()] == [0o600] * 3
    assert stat.S_IMODE(caches.folder.stat().st_mode) == 0o700

    cache = caches()
    kept = {state.id: state for state in cache.list(None)}
    assert len(kept) == 3 and cache.stats().disk == sum(path.stat().st_size for path in caches.files())
    for state_ in before:
        if state_.tokens != 20 or state_.id == used.id:
            again = kept[state_.id]
            assert again == msgspec.structs.replace(state_, memory=False, disk=True, used=again.used)
            assert again.used == pytest.approx(state_.used, abs=1)
    assert longest(cache, [*words, 1]) is None
    found = cache.longest(cache.root("ann", "tuned"), words)
    assert found is not None and found.length == 800 and found.logits is not None
    torch.testing.assert_close(found.state, state(1), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found.logits, logits(), atol=2e-3, rtol=1e-3)
    assert found.entry.header.hits == 1
    assert cache.shared(cache.root("ben"), text(300, 2)) == 256


def test_after_a_restart_the_last_used_are_worth_more(caches: Caches) -> None:
    cache = caches()
    for number in range(4):
        keep(cache, text(700, number))
    cache.close()
    for number, path in enumerate(caches.files()):
        os.utime(path, (1e9 + number, 1e9 + number))
    oldest = caches.files()[0].stem
    cache = caches(memory=0, disk=4 * 5000)
    keep(cache, text(700, 9))
    cache.flush()
    assert oldest not in {state.id for state in cache.list(None)} and cache.stats().states == 4


def test_a_lower_budget_holds_at_the_next_start(caches: Caches) -> None:
    cache = caches()
    for number in range(4):
        keep(cache, text(700, number), pin=number == 0)
    cache.close()
    cache = caches(disk=2 * 5000)
    assert cache.stats().states == len(caches.files()) == 2 and holds(cache, text(700, 0))
    cache.close()
    assert caches(disk=0).stats().states == 0 and len(caches.files()) == 2


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    header, begin = state_file.decode(bytes(data))
    if how == "bit":
        data[begin + 100] ^= 1
    elif how == "tokens":
        data[begin] ^= 1
    elif how == "nan":
        at = begin + 4 * header.tokens
        data[at : at + 2] = b"\x00\x7e"
        header.checksum = state_file.checksum(torch.frombuffer(data[begin:], dtype=torch.uint8))
        data[:begin] = state_file.encode(header)
    elif how == "truncated":
        del data[-10:]
    elif how == "empty":
        data.clear()
    elif how == "magic":
        data[:4] = b"PK\x03\x04"
    elif how == "version":
        data[8] = 99
    elif how == "header":
        data[20:40] = b"\xff" * 20
    elif how == "length":
        data[12:16] = b"\xff\xff\xff\x7f"
    elif how == "another":
        header.key = "0" * 32
        data[:begin] = state_file.encode(header)
    path.write_bytes(data)


DAMAGES = ["bit", "tokens", "nan", "truncated", "empty", "magic", "version", "header", "length", "another"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_dropped_and_the_next_shorter_prefix_taken(
    caches: Caches, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    cache, words = caches(memory=0), text(600)
    keep(cache, words[:300])
    cache.flush()
    long = keep(cache, words)
    assert cache.flush() and len(caches.files()) == 2
    path = caches.folder / f"{long.id}.state"
    damage(path, how)
    found = longest(cache, [*words, 1])
    assert found is not None and found.length == 300
    cache.flush()
    assert not path.exists() and not holds(cache, words)
    assert f"{long.id} cannot be used" in caplog.text
    keep(cache, words)
    assert cache.flush() and path.exists()


@pytest.mark.parametrize("how", [how for how in DAMAGES if how not in ("bit", "tokens", "nan")])
def test_a_damaged_file_is_left_alone_at_the_start_and_first_to_go(
    caches: Caches, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    cache = caches()
    ids = [keep(cache, text(700, number)).id for number in range(3)]
    cache.close()
    damaged = caches.folder / f"{ids[1]}.state"
    damage(damaged, how)
    cache = caches(memory=0, disk=3 * 5000)
    assert {state.id for state in cache.list(None)} == {ids[0], ids[2]} and damaged.exists()
    assert cache.stats().disk == sum(path.stat().st_size for path in caches.files())
    assert "1 files" in caplog.text and damaged.name in caplog.text
    for number in range(3, 5):
        keep(cache, text(700, number))
        cache.flush()
    assert not damaged.exists() or damaged.stat().st_size == 0
    assert cache.stats().states >= 3


def test_strange_things_in_the_folder_do_no_harm(caches: Caches) -> None:
    caches.folder.mkdir()
    (caches.folder / "notes.txt").write_text("mine")
    (caches.folder / "a.state").mkdir()
    (caches.folder / "b.state").symlink_to("/etc/passwd")
    os.mkfifo(caches.folder / "c.state")
    old, new = caches.folder / "d.1.tmp", caches.folder / "e.2.tmp"
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    cache = caches(memory=0, disk=5000)
    keep(cache, text(700))
    assert cache.flush() and cache.stats().states == 1
    assert not old.exists() and new.exists()
    assert {path.name for path in caches.files()} > {"notes.txt", "a.state", "b.state", "c.state"}


def test_other_models_states_stay_and_are_the_first_to_go(caches: Caches) -> None:
    cache = caches(fingerprint="b" * 64)
    theirs = [keep(cache, text(700, number), model="theirs", pin=number == 0).id for number in range(2)]
    longest(cache, [*text(700, 1), 1])
    cache.close()
    cache = caches(memory=0, disk=3 * 5000)
    assert longest(cache, [*text(700, 1), 1]) is None
    assert {state.id: state.model for state in cache.list("ann")} == dict.fromkeys(theirs, "theirs")
    keep(cache, text(700, 5))
    cache.flush()
    assert cache.stats().states == 3
    keep(cache, text(701, 6))
    cache.flush()
    assert theirs[1] not in {state.id for state in cache.list("ann")} and holds(cache, text(700, 5))
    cache.drop("ann", theirs[0])
    assert cache.flush() and cache.stats().states == len(caches.files()) == 2


def test_a_full_disk_fails_no_request(
    caches: Caches, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches(memory=3 * (BYTES + 4 * 700))
    full = True

    def fsync(file: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_file.os, "fsync", fsync)
    keep(cache, text(700), pin=True)
    cache.flush()
    assert caches.files() == [] and not cache.list("ann")[0].disk
    assert longest(cache, [*text(700), 1]) is not None
    for number in range(1, 9):
        keep(cache, text(700, number))
        cache.flush()
        assert longest(cache, [*text(700, number), 1]) is not None
    stats = cache.stats()
    assert stats.memory <= stats.memory_budget and stats.disk == 0 and caches.files() == []
    assert caplog.text.count("No space left") == 1
    full = False
    for number in range(9, 20):
        keep(cache, text(700, number))
        cache.flush()
    assert caches.files() and cache.stats().disk > 0


def test_a_folder_that_cannot_be_made_leaves_the_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = StateCache(tmp_path / "file" / "states", BIG, BIG, MODEL, SIZE)
    keep(cache, text(10))
    assert longest(cache, [*text(10), 1]) is not None and cache.stats().disk_budget == 0
    assert "in memory only" in caplog.text
    cache.close()


def test_a_slow_disk_does_not_let_memory_grow(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    going = threading.Event()
    write = state_disk.write
    monkeypatch.setattr(state_disk, "write", lambda *of: going.wait() and write(*of))
    one = BYTES + 4 * 700
    cache = caches(memory=8 * one)
    for number in range(50):
        keep(cache, text(700, number))
        assert cache.stats().memory <= (8 + 2 + 1) * one
    assert cache.stats().dropped > 30
    going.set()
    cache.flush()
    assert cache.stats().memory <= 8 * one
    assert caches.files()


def test_what_is_dropped_while_it_is_written_leaves_no_file(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    going, begun = threading.Event(), threading.Event()
    write = state_disk.write

    def slowly(*of: Any) -> None:
        begun.set()
        going.wait()
        write(*of)

    monkeypatch.setattr(state_disk, "write", slowly)
    cache = caches()
    entry = keep(cache, text(10), pin=True)
    begun.wait()
    cache.drop("ann", entry.id)
    going.set()
    cache.flush()
    stats = cache.stats()
    assert (caches.files(), stats.states, stats.memory, stats.disk) == ([], 0, 0, 0)


# Files from elsewhere


def exported(cache: StateCache, words: list[int], owner: str = "ann") -> bytes:
    entry = cache.keep(cache.root(owner), words, state(1), logits(), owner=owner, label="a book", model="m", pin=True)
    assert entry is not None
    return cache.export(owner, entry.id)


@pytest.mark.parametrize("memory", [BIG, 0])
def test_a_state_can_be_given_away(caches: Caches, tmp_path: Path, memory: int) -> None:
    giving, words = caches(memory=memory), text(600)
    if not memory:
        keep(giving, words, pin=True)
        giving.flush()
    data = exported(giving, words)
    assert b"ann" not in data

    taking = StateCache(tmp_path / "elsewhere", BIG, BIG, MODEL, SIZE, vocabulary=VOCABULARY)
    kept = taking.import_("ben", data)
    assert (kept.owner, kept.tokens, kept.label, kept.model, kept.pinned) == ("ben", 600, "a book", "m", True)
    assert longest(taking, words) is None
    found = longest(taking, words, owner="ben")
    assert found is not None and found.length == 600 and found.logits is not None
    torch.testing.assert_close(found.state, state(1), atol=2e-3, rtol=1e-3)
    assert taking.shared(taking.root("ben"), words) == 512
    assert taking.import_("ben", data, label="the book").id == kept.id
    assert [state.label for state in taking.list("ben")] == ["the book"]
    assert taking.export("ben", kept.id) != data and taking.import_("ann", data).id != kept.id
    taking.close()


def test_a_state_of_another_model_is_refused(caches: Caches) -> None:
    data = exported(caches(), text(10))
    other = StateCache(None, BIG, 0, "b" * 64, SIZE, vocabulary=VOCABULARY)
    with pytest.raises(Conflict, match=r"'m' \(aaaaaaaaaaaa…\), and this is 'n' \(bbbbbbbbbbbb…\)"):
        other.import_("ben", data, model="n")
    assert other.stats().states == 0


def forged(data: bytes, payload: bytes | None = None, **changes: Any) -> bytes:
    header, begin = state_file.decode(data)
    body = data[begin:] if payload is None else payload
    header = msgspec.structs.replace(header, **changes)
    if "checksum" not in changes:
        header.checksum = state_file.checksum(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    return state_file.encode(header) + body


def test_forged_files_are_refused(caches: Caches) -> None:
    cache, words = caches(), text(600)
    good = exported(cache, words)
    cache.flush()
    cache.drop_all("ann")
    _, begin = state_file.decode(good)
    body = bytearray(good[begin:])
    huge, negative, nan = bytearray(body), bytearray(body), bytearray(body)
    huge[:4] = VOCABULARY.to_bytes(4, "little")
    negative[:4] = b"\xff" * 4
    nan[2400:2402] = b"\x00\x7c"
    text_of_header = good[16:begin]
    bad = {
        "empty": b"",
        "short": good[:15],
        "header only": good[:begin],
        "not all": good[:-1],
        "too much": good + b"\0",
        "foreign": b"PK\x03\x04" + good[4:],
        "pickle": b"\x80\x04\x95" + good[3:],
        "version": good[:8] + b"\x02" + good[9:],
        "header's length": good[:12] + b"\xff" * 4 + good[16:],
        "header": good[:16] + b"[" * len(text_of_header) + good[begin:],
        "size": forged(good, size=SIZE + 1),
        "size and payload": forged(good, bytes(body) + b"\0\0", size=SIZE + 1),
        "no logits": forged(good, logits=0),
        "other logits": forged(good, bytes(body) + b"\0\0", logits=VOCABULARY + 1),
        "negative": forged(good, size=-1),
        "enormous": forged(good, tokens=1 << 31),
        "no tokens": forged(good, tokens=0),
        "more tokens": forged(good, tokens=601),
        "dtype": forged(good, dtype="object"),
        "float32": forged(good, dtype="float32"),
        "checksum": forged(good, checksum="00000000"),
        "key": forged(good, key="../../../../../../etc/passwd"),
        "path": forged(good, path=[]),
        "label": forged(good, label="x" * 5000),
        "id too large": forged(good, bytes(huge)),
        "id negative": forged(good, bytes(negative)),
        "infinite": forged(good, bytes(nan)),
        "unknown field": good[:16] + text_of_header.replace(b'"hits":0', b'"hats":0') + good[begin:],
    }
    for name, data in bad.items():
        with pytest.raises(BadRequest, match="cannot be imported"):
            cache.import_("ann", data)
            pytest.fail(name)
    cache.flush()
    assert cache.stats().states == 0 and caches.files() == []
    cache.import_("ann", good)


def test_a_forged_key_or_owner_has_no_effect(caches: Caches) -> None:
    cache, words = caches(), text(600)
    good = exported(cache, words)
    cache.drop_all(None)
    kept = cache.import_(
        "ann", forged(good, owner="ben", key="0" * 32, path=["x"], parent="1" * 32, pinned=True), pin=False
    )
    assert (kept.owner, kept.pinned, cache.list("ben")) == ("ann", False, [])
    assert kept.id == cache.keys(cache.root("ann"), words, [600])[0].hex()
    assert cache.drop("ann", kept.id) and cache.stats().states == 0


# Figures and threads


def test_statistics(caches: Caches) -> None:
    cache, words = caches(), text(300)
    assert longest(cache, words) is None
    keep(cache, words[:200])
    for _ in range(3):
        assert longest(cache, words) is not None
    stats = cache.stats()
    assert (stats.states, stats.hits, stats.misses, stats.tokens_saved, stats.dropped) == (1, 3, 1, 600, 0)
    assert stats.memory == BYTES + 4 * 200 and (stats.memory_budget, stats.disk_budget) == (BIG, BIG)
    kept = cache.list("ann")[0]
    assert (kept.hits, kept.tokens, kept.bytes, kept.memory, kept.disk) == (3, 200, BYTES + 4 * 200, True, False)
    assert time.time() - 60 < kept.created <= kept.used <= time.time()


def test_states_kept_in_inference_mode_are_of_use_outside(caches: Caches) -> None:
    cache, words = caches(), text(300)
    with torch.inference_mode():
        entry = keep(cache, words, pin=True)
    cache.flush()
    found = longest(cache, [*words, 1])
    assert found is not None
    found.state.add_(1)
    assert len(cache.export("ann", entry.id)) > BYTES


def test_many_threads_at_once(caches: Caches) -> None:
    """Every state that is found is that of its text, and the figures agree in the end."""
    cache = caches(memory=20 * BYTES, disk=60 * 4000)
    texts = [text(200 + number, number) for number in range(40)]
    errors: list[BaseException] = []
    until = time.monotonic() + 2

    def work(seed: int) -> None:
        order = text(10_000, seed)
        owner = ["ann", "ben"][seed % 2]
        try:
            for step, pick in enumerate(order):
                if time.monotonic() > until:
                    return
                number = pick % len(texts)
                found = longest(cache, [*texts[number], 1], owner=owner)
                if found is None:
                    keep(cache, texts[number], number, owner, pin=pick % 7 == 0 and number < 5)
                else:
                    assert found.length == 200 + number
                    torch.testing.assert_close(found.state, state(number), atol=2e-3, rtol=1e-3)
                if step % 50 == 0:
                    for kept in cache.list(owner)[:3]:
                        try:
                            cache.export(owner, kept.id)
                            cache.drop(owner, kept.id)
                        except NotFound:
                            continue
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert cache.flush()
    stats, kept = cache.stats(), cache.list(None)
    assert stats.hits > 0 and stats.misses > 0
    assert stats.states == len(kept)
    assert stats.memory == sum(state.bytes for state in kept if state.memory) <= stats.memory_budget
    assert stats.disk == sum(path.stat().st_size for path in caches.files()) <= stats.disk_budget
    assert sum(state.disk for state in kept) == len(caches.files())


def test_nothing_is_logged_in_good_weather(caches: Caches, caplog: pytest.LogCaptureFixture) -> None:
    cache = caches(memory=0)
    for number in range(5):
        keep(cache, text(700, number))
        cache.flush()
        longest(cache, [*text(700, number), 1])
    cache.close()
    cache = caches()
    assert len(cache.drop_all(None)) == 5 and cache.flush()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert caches.files() == []
