"""config.toml as a typed Config. Everything has a default; there is no global config object."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .errors import ConfigError

ENV = "AIIRWKV_"


class Use(msgspec.Struct, forbid_unknown_fields=True):
    """Which plugin serves which hook; a list is tried in its order. `none` switches a hook off."""

    generate: str | list[str] = "llm_rwkv"
    embed: str | list[str] = "embed_minilm"
    rerank: str | list[str] = "none"
    index: str | list[str] = "index_chroma"
    convert: str | list[str] = "convert_files"
    tune: str | list[str] = "tune_peft"
    chat: str | list[str] = "rag"
    users: str | list[str] = "accounts"

    def plugins(self, hook: str) -> list[str]:
        """The plugins for a hook, first choice first. Some hooks go with another one."""
        named = getattr(self, FOLLOWS.get(hook, hook), [])
        return [name for name in ([named] if isinstance(named, str) else named) if name != "none"]


FOLLOWS = {
    "search": "index",
    "collections": "index",
    "evaluate": "index",
    "models": "generate",
    "states": "generate",
    "conversations": "chat",
    "discover": "convert",
}
"""Hooks that are served by whoever serves another one."""


class BusConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Where the NATS server is; without a `url`, `aiirwkv up` starts one of its own on loopback."""

    url: str | None = None
    credentials: str | None = None
    """A .creds file."""
    user: str | None = None
    password: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    port: int = -1
    """The port of our own server; -1 takes a free one."""
    ack_wait: float = 30.0
    """Seconds without a sign of life after which a job is given to another worker."""


class Web(msgspec.Struct, forbid_unknown_fields=True):
    """The web page."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = 8080
    upload_limit: int = 1 << 30
    """Bytes one upload may have."""


def default_workers() -> dict[str, list[str]]:
    return {
        "llm": ["llm_rwkv"],
        "embed": ["embed_minilm"],
        "store": ["index_chroma"],  # Chroma holds the GIL while it works: it has a process of its own
        "rag": ["rag", "convert_files", "accounts"],
        "tune": ["tune_peft"],
    }


class Origin:
    """Where a configuration was said: a file, and the environment variables that overrode keys of it."""

    def __init__(self, file: str = "config.toml") -> None:
        self.file = file
        self._overrides: dict[tuple[str, ...], tuple[str, str | None]] = {}

    def note(self, path: Sequence[str], variable: str, text: str | None = None) -> None:
        """The key at `path` comes from an environment variable, which says `text`; without `text`: the table does."""
        self._overrides[tuple(path)] = variable, text

    def of(self, path: Sequence[str]) -> str:
        """What to blame for the key at `path`."""
        places = (tuple(path[:end]) for end in range(len(path), 0, -1))
        variable = next((self._overrides[place][0] for place in places if place in self._overrides), "")
        return f"the environment variable {variable}" if variable else self.file

    def text(self, path: Sequence[str]) -> str | None:
        """The text of the environment variable that set just this key."""
        return self._overrides.get(tuple(path), ("", None))[1]


class Settings(dict[str, Any]):
    """The table of one plugin, and where it was said."""

    def __init__(self, table: Mapping[str, Any], origin: Origin) -> None:
        super().__init__(table)
        self.origin = origin


class Config(msgspec.Struct, forbid_unknown_fields=True, dict=True):
    """What config.toml says; `origin` knows where."""

    use: Use = msgspec.field(default_factory=Use)
    workers: dict[str, list[str]] = msgspec.field(default_factory=default_workers)
    bus: BusConfig = msgspec.field(default_factory=BusConfig)
    web: Web = msgspec.field(default_factory=Web)
    plugins: dict[str, dict[str, Any]] = {}

    def __post_init__(self) -> None:
        self.origin = Origin()


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """
    Read config.toml: `path`, else AIIRWKV_CONFIG, else ./config.toml if there is one, else all defaults.

    AIIRWKV_BUS__URL and the like override single keys; {env = "NAME"} as a value reads a secret.
    """
    named = path or (Path(environ["AIIRWKV_CONFIG"]) if environ.get("AIIRWKV_CONFIG") else None)
    file = named or Path("config.toml")
    table: dict[str, Any] = {}
    if named or file.is_file():
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigError(f"cannot read {file}: {exc.strerror}; give another file with --config") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{file} is not valid TOML: {exc}") from None
    origin = Origin(str(file))
    for key, value in environ.items():
        if key.startswith(ENV) and "__" in key:
            _override(table, key, value, origin)
    return parse(_secrets(table, environ, str(file)), origin)


def parse(table: dict[str, Any], origin: Origin | None = None) -> Config:
    """A checked Config; an error names file (or environment variable), table and key, and what was probably meant."""
    origin = origin or Origin()
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as exc:
        raise ConfigError(explain(str(exc), origin, Config)) from None
    config.origin = origin
    for name, settings in config.plugins.items():
        config.plugins[name] = Settings(settings, origin)
    return config


def explain(message: str, origin: Origin, kind: Any, table: Sequence[str] = ()) -> str:
    """msgspec's message in the words of the file: `[web] port: expected int, got str`."""
    text, _, path = message.partition(" - at `$")
    keys = [key for key in re.split(r"[.\[\]`]+", path) if key and key != "..."]
    for key in keys:
        kind = next((field.type for field in _fields(kind) if field.name == key), None)
    if unknown := re.search(r"unknown field `(.*?)`", text):
        known = [field.name for field in _fields(kind)]
        close = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known) or 'nothing'}"
        place = [*table, *keys]
        where = f"[{'.'.join(place)}]" if place else "the top level"
        return f"{origin.of([*place, unknown[1]])}: {where} has no key {unknown[1]!r}; {hint}"
    file = origin.of([*table, *keys])
    if table:
        where = f"[{'.'.join(table)}] {'.'.join(keys)}"
    else:
        where = f"[{keys[0]}] {'.'.join(keys[1:])}" if len(keys) > 1 else "".join(keys)
    return f"{file}: {where.strip()}: {text[0].lower()}{text[1:]}"


