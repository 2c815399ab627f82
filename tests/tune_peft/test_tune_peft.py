"""Tuning over the bus, with real learning on the built-in model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import anyio
import msgspec
import psutil
import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Conflict,
    Generate,
    Jobs,
    Message,
    Models,
    NotFound,
    Tune,
    Tuned,
)
from aiirwkv.testing import running
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_llm_rwkv.shelf.library import BUILT_IN
from aiirwkv_llm_rwkv.shelf.tuned import StateCard
from aiirwkv_tune_peft import TunePeft

from .facts import DATA, UNSEEN

NANO = BUILT_IN / "rwkv7-nano" / "model.safetensors"
STEPS, BATCH_TOKENS, SEED = 60, 256, 0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def trainers() -> list[psutil.Process]:
    """The training processes that this one has started."""
    found = []
    for child in psutil.Process().children():
        try:
            if "aiirwkv_tune_peft.child" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    """A data directory with the tuned state `facts`, made by the command line in one go."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "facts.jsonl").write_text(DATA, encoding="utf-8")

    async def tune() -> bytes:
        plugins = {"llm_rwkv": LlmRwkv(), "tune_peft": TunePeft()}
        async with running(plugins, folder) as bus:
            url, options = bus.nc.connected_url, bus.nc.options
            assert url is not None
            config = {
                "url": f"nats://{url.hostname}:{url.port}",
                "user": options["user"],
                "password": options["password"],
            }
            lines = [f"{key} = {value!r}" for key, value in config.items()]
            (folder / "config.toml").write_text("\n".join(["[bus]", *lines]), encoding="utf-8")
            command = [sys.executable, "-m", "aiirwkv", "--config", str(folder / "config.toml")]
            command += ["--data", str(folder), "tune", str(folder / "facts.jsonl"), "--name", "facts", "--json"]
            command += [f"--steps={STEPS}", f"--batch-tokens={BATCH_TOKENS}", f"--seed={SEED}"]
            done = await anyio.run_process(command, check=False)
            assert done.returncode == 0, done.stderr.decode()
            assert b"tune facts: done" in done.stderr
            return done.stdout

    before = sha256(NANO)
    output = anyio.run(tune)
    assert sha256(NANO) == before, "state tuning leaves the weights alone"
    return folder, msgspec.json.decode(output.splitlines()[-1], type=Tuned)


async def right(bus: Bus, state: str | None) -> int:
    """How many questions in words that were not learnt are answered rightly."""
    count = 0
    for words, fact in UNSEEN:
        reply = await bus.call(Generate(messages=[Message("user", words)], state=state))
        count += reply.text == fact
    return count


async def test_a_state_learns_facts_that_no_text_says(tuned: tuple[Path, Tuned]) -> None:
    folder, result = tuned
    path = folder / "models" / "states" / "facts"
    assert (result.name, result.method, result.model, result.steps) == ("facts", "state", "rwkv7-nano", STEPS)
    assert result.loss_after < 0.2 * result.loss_before and result.parameters == 4 * 3 * 64 * 64
    assert result.sha256 == sha256(path / "state.safetensors") and result.seconds > 0
    async with running({"llm_rwkv": LlmRwkv()}, folder) as bus:
        assert await right(bus, None) == 0
        assert await right(bus, "facts") >= 0.9 * len(UNSEEN)
        assert await right(bus, None) == 0, "a state is one request's, not the model's"
        nano, state = (await bus.call(Models())).models
        assert (state.name, state.kind, state.base, state.sha256) == ("facts", "state", "rwkv7-nano", result.sha256)
        assert state.card["base_sha256"] == nano.sha256 == sha256(NANO) and state.card["owner"] == "owner"
        assert state.card["data_sha256"] == sha256(folder / "facts.jsonl") and state.card["held_out"] == 6
    assert not list((folder / "runs").iterdir())


