"""Find plugins by entry point, import and configure them, and choose the one to serve a hook."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec
import pluggy

from .config import Config, Origin, Settings, explain, fitting
from .errors import ConfigError, PluginError
from .hooks import API, Hooks, Plugin
from .types import REQUESTS

GROUP = "aiirwkv"


def origin(ep: EntryPoint) -> str:
    """The distribution that brings a plugin, and its version."""
    return f"{ep.dist.name} {ep.dist.version}" if ep.dist else "unknown distribution"


def origin_of(plugin: Plugin) -> str:
    """The distribution that brought a loaded plugin."""
    name = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
    return next((origin(ep) for ep in installed().values() if ep.value == name), type(plugin).__module__)


@cache
def installed() -> dict[str, EntryPoint]:
    """Installed plugins by name. Nothing is imported."""
    return {ep.name: ep for ep in entry_points(group=GROUP)}


def find(name: str) -> EntryPoint:
    """The entry point of a plugin, or a PluginError that says what was probably meant."""
    found = installed()
    if name not in found:
        close = difflib.get_close_matches(name, found)
        hint = f"did you mean {close[0]!r}?" if close else f"installed: {', '.join(sorted(found)) or 'none'}"
        raise PluginError(f"no plugin named {name!r} is installed; {hint}")
    return found[name]


def load_class(name: str) -> type[Plugin]:
    """Import one plugin's class."""
    ep = find(name)
    try:
        cls = ep.load()
    except Exception as exc:
        raise PluginError(f"plugin {name!r} ({origin(ep)}) cannot be imported: {type(exc).__name__}: {exc}") from exc
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise PluginError(f"plugin {name!r} ({origin(ep)}): {ep.value} is not a subclass of aiirwkv.Plugin")
    if cls.api != API:
        raise PluginError(
            f"plugin {name!r} ({origin(ep)}) was written for version {cls.api} of the hooks, this is {API}; "
            f"install a version of it that fits"
        )
    return cls


def load(name: str, settings: Mapping[str, Any]) -> Plugin:
    """Import one plugin and give it its settings."""
    cls = load_class(name)
    origin, place = settings.origin if isinstance(settings, Settings) else Origin(), ("plugins", name)
    given = dict(settings)
    for field in msgspec.structs.fields(cls):
        if (text := origin.text((*place, field.name))) is not None:
            given[field.name] = fitting(given[field.name], text, field.type)
    try:
        return msgspec.convert(given, cls)
    except msgspec.ValidationError as exc:
        raise PluginError(explain(str(exc), origin, cls, place)) from None


def hooks(cls: type[Plugin]) -> list[str]:
    """The hooks that a plugin's class implements."""
    return [hook for hook in REQUESTS if hasattr(getattr(cls, hook, None), f"{GROUP}_impl")]


def settings(cls: type[Plugin]) -> dict[str, Any]:
    """A plugin's settings with their defaults."""
    return {field.name: field.default if field.default is not msgspec.NODEFAULT else
            field.default_factory() if field.default_factory is not msgspec.NODEFAULT else None
            for field in msgspec.structs.fields(cls)}  # fmt: skip


def check(config: Config) -> None:
    """Refuse a configuration that names plugins nobody installed, or settings for none."""
    served = {plugin for names in config.workers.values() for plugin in names}
    for process, names in config.workers.items():
        for name in names:
            _known(name, config, "workers", process)
    for name in config.plugins:
        _known(name, config, "plugins", name)
    for hook in config.use.__struct_fields__:
        for name in config.use.plugins(hook):
            if name in served or getattr(config.use, hook) != getattr(type(config.use)(), hook):
                _known(name, config, "use", hook)


def _known(name: str, config: Config, table: str, key: str) -> None:
    try:
        find(name)
    except PluginError as exc:
        where = f"[{table}.{key}]" if table == "plugins" else f"[{table}] {key}"
        raise ConfigError(f"{config.origin.of((table, key))}: {where}: {exc}") from None


class Registry:
    """Loaded plugins, by hook and name."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(Hooks)
        self.plugins: dict[str, Plugin] = {}

    def add(self, name: str, plugin: Plugin) -> None:
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as exc:
            self._manager.unregister(plugin)
            raise PluginError(f"plugin {name!r}: {exc}") from exc
        self.plugins[name] = plugin

    def remove(self, name: str) -> None:
        self._manager.unregister(self.plugins.pop(name))

    def providers(self, hook: str) -> list[str]:
        impls = getattr(self._manager.hook, hook).get_hookimpls()
        return [impl.plugin_name for impl in impls if not impl.wrapper]

    def hooks(self, name: str) -> list[str]:
        callers = self._manager.get_hookcallers(self.plugins[name]) or []
        return sorted(caller.name for caller in callers)

    def call(self, hook: str, name: str, **arguments: Any) -> Any:
        """Call one plugin's implementation, through any wrappers; returns its awaitable or async iterator."""
        others = [self.plugins[other] for other in self.providers(hook) if other != name]
        [result] = self._manager.subset_hook_caller(hook, others)(**arguments)
        return result
