"""The commands as a person and a script use them, against a running system and without one."""

import json
import os
import time
from pathlib import Path

import msgspec
import pytest
from aiirwkv import Answer, Hits, Indexed, UsersReply

from tests.conftest import Up, aiirwkv

FACTS = "The boiler is serviced every May.\nThe spare key is in the blue box.\n"


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "facts.txt").write_text(FACTS)
    (tmp_path / "house" / "notes.md").write_text("# Garden\n\nThe roses are cut in March.\n")
    (tmp_path / "house" / "picture.xyz").write_bytes(b"\0\1\2")
    return tmp_path / "house"


def test_index_search_and_ask_print_the_replies_of_the_bus(up: Up, facts: Path) -> None:
    done = up.cli("index", str(facts), "--collection", "house", "--json")
    assert "left out" in done.stderr and "picture.xyz" in done.stderr
    indexed = msgspec.json.decode(done.stdout.splitlines()[-1], type=Indexed)
    names = {document.name: document for document in indexed.documents}
    assert set(names) == {"house/facts.txt", "house/notes.md"} and indexed.chunks == 2
    assert all(document.state == "ready" for document in names.values())
    hits = msgspec.convert(up.json("search", "Where is the key?", "--collection", "house", "--top", "1"), Hits)
    [hit] = hits.hits
    assert hit.document == "house/facts.txt" and hit.page is None and FACTS[hit.start : hit.end] == hit.text
    assert hits.receipt.stages and hits.receipt.considered
    answer = msgspec.convert(up.json("ask", "Where is the spare key?", "--collection", "house"), Answer)
    [citation] = answer.citations
    assert "blue box" in answer.answer and "[1]" in answer.answer and answer.demonstration
    assert citation.document == "house/facts.txt" and FACTS[citation.start : citation.end] == citation.text
    assert citation.text == "The spare key is in the blue box."
    assert {stage.name for stage in answer.receipt.stages} >= {"embed", "dense", "write"}
    assert any(passage.kept for passage in answer.receipt.considered)


def test_people_read_plain_text(up: Up, facts: Path) -> None:
    up.cli("index", str(facts), "-c", "plain")
    assert "1. house/" in up.cli("search", "roses", "-c", "plain").stdout
    asked = up.cli("ask", "When are the roses cut?", "-c", "plain")
    assert "March" in asked.stdout and "[1] house/notes.md" in asked.stdout
    assert "demonstration model" in asked.stderr
    assert "plain" in up.cli("collections").stdout
    assert "house/notes.md" in up.cli("collections", "documents", "plain").stdout
    assert "rwkv7-nano" in up.cli("models").stdout
    assert "index house/notes.md" in up.cli("jobs").stdout
    assert "served by 1 worker" in up.cli("plugins").stdout
    assert up.cli("collections", "rename", "plain", "simple").returncode == 0
    assert up.cli("collections", "delete", "simple", "--yes").returncode == 0
    assert up.cli("search", "roses", "-c", "simple").returncode == 1


def test_without_a_running_system_one_is_started_for_the_call(tmp_path: Path, facts: Path) -> None:
    data = tmp_path / "data"
    done = aiirwkv(data, "index", str(facts / "facts.txt"), "--collection", "c", "--json")
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout.splitlines()[-1], type=Indexed).chunks == 1
    done = aiirwkv(data, "ask", "When is the boiler serviced?", "--collection", "c", "--json")
    assert "May" in msgspec.json.decode(done.stdout.splitlines()[-1], type=Answer).answer


