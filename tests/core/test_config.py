"""config.toml: defaults, overrides, secrets, and errors that name file, table and key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from aiirwkv import ConfigError, PluginError
from aiirwkv.config import Config, data_directory, load
from aiirwkv.plugins import check


def read(tmp_path: Path, text: str, **environ: str) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, environ)


def test_an_empty_file_and_the_shipped_one_are_the_defaults(tmp_path: Path) -> None:
    shipped = load(Path(__file__).parents[2] / "config.toml", {})
    shipped.plugins = {}
    shipped.use.convert = "convert_files"
    assert read(tmp_path, "") == Config() == shipped


def test_environment_and_secrets(tmp_path: Path) -> None:
    environ = {
        "AIIRWKV_BUS__URL": "nats://host:4222",
        "AIIRWKV_WEB__PORT": "9000",
        "AIIRWKV_PLUGINS__LLM_RWKV__MODEL": "big",
        "PASS": "secret",
    }
    config = read(tmp_path, '[bus]\npassword = { env = "PASS" }\n', **environ)
    assert config.bus.url == "nats://host:4222" and config.web.port == 9000 and config.bus.password == "secret"
    assert config.plugins["llm_rwkv"] == {"model": "big"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[web]\nprot = 1", r"\[web\] has no key 'prot'; did you mean 'port'"),
        ("[wbe]\nport = 1", "the top level has no key 'wbe'; did you mean 'web'"),
        ("[web]\nport = 'x'", r"\[web\] port: expected `int`, got `str`"),
        ("[use]\nembedd = 'x'", r"\[use\] has no key 'embedd'; did you mean 'embed'"),
        ("[web", "is not valid TOML"),
        ('[bus]\npassword = { env = "NOT_THERE" }', "reads the environment variable NOT_THERE, which is not set"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read(tmp_path, text)
    assert "config.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_plugin_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no plugin named 'llm_rwvk' is installed; did you mean 'llm_rwkv'"):
        check(read(tmp_path, '[workers]\nllm = ["llm_rwvk"]\n'))
    with pytest.raises(ConfigError, match=r"\[use\] embed: no plugin named 'embed_minim'.*did you mean 'embed_minilm'"):
        check(read(tmp_path, '[use]\nembed = "embed_minim"\n'))


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.toml"):
        load(tmp_path / "nowhere.toml", {})


def test_a_data_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/data cannot be written: .*choose another with --data"):
        data_directory(tmp_path / "file" / "data")


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give its rights up, which only root can")
def test_a_data_directory_without_permission(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    code = (
        "import os, sys, pathlib; from aiirwkv import ConfigError; from aiirwkv.config import data_directory\n"
        "os.setuid(65534)\n"
        "try: data_directory(pathlib.Path(sys.argv[1]))\n"
        "except ConfigError as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(closed / "data")], capture_output=True, text=True)
    assert "cannot be written: Permission denied; choose another with --data" in done.stdout, done.stderr
