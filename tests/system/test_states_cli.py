"""What the model remembers, as a person and a script see it: reading once, asking, moving and dropping states."""

import time
from pathlib import Path

import msgspec
import pytest
from aiirwkv import Answer, Indexed, StatesReply

from tests.conftest import Up

FACTS = "The boiler is serviced every May.\nThe spare key is in the blue box.\n"
LONG = "\n\n".join(f"Shelf {number} holds the books about subject {number}." for number in range(60))


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    (tmp_path / "facts.txt").write_text(FACTS)
    return tmp_path / "facts.txt"


def kept(up: Up, begin: str) -> list[str]:
    """The labels that begin like this, of what is kept and pinned."""
    states = msgspec.convert(up.json("states"), StatesReply).states
    return sorted(state.label for state in states if state.pinned and state.label.startswith(begin))


def forgotten(up: Up, begin: str) -> bool:
    """Nothing of this label is kept any more; what nobody needs is dropped in the background."""
    end = time.monotonic() + 10
    while kept(up, begin):
        if time.monotonic() > end:
            return False
    return True


def test_a_document_is_read_once_and_forgotten_when_it_goes(up: Up, facts: Path) -> None:
    done = up.cli("index", str(facts), "-c", "once", "--read", "--json")
    indexed = msgspec.json.decode(done.stdout.splitlines()[-1], type=Indexed)
    assert (indexed.documents[0].read, indexed.documents[0].reason) == ("whole", ""), done.stderr
    assert kept(up, "once / ") == ["once / facts.txt"]
    assert "whole" in up.cli("collections", "documents", "once").stdout
    answer = msgspec.convert(up.json("ask", "Where is the spare key?", "-c", "once", "--read", "parallel"), Answer)
    assert answer.usage.hits == 1 and answer.usage.prompt > answer.usage.cached > answer.usage.prompt / 2
    shown = up.cli("ask", "When is the boiler serviced?", "-c", "once", "--read", "concat", "--receipt").stdout
    assert "from 1 kept state of" in shown and "searched for: When is the boiler serviced?" in shown
    assert up.cli("collections", "delete", "once", "--yes").returncode == 0
    assert forgotten(up, "once / ")


def test_a_collection_is_switched(up: Up, tmp_path: Path) -> None:
    (tmp_path / "shelves.txt").write_text(LONG)
    assert up.cli("collections", "create", "switched", "--read").returncode == 0
    done = up.cli("index", str(tmp_path / "shelves.txt"), "-c", "switched")
    assert "ready" in done.stderr and "read" in done.stderr
    passages = kept(up, "switched / shelves.txt, passage ")
    assert len(passages) > 1  # longer than the built-in model reads well
    answer = msgspec.convert(up.json("ask", "What is on shelf 7?", "-c", "switched", "--read", "parallel"), Answer)
    assert answer.usage.hits > 1 and answer.usage.cached > answer.usage.prompt * 0.8
    assert up.cli("collections", "read", "switched", "--off").returncode == 0
    assert forgotten(up, "switched / ")
    done = up.cli("collections", "read", "switched", "--document", "shelves.txt")
    assert done.returncode == 0 and kept(up, "switched / ") == passages, done.stderr


def test_a_state_is_read_listed_moved_and_dropped(up: Up, facts: Path, tmp_path: Path) -> None:
    done = up.cli("states", "read", str(facts), "--label", "my facts")
    id = done.stdout.strip()
    assert done.returncode == 0 and "has read" in done.stderr, done.stderr
    listed = up.cli("states").stdout
    assert id in listed and "my facts" in listed and "pinned" in listed and "ago" in listed
    assert "on disk (" in listed and "in memory (" in listed and "dropped to make room" in listed
    assert "tokens were not read again" in listed
    file = tmp_path / "facts.state"
    assert up.cli("states", "export", id, "--file", str(file)).returncode == 0 and file.stat().st_size > 1000
    assert up.cli("states", "drop", id).returncode == 0
    assert kept(up, "my facts") == []
    done = up.cli("states", "import", str(file))
    assert done.returncode == 0 and kept(up, "my facts") == ["my facts"], done.stderr
    assert up.cli("states", "drop", "--yes").returncode == 0
    assert "ago" not in up.cli("states").stdout


def test_mistakes_with_states_are_one_clear_line(up: Up, tmp_path: Path) -> None:
    (tmp_path / "forged.state").write_bytes(b"\x80\x04not a state")
    (tmp_path / "empty.txt").touch()
    for arguments, complaint in [
        (["states", "export", "nothing"], "nothing"),
        (["states", "drop", "nothing"], "nothing"),
        (["states", "import", str(tmp_path / "forged.state")], "cannot be imported"),
        (["states", "read", str(tmp_path / "empty.txt")], "empty"),
        (["collections", "read", "no such"], "no such"),
        (["states", "drop"], "Drop all kept states?"),
    ]:
        done = up.cli(*arguments)
        assert done.returncode == 1 and complaint in done.stderr + done.stdout, (arguments, done.stderr)
        assert "Traceback" not in done.stderr, arguments


def test_nobody_sees_the_states_of_another(up: Up, facts: Path) -> None:
    for name in ("eve", "finn"):
        assert up.cli("users", "add", name).returncode == 0
    eve, finn = (up.cli("users", "claim", name).stdout.strip() for name in ("eve", "finn"))
    done = up.cli("states", "read", str(facts), "--label", "eve's", "--claim", eve)
    id = done.stdout.strip()
    assert done.returncode == 0, done.stderr
    assert (
        "eve's" in up.cli("states", "--claim", eve).stdout and "eve's" not in up.cli("states", "--claim", finn).stdout
    )
    for action in ("drop", "export"):
        refused = up.cli("states", action, id, "--claim", finn)
        assert refused.returncode == 1 and id in refused.stderr
    assert up.cli("states", "drop", id, "--claim", eve).returncode == 0