async def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_state(
    tmp_path: Path, tuned: tuple[Path, Tuned]
) -> None:
    async with running({"tune_peft": TunePeft(model="rwkv7-nano", checkpoint_seconds=0.3)}, tmp_path) as bus:
        job = await bus.submit(Tune("again", text=DATA, steps=STEPS, batch_tokens=BATCH_TOKENS, seed=SEED))
        with anyio.fail_after(60):
            while not (tmp_path / "runs" / job.id / "latest.ckpt").is_file():
                await anyio.sleep(0.01)
        [trainer] = trainers()
        assert trainer.nice() >= 10
        trainer.kill()
        notes = []
        async with bus.follow(job.id) as changes:
            async for job in changes:
                notes.append(job.note)
        assert any("killed by signal 9" in note and "from its last checkpoint" in note for note in notes)
        assert any("tokens/s" in note for note in notes) and (job.state, job.attempt, job.done) == ("done", 2, STEPS)
        assert msgspec.convert(job.result, Tuned).sha256 == tuned[1].sha256
        card = msgspec.json.decode(
            (tmp_path / "models" / "states" / "again" / "card.json").read_bytes(), type=StateCard
        )
        [step] = card.resumed
        assert 0 < step < STEPS and not list((tmp_path / "runs").iterdir())


async def test_cancelling_ends_the_process_at_once(tmp_path: Path) -> None:
    async with running({"tune_peft": TunePeft(model="rwkv7-nano")}, tmp_path) as bus:
        job = await bus.submit(Tune("never", text=DATA))
        with anyio.fail_after(20):
            while not any("loading" in state.note for state in (await bus.call(Jobs("get", job.id))).jobs):
                await anyio.sleep(0.05)
        assert len(trainers()) == 1
        await bus.call(Jobs("cancel", job.id))
        with anyio.fail_after(2):
            while trainers() or (await bus.call(Jobs("get", job.id))).jobs[0].state != "cancelled":
                await anyio.sleep(0.02)


async def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    async with running({"tune_peft": TunePeft(model="rwkv7-nano")}, tmp_path) as bus:
        request = Tune("wild", text=DATA, steps=20, batch_tokens=64, learning_rate=1e30)
        with pytest.raises(BadRequest, match=r"not a number any more at step .*smaller learning_rate than 1e\+30"):
            await bus.call(request, timeout=60)
        assert not (tmp_path / "models").exists() and not list((tmp_path / "runs").iterdir())


BROKEN = '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n\n{"prompt": "a", "respons\n["a"]'


async def test_what_cannot_be_tuned_is_refused(tmp_path: Path, tuned: tuple[Path, Tuned]) -> None:
    async with running({"tune_peft": TunePeft()}, tmp_path) as bus:

        async def complains(about: str, error: type[Exception], **fields: object) -> None:
            request = msgspec.convert({"name": "x", "text": DATA, "model": "rwkv7-nano"} | fields, Tune)
            with pytest.raises(error, match=about):
                await bus.call(request)

        await complains("only the method `state` is served yet, not 'lora'", BadRequest, method="lora")
        await complains("only the method `state` is served yet, not 'pissa'", BadRequest, method="pissa")
        await complains(r"no model 'rwkv7-nan' \(did you mean 'rwkv7-nano'\?\)", NotFound, model="rwkv7-nan")
        await complains("no model", NotFound, model=str(NANO))
        await complains("no object 'gone'", NotFound, object="gone", text="")
        await complains("either as `object` or as `text`", BadRequest, object="both")
        await complains("either as `object` or as `text`", BadRequest, text="")
        for name in ("../x", "", ".x", "a/b", "x" * 65, "a b"):
            await complains("`name` is", BadRequest, name=name)
        await complains("`steps` is 0", BadRequest, steps=0)
        await complains("`batch_tokens` is 1;", BadRequest, batch_tokens=1)
        await complains("`validation` is 0;", BadRequest, validation=0.0)
        await complains("`learning_rate` is -1;", BadRequest, learning_rate=-1.0)
        await complains("line 2: the response is empty; line 4: .*; line 5: Expected `object`", BadRequest, text=BROKEN)
        assert not list((tmp_path / "runs").iterdir()) and not trainers()
    async with running({"tune_peft": TunePeft()}, tuned[0]) as bus:
        with pytest.raises(Conflict, match="there is a tuned state 'facts' already; choose another name"):
            await bus.call(Tune("facts", text=DATA, model="rwkv7-nano"))


def test_the_worker_of_the_plugin_stays_light(tmp_path: Path) -> None:
    program = """
import asyncio, pathlib, sys
from aiirwkv_tune_peft import TunePeft
async def enter():
    async with TunePeft().attach(pathlib.Path(sys.argv[1])):
        assert not {"torch", "numpy", "safetensors", "rwkv", "pytorch_lightning"} & set(sys.modules)
asyncio.run(enter())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
