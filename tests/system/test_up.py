"""`aiirwkv up`: starts, watches over its children, and ends without leaving anything behind."""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Up, aiirwkv, command, descendants, launch


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Up]:
    """A system of this test's own."""
    system = launch(tmp_path / "data", tmp_path / "up.log", "--port", str(free_port()))
    yield system
    if system.process.poll() is None:
        system.process.send_signal(signal.SIGINT)
        system.process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def child(data: Path, name: str) -> int:
    for pid in descendants(data):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--process" in words and words[words.index(b"--process") + 1] == name.encode():
            return pid
    return 0


def test_it_names_its_address_and_ends_with_all_its_children(own: Up) -> None:
    said = own.log.read_text()
    assert re.search(r"ready in \d+\.\d s · open http://127\.0\.0\.1:\d+", said), said
    assert len(descendants(own.data)) >= 7
    own.process.send_signal(signal.SIGINT)
    assert own.process.wait(60) == 0
    assert descendants(own.data) == [] and own.log.read_text().endswith("ended\n")
    assert "Traceback" not in own.log.read_text()


def test_a_killed_child_comes_back(own: Up) -> None:
    old = child(own.data, "embed")
    os.kill(old, signal.SIGKILL)
    until(lambda: child(own.data, "embed") not in (0, old))
    until(lambda: own.cli("call", "embed", '{"texts":["hello"]}').returncode == 0)
    assert "embed ended (signal 9" in own.log.read_text()


def test_a_killed_nats_server_comes_back_and_nothing_is_lost(own: Up, tmp_path: Path) -> None:
    (tmp_path / "fact.txt").write_text("The otter pool is cleaned every Tuesday.\n")
    assert own.cli("index", str(tmp_path / "fact.txt"), "-c", "zoo").returncode == 0
    os.kill(int((own.data / "nats" / "pid").read_text()), signal.SIGKILL)
    until(lambda: own.cli("search", "otter", "-c", "zoo").returncode == 0)
    assert own.cli("index", str(tmp_path / "fact.txt"), "-c", "again").returncode == 0
    own.process.send_signal(signal.SIGINT)
    assert own.process.wait(60) == 0 and descendants(own.data) == []


def test_a_command_ends_when_the_system_goes_away(own: Up, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n\n".join(f"Number {i} is a number. " * 20 for i in range(4000)))
    command_line = command(own.data, "index", str(tmp_path / "long.txt"), "-c", "long")
    waiting = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True)
    until(lambda: "running" in own.log.read_text())
    os.kill(own.process.pid, signal.SIGKILL)
    _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 1 and "the bus went away" in said and "Traceback" not in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_after_a_full_disk_has_room_again_it_goes_on(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "fact.txt").write_text("The spare key hangs behind the blue door.\n")
    (tmp_path / "next.txt").write_text("The cellar door is always locked.\n")
    system = launch(small_disk / "data", tmp_path / "up.log", "--no-web")
    try:
        assert system.cli("index", str(tmp_path / "fact.txt"), "-c", "house").returncode == 0
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        full = system.cli("index", str(tmp_path / "next.txt"), "-c", "house")
        assert full.returncode == 1 and re.search("full|no space|make room", full.stderr, re.I), full.stderr
        assert "Traceback" not in full.stderr
        assert "blue door" in system.cli("search", "Where is the key?", "-c", "house").stdout
        filler.unlink()
        until(lambda: system.cli("index", str(tmp_path / "next.txt"), "-c", "house").returncode == 0, 60)
        assert "blue door" in system.cli("search", "Where is the key?", "-c", "house").stdout
    finally:
        system.process.send_signal(signal.SIGINT)
        system.process.wait(60)


def test_a_killed_supervisor_leaves_nothing_behind_and_nothing_is_lost(own: Up, tmp_path: Path) -> None:
    (tmp_path / "fact.txt").write_text("The ferry leaves at 07:40 from pier three.\n")
    assert own.cli("index", str(tmp_path / "fact.txt"), "-c", "ferries").returncode == 0
    os.kill(own.process.pid, signal.SIGKILL)
    own.process.wait()
    again = launch(own.data, tmp_path / "again.log", "--no-web")
    try:
        hits = again.json("search", "When does the ferry leave?", "-c", "ferries")["hits"]
        assert hits[0]["document"] == "fact.txt" and "07:40" in hits[0]["text"]
        servers = [pid for pid in descendants(own.data) if "nats" in Path(f"/proc/{pid}/comm").read_text()]
        assert len(servers) == 1
    finally:
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(60) == 0
    assert descendants(own.data) == []


def test_a_second_one_on_the_same_data_says_who_holds_it(own: Up) -> None:
    second = own.cli("up", "--port", "0")
    assert second.returncode == 1
    assert re.search(rf"in use by another aiirwkv \(process {own.process.pid}, which serves http://", second.stderr)
    assert "--data" in second.stderr and "Traceback" not in second.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = aiirwkv(tmp_path, "up", "--port", str(port))
    assert done.returncode == 1 and f"port {port} of 127.0.0.1 cannot be used" in done.stderr
    assert "choose another with --port" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_config_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[workers]\nllm = ["llm_rwk"]\n')
    done = aiirwkv(tmp_path / "data", "up", env=dict(os.environ) | {"AIIRWKV_CONFIG": str(config)})
    assert done.returncode == 1 and done.stderr.count("\n") <= 2 and "did you mean 'llm_rwkv'" in done.stderr


def test_a_full_disk_is_told_and_nothing_stored_is_lost(tmp_path: Path) -> None:
    """The children may not write files beyond 24 MB: what fits stays whole, what does not is refused in a line."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 20, 24 << 20))

    (tmp_path / "small.txt").write_text("The spare key hangs behind the blue door.\n")
    (tmp_path / "large.txt").write_bytes(b"".join(b"Line %d is about nothing at all.\n" % i for i in range(1_200_000)))
    limited = launch(tmp_path / "data", tmp_path / "up.log", "--no-web", preexec_fn=limit)
    try:
        assert limited.cli("index", str(tmp_path / "small.txt"), "-c", "house").returncode == 0
        large = limited.cli("index", str(tmp_path / "large.txt"), "-c", "house")
        assert large.returncode == 1 and "Traceback" not in large.stderr + large.stdout
        assert re.search(r"full|make room|too large|File too large", large.stderr), large.stderr
        hits = limited.json("search", "Where is the spare key?", "-c", "house")["hits"]
        assert "behind the blue door" in hits[0]["text"]
    finally:
        limited.process.send_signal(signal.SIGINT)
        limited.process.wait(60)
    again = launch(tmp_path / "data", tmp_path / "again.log", "--no-web")
    try:
        hits = again.json("search", "Where is the spare key?", "-c", "house")["hits"]
        assert "behind the blue door" in hits[0]["text"]
    finally:
        again.process.send_signal(signal.SIGINT)
        again.process.wait(60)
