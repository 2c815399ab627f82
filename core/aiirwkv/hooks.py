"""The hooks a plugin may implement, the base class of plugins, and the context a hook is given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import msgspec
import pluggy

from .types import (
    Chat,
    ChatChunk,
    Chunk,
    Collections,
    CollectionsReply,
    Conversations,
    ConversationsReply,
    Convert,
    Converted,
    Discover,
    Discovered,
    Embed,
    Embeddings,
    Evaluate,
    Evaluation,
    Generate,
    Hits,
    Index,
    Indexed,
    Jobs,
    JobsReply,
    Models,
    ModelsReply,
    Rerank,
    Scores,
    Search,
    States,
    StatesReply,
    Tune,
    Tuned,
    User,
    Users,
    UsersReply,
)

if TYPE_CHECKING:
    from .bus import Bus

API = 1
"""The version of the hooks; raised when the meaning of one changes."""

hookspec = pluggy.HookspecMarker("aiirwkv")
hookimpl = pluggy.HookimplMarker("aiirwkv")

__all__ = ["API", "Context", "Delivery", "Hooks", "Plugin", "hookimpl", "hookspec"]


class Plugin(msgspec.Struct, dict=True, eq=False, kw_only=True, forbid_unknown_fields=True):
    """
    A plugin: its fields are its settings, its hooks are its services.

    `async with plugin` is its working life. Import and load what is heavy on entry, never at import.
    """

    api: ClassVar[int] = API
    concurrent_requests: ClassVar[int] = 64
    """Requests that may be active at once, per hook; more are refused with 429."""
    concurrent_jobs: ClassVar[int] = 1
    """Jobs that run at once, per hook."""

    def attach(self, data: Path, bus: Bus | None = None) -> Self:
        """Give the plugin its surroundings; the worker calls it before entry."""
        self._data = data
        self._bus = bus
        return self

    @property
    def data(self) -> Path:
        """The data directory; a plugin keeps what it stores in a folder of it."""
        return self._data

    @property
    def bus(self) -> Bus:
        """The bus, with the rights of its owner: for a plugin's own work, not on behalf of a caller (`ctx.bus`)."""
        if self._bus is None:
            raise RuntimeError("the plugin was attached without a bus")
        return self._bus

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    def about(self) -> dict[str, Any]:
        """What it is, for discovery: an embedder says model, revision, dimension, max_tokens, languages, outputs."""
        return {}

    def stats(self) -> dict[str, Any]:
        """What it is doing, for `$SRV.STATS`."""
        return {}


class Delivery(Protocol):
    """Which job runs, and the how many-th delivery this is."""

    id: str
    attempt: int


Action = Literal["read", "write", "own"]


class Owned(Protocol):
    """What `may` can judge: an owner, and shares by user name or role:NAME."""

    @property
    def owner(self) -> str: ...
    @property
    def shares(self) -> dict[str, Literal["read", "write"]]: ...


def may(user: User, action: Action, thing: Owned) -> bool:
    """Whether the user may read, write or own (share, delete) the thing. The role `owner` may do everything."""
    if "owner" in user.roles or thing.owner == user.name:
        return True
    if action == "own":
        return False
    grants = {thing.shares.get(name) for name in (user.name, *(f"role:{role}" for role in user.roles))}
    return "write" in grants or (action == "read" and "read" in grants)


class Context(Protocol):
    """What a hook may use besides its request."""

    bus: Bus
    """The bus on behalf of the caller: nested calls carry the caller's claim and what is left of the deadline."""
    user: User
    job: Delivery | None

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        ...

    def progress(self, done: float, total: float = 0, note: str = "") -> None:
        """Say how far a job is; free to call often."""
        ...

    def may(self, action: Action, thing: Owned) -> bool:
        """Whether the caller may read, write or own the thing."""
        ...


class Hooks(Protocol):
    """Every hook takes a request and a context; an implementation may leave out the context."""

    @hookspec
    async def embed(self, request: Embed, ctx: Context) -> Embeddings:
        """Turn texts into vectors."""
        ...

    @hookspec
    async def rerank(self, request: Rerank, ctx: Context) -> Scores:
        """Score texts against a query, higher is closer."""
        ...

    @hookspec
    def generate(self, request: Generate, ctx: Context) -> AsyncIterator[Chunk]:
        """Continue a prompt or a conversation, a few characters at a time."""
        ...

    @hookspec
    async def convert(self, request: Convert, ctx: Context) -> Converted:
        """Extract the text of a file, with its pages and headings."""
        ...

    @hookspec
    async def discover(self, request: Discover, ctx: Context) -> Discovered:
        """Find pages on the web, or fetch one."""
        ...

    @hookspec
    async def index(self, request: Index, ctx: Context) -> Indexed:
        """Read documents into a collection."""
        ...

    @hookspec
    async def search(self, request: Search, ctx: Context) -> Hits:
        """Find passages."""
        ...

    @hookspec
    async def collections(self, request: Collections, ctx: Context) -> CollectionsReply:
        """Manage collections, their documents and chunks."""
        ...

    @hookspec
    async def evaluate(self, request: Evaluate, ctx: Context) -> Evaluation:
        """Measure ways to search and answer on a question set."""
        ...

    @hookspec
    def chat(self, request: Chat, ctx: Context) -> AsyncIterator[ChatChunk]:
        """Answer a question from collections, with citations."""
        ...

    @hookspec
    async def conversations(self, request: Conversations, ctx: Context) -> ConversationsReply:
        """Manage stored conversations."""
        ...

    @hookspec
    async def tune(self, request: Tune, ctx: Context) -> Tuned:
        """Tune a state or an adapter."""
        ...

    @hookspec
    async def states(self, request: States, ctx: Context) -> StatesReply:
        """What a model remembers of texts it has read: read once, list, export, import, drop."""
        ...

    @hookspec
    async def models(self, request: Models, ctx: Context) -> ModelsReply:
        """Manage base models, states and adapters."""
        ...

    @hookspec
    async def users(self, request: Users, ctx: Context) -> UsersReply:
        """Manage users and mint claims."""
        ...

    @hookspec
    async def jobs(self, request: Jobs, ctx: Context) -> JobsReply:
        """See and steer jobs."""
        ...
