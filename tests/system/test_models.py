"""Models added, pulled, loaded, used and deleted while the system serves, by the commands a person uses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv import ModelsReply
from safetensors.torch import save_file

from bench.random_checkpoint import tensors
from tests.conftest import Up, command, launch
from tests.llm_rwkv.conftest import NANO
from tests.llm_rwkv.site import Site, serving

PROMPT = {"prompt": "User: The key is in the blue box.\nQuestion: Where is the key?\n\nAssistant:", "max_tokens": 12}
FILE = "rwkv7-g1a-0.1b-20250728-ctx4096.pth"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Up]:
    """A system of our own, since other tests ask the model that is used here."""
    folder = tmp_path_factory.mktemp("models")
    environment = {**os.environ, "HF_ENDPOINT": site.url, "HF_TOKEN": "hf_secret"}
    started = launch(folder / "data", folder / "up.log", "--no-web", env=environment)
    try:
        yield started
    finally:
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(60) == 0


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An RWKV-7 with the World vocabulary, as its authors publish them."""
    path = tmp_path_factory.mktemp("published") / FILE
    torch.save(tensors("rwkv7", 1, 64, vocabulary=65536, dtype=torch.bfloat16), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, up: Up) -> str:
    """The built-in model once more, under another name."""
    folder = tmp_path_factory.mktemp("own") / "twin"
    shutil.copytree(NANO, folder)
    done = up.cli("models", "add", str(folder))
    assert done.returncode == 0, done.stderr
    assert "twin is here, a base model of 2.4 M parameters\nuse it: aiirwkv models use twin" in done.stderr
    return "twin"


def listed(up: Up, *arguments: str) -> dict[str, Any]:
    reply = msgspec.convert(up.json("models", "list", *arguments), ModelsReply)
    return {model.name: model for model in reply.models}


def generated(up: Up, **fields: Any) -> Any:
    done = up.cli("call", "generate", json.dumps(PROMPT | {"stream": False, "logprobs": True} | fields))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def written(up: Up, **fields: Any) -> str:
    return str(generated(up, **fields)["text"])


def first(up: Up, **fields: Any) -> float:
    """The logarithm of the first token's probability."""
    return float(generated(up, **fields)["logprobs"][0])


def test_a_model_is_pulled_from_a_hub_though_the_transfer_breaks(up: Up, site: Site, pth: bytes) -> None:
    path = f"/BlinkDL/rwkv7-g1/resolve/main/{FILE}"
    site.put(path, pth, cuts=[2_000_000, 9_000_000])
    reply = up.json("models", "pull", "BlinkDL/rwkv7-g1", FILE, "--name", "g1")
    [model] = msgspec.convert(reply, ModelsReply).models
    assert (model.name, model.kind, model.version, model.base) == ("g1", "base", "rwkv7", "")
    assert model.card["origin"] == site.url + path and model.sha256 == model.card["sha256"]["model.safetensors"]
    asked = [asked for asked in site.asked if asked.path == path]
    assert len(asked) == 3 and sum(one.sent for one in asked) == len(pth)
    assert {one.headers["authorization"] for one in asked} == {"Bearer hf_secret"}
    assert not listed(up)["g1"].loaded and "models pull g1" in up.cli("jobs").stdout
    assert "g1" in up.cli("models").stdout
    assert {entry.name for entry in (up.data / "models" / "g1").iterdir()} == {"card.json", "model.safetensors"}
    assert up.cli("models", "load", "g1").returncode == 0 and listed(up)["g1"].loaded
    assert written(up, model="g1", temperature=0) != written(up)
    assert up.cli("models", "unload", "g1").returncode == 0
    assert up.cli("models", "delete", "g1", "--yes").returncode == 0 and "g1" not in listed(up)


