"""The plugin author's path: a plugin from the template, a broken one, and one in a fresh environment over the bus."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from aiirwkv import ConfigError, Embed, PluginError
from aiirwkv.config import BusConfig
from aiirwkv.plugins import Registry, hooks, load, load_class
from aiirwkv.scaffold import write
from aiirwkv.testing import Fake, running

ROOT = Path(__file__).parents[2]


def site(folder: Path, *dists: tuple[str, str, str]) -> dict[str, str]:
    """An environment that finds distributions made of (name, module source, entry point) in `folder`."""
    for name, source, entry in dists:
        info = folder / f"aiirwkv_{name}-9.9.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: aiirwkv-{name}\nVersion: 9.9\n")
        (info / "entry_points.txt").write_text(f"[aiirwkv]\n{name} = {entry}\n")
        (folder / f"aiirwkv_{name}.py").write_text(source)
    return dict(os.environ) | {"PYTHONPATH": str(folder)}


def cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "aiirwkv", *arguments], capture_output=True, text=True, env=env)


def test_wrong_names_and_settings_are_explained() -> None:
    with pytest.raises(PluginError, match="no plugin named 'raag' is installed; did you mean 'rag'"):
        load("raag", {})
    with pytest.raises(PluginError, match=r"\[plugins.llm_rwkv\] has no key 'modell'; did you mean 'model'"):
        load("llm_rwkv", {"modell": "x"})
    with pytest.raises(PluginError, match=r"\[plugins.llm_rwkv\] model: expected `str`, got `int`"):
        load("llm_rwkv", {"model": 1})
    assert hooks(load_class("llm_rwkv")) == ["generate", "models", "states"]


def test_a_hook_that_does_not_exist_is_refused() -> None:
    from aiirwkv import Plugin, hookimpl

    class Typo(Plugin):
        @hookimpl
        async def embeed(self, request: Embed) -> None: ...

    with pytest.raises(PluginError, match="embeed"):
        Registry().add("typo", Typo())


def test_a_broken_plugin_is_shown_as_broken_and_harms_nothing_else(tmp_path: Path) -> None:
    env = site(
        tmp_path / "site",
        ("broken", "import a_package_that_is_not_there\n", "aiirwkv_broken:Broken"),
        ("old", "from aiirwkv import Plugin\nclass Old(Plugin):\n    api = 0\n", "aiirwkv_old:Old"),
    )
    done = cli("--data", str(tmp_path / "data"), "plugins", env=env)
    assert done.returncode == 0
    cause = "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"
    assert f"broken: (aiirwkv-broken 9.9) cannot be imported: {cause}" in done.stdout
    assert "version 0 of the hooks, this is 1" in done.stdout
    assert "llm_rwkv" in done.stdout and "generate, models" in done.stdout


def test_a_worker_whose_plugin_is_broken_says_why_in_one_line(tmp_path: Path) -> None:
    done = cli("--data", str(tmp_path), "worker", "embed_minilm", "--bus", "nats://127.0.0.1:1")
    assert done.returncode == 1 and "cannot reach the bus at nats://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_template_refuses_bad_names(tmp_path: Path) -> None:
    for name in ("My-Plugin", "1st", "class", "../x"):
        with pytest.raises(ConfigError, match="cannot be a plugin's name"):
            write(name, tmp_path)
    with pytest.raises(ConfigError, match=r"'rag' is installed already \(aiirwkv-rag .*\); choose another name"):
        write("rag", tmp_path)
    write("twice", tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        write("twice", tmp_path)


def test_the_templates_test_runs_on_asyncio_whoever_provides_the_backend(tmp_path: Path) -> None:
    """Without our pytest plugin, anyio's own fixture would ask for each backend, for trio too where it is installed."""
    write("alone", tmp_path)
    project = tmp_path / "aiirwkv-alone"
    env = dict(os.environ) | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:aiirwkv", "-p", "no:cacheprovider", "--rootdir"]
    done = subprocess.run([*command, str(project), str(project)], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "::test_embed PASSED" in done.stdout, done.stdout + done.stderr


def test_a_worker_without_plugins_is_wrong_usage(tmp_path: Path) -> None:
    done = cli("--data", str(tmp_path), "worker")
    assert done.returncode == 2 and "Usage: " in done.stderr and "name the plugins to serve" in done.stderr


@pytest.mark.timeout(300)
async def test_a_plugin_from_the_template_in_a_fresh_environment(tmp_path: Path) -> None:
    """`plugin new`, pip install into a new venv beside the core, its own test, and a call over our bus."""
    assert cli("plugin", "new", "my_hash", "--folder", str(tmp_path)).returncode == 0
    project = tmp_path / "aiirwkv-my-hash"
    source = (project / "aiirwkv_my_hash.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 17
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    # Beside the system: its packages are seen, the new one is installed only here.
    library = next((venv / "lib").glob("python*")) / "site-packages"
    (library / "system.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, str(project)], check=True, env=dict(os.environ) | {"PIP_ROOT_USER_ACTION": "ignore"})
    tested = subprocess.run([python, "-m", "pytest", "-q", "--rootdir", str(project), "-p", "no:cacheprovider",
                             str(project)], capture_output=True, text=True)  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr
    async with running({"fake": Fake()}, tmp_path / "data") as bus:
        server = bus.nc.connected_url
        password = (tmp_path / "data" / "nats" / "password").read_text()
        config = BusConfig(url=f"nats://{server.hostname}:{server.port}", user="aiirwkv", password=password)
        env = dict(os.environ) | {
            "AIIRWKV_BUS__URL": config.url or "",
            "AIIRWKV_BUS__USER": "aiirwkv",
            "AIIRWKV_BUS__PASSWORD": f'"{password}"',
        }
        worker = subprocess.Popen(
            [python, "-m", "aiirwkv", "--data", str(tmp_path / "w"), "worker", "my_hash"], env=env
        )
        try:
            assert await bus.about("embed", "my_hash") == {}
            [row] = (await bus.call(Embed(["a b"]), to="my_hash")).rows()
            assert len(row) == 64 and sum(row) == 2
            listed = [s for s in await bus.services("embed") if s.plugin == "my_hash"]
            assert listed[0].distribution == "aiirwkv-my-hash 0.1.0"
        finally:
            worker.terminate()
            assert worker.wait(20) == 0