def test_mistakes_are_one_clear_line(up: Up, tmp_path: Path, facts: Path) -> None:
    assert up.cli("index", str(facts), "-c", "errors").returncode == 0
    (tmp_path / "empty.txt").touch()
    (tmp_path / "secret.bin").write_bytes(bytes(range(256)) * 40)
    for arguments, code, complaint in [
        (["search", "x", "-c", "no such"], 1, "no such"),
        (["ask", "x", "-c", "no such"], 1, "no such"),
        (["search", "x", "--top", "0"], 1, "top"),
        (["search", "x", "--top", "many"], 2, "integer"),
        (["index", str(tmp_path / "nowhere.txt"), "-c", "c"], 2, "does not exist"),
        (["index", str(tmp_path / "empty.txt"), "-c", "c"], 1, "empty"),
        (["index", str(tmp_path / "secret.bin"), "-c", "c"], 1, "secret.bin"),
        (["ask", "When are the roses cut?", "-c", "errors", "--model", "gpt"], 1, "gpt"),
        (["jobs", "get", "1"], 2, "No such command"),
        (["jobs", "cancel", "nonsense"], 1, "no job 'nonsense'"),
        (["call", "search", '{"queri": "x"}'], 1, "unknown field `queri`"),
        (["call", "embed", '{"texts": 1}'], 1, "Expected `array`, got `int`"),
        (["call", "evaluate", '{"collection": "c"}'], 1, "nobody serves aiirwkv.evaluate"),
        (["users", "claim", "nobody"], 1, "nobody"),
        (["frobnicate"], 2, "No such command"),
    ]:
        done = up.cli(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert complaint in done.stderr + done.stdout, (arguments, done.stderr)
        assert "Traceback" not in done.stderr + done.stdout, arguments


def test_an_oversized_request_is_refused_with_the_way_out(up: Up) -> None:
    body = json.dumps({"texts": ["x" * 2_000_000]})
    path = up.data / "body.json"
    path.write_text(body)
    done = up.cli("search", "x" * 120_000)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr


def test_a_second_user_sees_nothing_of_the_first_by_any_command(up: Up, facts: Path) -> None:
    for name in ("ada", "bob"):
        assert up.cli("users", "add", name).returncode == 0
    ada, bob = (up.cli("users", "claim", name).stdout.strip() for name in ("ada", "bob"))
    indexed = up.cli("index", str(facts / "facts.txt"), "-c", "private", "--claim", ada)
    assert indexed.returncode == 0, indexed.stderr
    assert "blue box" in up.cli("ask", "Where is the spare key?", "-c", "private", "--claim", ada).stdout
    for arguments in (
        ["search", "spare key", "-c", "private"],
        ["ask", "Where is the spare key?", "-c", "private"],
        ["collections", "documents", "private"],
        ["collections", "delete", "private", "--yes"],
        ["collections", "rename", "private", "mine"],
    ):
        done = up.cli(*arguments, "--claim", bob)
        assert done.returncode == 1 and "private" in done.stderr and "blue" not in done.stdout, arguments
    assert "private" not in up.cli("collections", "--claim", bob).stdout
    assert "blue box" not in up.cli("search", "spare key", "--claim", bob).stdout
    assert up.cli("users", "claim", "ada", "--claim", bob).returncode == 1
    forged = bob[:-6] + "AAAAAA"
    done = up.cli("collections", "--claim", forged)
    assert done.returncode == 1 and "sign in again" in done.stderr
    assert msgspec.convert(up.json("users", "me", "--claim", ada), UsersReply).users[0].name == "ada"


def test_a_job_that_failed_is_told_with_its_document(up: Up, facts: Path) -> None:
    done = up.cli("index", str(facts / "notes.md"), "-c", "x" * 300, "--json")
    assert done.returncode == 1
    [document] = msgspec.json.decode(done.stdout.splitlines()[-1], type=Indexed).documents
    assert (document.name, document.state) == ("notes.md", "failed") and "300 characters" in document.reason


def test_jobs_plugins_and_models_ask_with_a_claim(up: Up, facts: Path) -> None:
    for name in ("cleo", "dan"):
        assert up.cli("users", "add", name).returncode == 0
    cleo, dan = (up.cli("users", "claim", name).stdout.strip() for name in ("cleo", "dan"))
    assert up.cli("index", str(facts / "notes.md"), "-c", "garden", "--claim", cleo).returncode == 0
    [job] = up.json("jobs", "--claim", cleo)["jobs"]
    assert up.json("jobs", "--claim", dan)["jobs"] == []
    for arguments in (["jobs", "retry", job["id"], "--claim", dan], ["jobs", "--claim", dan, "retry", job["id"]]):
        done = up.cli(*arguments)
        assert done.returncode == 1 and "there is no job" in done.stderr, arguments
    done = up.cli("collections", "--claim", dan, "delete", "garden", "--yes")  # the group's claim holds below it
    assert done.returncode == 1 and "there is no collection" in done.stderr
    done = up.cli("jobs", "retry", job["id"], "--claim", cleo)
    assert done.returncode == 1 and "cannot be retried" in done.stderr
    for command in ("models", "jobs"):
        assert up.cli(command, "--claim", dan).returncode == 0
        forged = up.cli(command, "--claim", dan[:-6] + "AAAAAA")
        assert forged.returncode == 1 and "sign in again" in forged.stderr
    assert up.cli("plugins", "--claim", dan).returncode == 0


def test_indexing_without_a_service_it_needs_ends_at_once(tmp_path: Path, facts: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text('[workers]\nrag = ["convert_files", "accounts"]\n')
    env = os.environ | {"AIIRWKV_CONFIG": str(config)}
    began = time.monotonic()
    done = aiirwkv(tmp_path / "data", "index", str(facts / "notes.md"), "-c", "c", env=env)
    assert done.returncode == 1 and time.monotonic() - began < 30
    assert "nobody serves index and embed now" in done.stderr
    assert "aiirwkv worker index_chroma embed_minilm, or add it to [workers]" in done.stderr