def test_another_model_answers_while_the_system_serves(up: Up, twin: str) -> None:
    before = written(up)
    assert not listed(up)[twin].loaded
    done = up.cli("call", "generate", json.dumps(PROMPT | {"model": twin}), "--stream")
    assert done.returncode == 0 or "not loaded" in done.stderr
    running = subprocess.Popen(
        command(
            up.data, "call", "generate", json.dumps(PROMPT | {"max_tokens": 200, "stop": [], "seed": 1}), "--stream"
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert up.cli("models", "use", twin).returncode == 0
    assert listed(up)[twin].default and not listed(up)["rwkv7-nano"].default
    assert written(up) == before
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and json.loads(output.splitlines()[-1])["finish"]
    assert up.cli("models", "use", "rwkv7-nano").returncode == 0
    assert up.cli("models", "load", twin).returncode == 0
    done = up.cli("models", "delete", twin, "--yes")
    assert done.returncode == 1 and "'twin' is loaded; first: aiirwkv models unload twin" in done.stderr
    assert up.cli("models", "unload", twin).returncode == 0
    assert not listed(up)[twin].loaded and written(up) == before


def test_a_state_and_an_adapter_of_ones_own(up: Up, tmp_path: Path) -> None:
    plain = first(up)
    states = {f"blocks.{i}.att.time_state": torch.randn(3, 64, 64) for i in range(4)}
    save_file(states, tmp_path / "poet.safetensors")
    done = up.cli("models", "add", str(tmp_path / "poet.safetensors"), "--base", "rwkv7-nano")
    assert "poet is here, for rwkv7-nano, as state of 49 K parameters" in done.stderr
    assert abs(first(up, state="poet") - plain) > 1e-3

    folder = tmp_path / "pirate"
    folder.mkdir()
    save_file(
        {"blocks.1.att.key.lora_A": torch.randn(4, 192), "blocks.1.att.key.lora_B": torch.randn(192, 4)},
        folder / "adapter.safetensors",
    )
    (folder / "card.json").write_text('{"base": "rwkv7-nano", "alpha": 64}')
    [model] = msgspec.convert(up.json("models", "add", str(folder)), ModelsReply).models
    assert (model.name, model.kind, model.base) == ("pirate", "adapter", "rwkv7-nano")
    assert abs(first(up, adapter="pirate") - plain) > 1e-3
    assert {"poet", "pirate"} <= listed(up).keys()
    for name in ("poet", "pirate"):
        assert up.cli("models", "delete", name, "--yes").returncode == 0
    assert first(up) == pytest.approx(plain, abs=1e-4)


def test_mistakes_are_one_clear_line(up: Up, site: Site, twin: str, tmp_path: Path) -> None:
    site.put("/secret.pth", status=401)
    site.put("/page.pth", b"<html>", headers={"Content-Type": "text/html"})
    site.put("/bad.safetensors", b"not a model")
    (tmp_path / "cut.safetensors").write_bytes((NANO / "model.safetensors").read_bytes()[:-9])
    before = listed(up).keys()
    for arguments, complaint in [
        (["add", str(tmp_path / "gone.pth")], "there is no"),
        (["add", str(tmp_path / "cut.safetensors")], "only a part of one"),
        (["add", str(NANO), "--name", "../x"], "`name` is '../x'"),
        (["add", str(NANO), "--name", twin], "there is a 'twin' already"),
        (["pull", f"{site.url}/none.pth"], "404"),
        (["pull", f"{site.url}/secret.pth"], "set HF_TOKEN"),
        (["pull", f"{site.url}/page.pth"], "is a web page"),
        (["pull", f"{site.url}/bad.safetensors"], "not a safetensors file"),
        (["pull", "file:///etc/passwd"], "neither http:// nor https://"),
        (["pull", "o/n"], "must name a file"),
        (["pull", "o/n", "a.gguf"], "neither a .safetensors nor a .pth"),
        (["load", "gpt"], "no model 'gpt'"),
        (["use", "gpt"], "no model 'gpt'"),
        (["unload", twin], "not loaded"),
        (["unload", "rwkv7-nano"], "rwkv7-nano"),
        (["delete", "gpt", "--yes"], "'gpt'"),
        (["delete", "../../up.json", "--yes"], "up.json"),
        (["delete", "rwkv7-nano", "--yes"], "rwkv7-nano"),
    ]:
        done = up.cli("models", *arguments)
        assert done.returncode == 1, (arguments, done.stderr)
        assert complaint in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr + done.stdout, arguments
    assert listed(up).keys() == before and not [path for path in (up.data / "models").glob(".*")]


def test_only_the_owner_changes_models(up: Up, site: Site, twin: str) -> None:
    assert up.cli("users", "add", "ada").returncode == 0
    ada = up.cli("users", "claim", "ada").stdout.strip()
    assert {"rwkv7-nano", twin} <= listed(up, "--claim", ada).keys()
    asked = len(site.asked)
    for arguments in (
        ["add", "/etc/passwd"],
        ["pull", f"{site.url}/a.pth"],
        ["load", twin],
        ["use", twin],
        ["unload", "rwkv7-nano"],
        ["delete", twin, "--yes"],
    ):
        done = up.cli("models", *arguments, "--claim", ada)
        assert done.returncode == 1 and "owner" in done.stderr, (arguments, done.stderr)
    assert len(site.asked) == asked


def test_a_pull_is_cancelled_and_goes_on_later(up: Up, site: Site, pth: bytes) -> None:
    there = site.put("/slow.pth", pth, pause=0.005)
    pulling = subprocess.Popen(
        command(up.data, "models", "pull", there), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    part = up.data / "models" / ".slow" / "slow.pth.part"
    end = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 100_000):
        assert time.monotonic() < end
        time.sleep(0.05)
    [job] = [job for job in up.json("jobs")["jobs"] if job["state"] == "running"]
    assert up.cli("jobs", "cancel", job["id"]).returncode == 0
    assert pulling.wait(10) == 1
    assert "models pull slow.pth: cancelled" in (pulling.stderr.read() if pulling.stderr else "")
    come = part.stat().st_size
    site.put("/slow.pth", pth)
    done = up.cli("models", "pull", there)
    assert done.returncode == 0, done.stderr
    assert site.asked[-1].headers["range"] == f"bytes={come}-"
    assert up.cli("models", "delete", "slow", "--yes").returncode == 0
