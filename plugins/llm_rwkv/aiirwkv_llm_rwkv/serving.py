"""The models that are loaded, and which of them answers when none is named; it can change while they serve."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from aiirwkv.errors import Conflict, NotFound, PluginError, ServiceError

from .engine.loop import Told
from .service import Service, Wishes
from .shelf.library import BUILT_IN, Files, find, known, unknown

__all__ = ["Serving"]

log = logging.getLogger(__name__)


class Choice(msgspec.Struct):
    """What was chosen while serving, for the next start. It holds as long as the configuration names the same model."""

    configured: str
    default: str
    loaded: list[str] = []


class Serving:
    """
    Loads, unloads and finds services. Its methods take seconds, so that they are called in threads of their own.

    Workers that share a data directory follow one another's choice: see `follow`.
    """

    def __init__(self, configured: str, wishes: Wishes, deliver: Callable[[list[Told]], None]) -> None:
        """`configured` is the name or path of the model to begin with, unless another one was chosen since."""
        self.configured, self.wishes, self.deliver = configured, wishes, deliver
        self.services: dict[str, Service] = {}
        self.default = ""
        self._kept: set[str] = set()
        self._leaving: list[threading.Thread] = []
        self._lock = threading.RLock()
        self._file = wishes.data / "models" / "choice.json"
        self._seen = 0.0

    @property
    def folders(self) -> list[Path]:
        return [BUILT_IN, self.wishes.data / "models"]

    def here(self) -> dict[str, Files]:
        """All the base models on this machine, by name."""
        return {**known(self.folders), **{name: service.files for name, service in self.services.items()}}

    def start(self) -> None:
        """Load what was chosen last, or else what the configuration says. Raises PluginError."""
        if choice := self._choice():
            try:
                self._apply(choice)
                return
            except (PluginError, ServiceError) as error:
                log.warning("%s, which was chosen before, cannot be served: %s", choice.default, error)
        self.default = self._load(find(self.configured, self.folders)).name

    def follow(self) -> None:
        """Do as another worker with the same data directory was told to."""
        with self._lock:
            if self._changed() and (choice := self._choice()):
                try:
                    self._apply(choice)
                except (PluginError, ServiceError) as error:
                    log.warning("what another worker serves cannot be served here: %s", error)

    def find(self, name: str | None) -> Service:
        """A loaded model; without a name, the default one. Raises NotFound."""
        name = name or self.default
        if name in self.services:
            return self.services[name]
        models = self.here()
        if name in models:
            raise NotFound(
                f"the model {name!r} is not loaded; this worker serves {', '.join(self.services)}: "
                f"aiirwkv models load {name}"
            )
        raise NotFound(unknown("model", name, models))

    def load(self, name: str) -> Service:
        """Beside those that are loaded."""
        with self._lock:
            service = self._named(name)
            self._kept.add(service.name)
            self._remember()
            return service

    def use(self, name: str) -> Service:
        """From now on the default; the one before finishes its work and leaves, unless it was loaded by itself."""
        with self._lock:
            service, before = self._named(name), self.default
            self.default = service.name
            if before != service.name and before not in self._kept:
                self._unload(before)
            self._remember()
            return service

    def unload(self, name: str) -> None:
        """It finishes its work first, but gets no more."""
        with self._lock:
            if name not in self.services:
                self.find(name)
            if name == self.default:
                raise Conflict(f"the model {name!r} answers by default; first use another one: aiirwkv models use NAME")
            self._unload(name)
            self._remember()

    def close(self) -> None:
        """End all of them, and what is not done with an error."""
        with self._lock:
            services, self.services = list(self.services.values()), {}
        for service in services:
            service.close()
        for thread in self._leaving:
            thread.join(timeout=5)

    def _named(self, name: str) -> Service:
        if name in self.services:
            return self.services[name]
        models = self.here()
        if name not in models:
            raise NotFound(unknown("model", name, models))
        return self._load(models[name])

    def _load(self, files: Files) -> Service:
        try:
            service = Service(files, self.wishes, self.deliver)
        except MemoryError as error:
            raise PluginError(f"the model {files.card.name} does not fit into memory: {error}") from None
        self.services = {**self.services, service.name: service}
        return service

    def _unload(self, name: str) -> None:
        self._kept.discard(name)
        service = self.services[name]
        self.services = {other: there for other, there in self.services.items() if other != name}
        thread = threading.Thread(target=service.close, args=(True,), name=f"unload-{name}", daemon=True)
        thread.start()
        self._leaving = [*(thread for thread in self._leaving if thread.is_alive()), thread]

    def _apply(self, choice: Choice) -> None:
        names = [choice.default, *choice.loaded]
        for name in names:
            self._named(name)
        self.default, self._kept = choice.default, set(choice.loaded)
        for name in [name for name in self.services if name not in names]:
            self._unload(name)

    def _remember(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(Choice(self.configured, self.default, sorted(self._kept))))
        new.replace(self._file)
        self._changed()

    def _changed(self) -> bool:
        try:
            seen = self._file.stat().st_mtime
        except OSError:
            return False
        changed, self._seen = seen != self._seen, seen
        return changed

    def _choice(self) -> Choice | None:
        self._changed()
        try:
            choice = msgspec.json.decode(self._file.read_bytes(), type=Choice)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("which models were loaded is not known any more: %s: %s", self._file, error)
            return None
        return choice if choice.configured == self.configured else None