def _fields(kind: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else ()


def _override(table: dict[str, Any], key: str, value: str, origin: Origin) -> None:
    *path, last = key.removeprefix(ENV).lower().split("__")
    kind: Any = Config
    for depth, part in enumerate(path, 1):
        if part not in table:
            origin.note(path[:depth], key)
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"the environment variable {key} names a key below {part!r}, which is no table")
        kind = next((field.type for field in _fields(kind) if field.name == part), None)
    origin.note([*path, last], key, value)
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        read = value
    wanted = next((field.type for field in _fields(kind) if field.name == last), Any)
    table[last] = fitting(read, value, wanted)


def fitting(value: Any, text: str, kind: Any) -> Any:
    """The value of an override, or its text as it stands where only that is of the wanted kind: 12345 as a password."""
    for candidate in (value, text):
        try:
            msgspec.convert(candidate, kind)
        except msgspec.ValidationError:
            continue
        return candidate
    return value


def _secrets(value: Any, environ: Mapping[str, str], where: str) -> Any:
    if isinstance(value, list):
        return [_secrets(item, environ, where) for item in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["env"] and isinstance(value["env"], str):
        if value["env"] not in environ:
            raise ConfigError(f"{where} reads the environment variable {value['env']}, which is not set")
        return environ[value["env"]]
    return {key: _secrets(item, environ, f"{where}: {key}" if ":" not in where else f"{where}.{key}")
            for key, item in value.items()}  # fmt: skip


def data_directory(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The data directory, made if need be: `path`, else AIIRWKV_DATA, else the platform's user-data folder."""
    named = str(path or environ.get("AIIRWKV_DATA", ""))
    if not named:
        from platformdirs import user_data_dir

        named = user_data_dir("aiirwkv", appauthor=False)
    data = Path(named).expanduser().absolute()
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = data / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise ConfigError(
            f"the data directory {data} cannot be written: {exc.strerror}; choose another with --data or AIIRWKV_DATA"
        ) from None
    return data
