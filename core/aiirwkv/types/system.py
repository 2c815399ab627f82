"""Who calls, what runs durably, who serves what."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .base import Reply, Request


class User(msgspec.Struct, frozen=True):
    """Who calls. The role `owner` may do everything."""

    name: str
    roles: tuple[str, ...] = ()


class UsersReply(Reply):
    """`token` is a signed claim, valid until `expires` (seconds since 1970)."""

    users: list[User] = []
    token: str = ""
    expires: float = 0.0


class Users(Request[UsersReply]):
    """me; list; add and remove a user (`name`, `roles`); claim: a signed claim for `name`, valid for `seconds`."""

    action: Literal["me", "list", "add", "remove", "claim"] = "me"
    name: str = ""
    roles: list[str] = []
    seconds: float = 3600.0
    hook = "users"
    reply = UsersReply


JobState = Literal["queued", "running", "paused", "done", "failed", "cancelled"]


class Job(Reply):
    """
    A request delivered durably. `done` of `total` (0: unknown) with a `note`; `result` is the hook's reply.

    `attempt` counts deliveries, `stalled` those in a row that brought nothing beyond `reached`; `request`, `claim` and
    `generation` (how often it was put into the queue again; older messages are void) serve resume and retry.
    """

    id: str
    hook: str
    plugin: str = ""
    user: str = ""
    group: str = ""
    state: JobState = "queued"
    done: float = 0.0
    total: float = 0.0
    note: str = ""
    attempt: int = 0
    stalled: int = 0
    reached: float = 0.0
    generation: int = 0
    created: float = 0.0
    updated: float = 0.0
    result: Any = None
    error: str = ""
    code: int = 0
    request: Any = None
    claim: str = ""

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class JobsReply(Reply):
    jobs: list[Job]


class Jobs(Request[JobsReply]):
    """list (by `group`, `state`), get, cancel, pause, resume, retry; with `group` instead of `id`: all of a group."""

    action: Literal["list", "get", "cancel", "pause", "resume", "retry"] = "list"
    id: str = ""
    group: str = ""
    state: JobState | None = None
    limit: int = 1000
    hook = "jobs"
    reply = JobsReply


class Service(Reply):
    """
    One hook of one plugin in one worker, as discovery tells it.

    `rank`: place among the plugins that `[use]` names for the hook (0 first), -1 when it is not named.
    """

    hook: str
    plugin: str
    worker: str
    rank: int
    about: dict[str, Any] = {}
    version: str = ""
    distribution: str = ""
    process: str = ""
    pid: int = 0
