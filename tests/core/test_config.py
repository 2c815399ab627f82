"""config.toml: defaults, overrides, secrets, and errors that name file, table and key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from aiirwkv import ConfigError, PluginError
from aiirwkv.config import Config, data_directory, load
from aiirwkv.plugins import check
from aiirwkv.plugins import load as load_plugin


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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[workers]\nllm = ["llm_rwvk"]', r"\[workers\] llm: no plugin named 'llm_rwvk' .*; did you mean 'llm_rwkv'"),
        ('[use]\nembed = "embed_minim"', r"\[use\] embed: no plugin named 'embed_minim' .*; did you mean"),
        ('[plugins.llm_rwvk]\nmodel = "x"', r"\[plugins.llm_rwvk\]: no plugin named 'llm_rwvk' .*; did you mean"),
    ],
)
def test_a_plugin_that_does_not_exist_is_named_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}: {complaint}"):
        check(load(file, {}))
    done = subprocess.run(
        [sys.executable, "-m", "aiirwkv", "--config", str(file), "--data", str(tmp_path / "data"), "up"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and f"{file}: " in done.stderr + done.stdout


def test_a_plugins_settings_blame_their_file_or_variable(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[plugins.llm_rwkv]\nmodell = 'x'\n")
    with pytest.raises(PluginError, match=rf"^{file}: \[plugins.llm_rwkv\] has no key 'modell'"):
        load_plugin("llm_rwkv", load(file, {}).plugins["llm_rwkv"])
    config = load(file, {"AIIRWKV_PLUGINS__RAG__WEAK": "very", "AIIRWKV_PLUGINS__EMBED_BGE__MODEL": "7"})
    with pytest.raises(PluginError, match=r"^the environment variable AIIRWKV_PLUGINS__RAG__WEAK: .*\] weak: expected"):
        load_plugin("rag", config.plugins["rag"])
    assert getattr(load_plugin("embed_bge", config.plugins["embed_bge"]), "model") == "7"  # noqa: B009


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("AIIRWKV_WEB__PORT", "abc", r"\[web\] port: expected `int`, got `str`"),
        ("AIIRWKV_FOO__BAR", "1", "the top level has no key 'foo'"),
        ("AIIRWKV_WEB__PROT", "1", r"\[web\] has no key 'prot'; did you mean 'port'"),
        ("AIIRWKV_USE__EMBED", "embed_minim", r"\[use\] embed: no plugin named 'embed_minim'"),
    ],
)
def test_a_wrong_variable_is_blamed_not_the_file(tmp_path: Path, variable: str, value: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^the environment variable {variable}: {complaint}"):
        check(read(tmp_path, "[web]\nhost = '::1'\n", **{variable: value}))


@pytest.mark.parametrize("password", ["12345", "true", "1979-05-27", "{ a = 1 }", "[1]", "'it", '"12345"'])
def test_a_text_takes_a_variable_as_it_stands(tmp_path: Path, password: str) -> None:
    assert read(tmp_path, "", AIIRWKV_BUS__PASSWORD=password).bus.password == password.strip('"')


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
