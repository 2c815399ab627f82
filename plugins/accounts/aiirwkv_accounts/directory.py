"""The table of users, in SQLite."""

from __future__ import annotations

import difflib
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from aiirwkv import BadRequest, Conflict, NotFound, User
from aiirwkv.identity import OWNER

_SCHEMA = """
CREATE TABLE IF NOT EXISTS users (
    name TEXT PRIMARY KEY,
    roles TEXT NOT NULL,
    created REAL NOT NULL,
    suspended INTEGER NOT NULL DEFAULT 0
) STRICT
"""


class Directory:
    """Who may have a claim. The owner is there from the start and stays."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(_SCHEMA)
        self._db.execute("INSERT OR IGNORE INTO users VALUES (?, ?, ?, 0)", self._row(OWNER))
        path.chmod(0o600)

    def close(self) -> None:
        self._db.close()

    def all(self) -> list[User]:
        rows = self._db.execute("SELECT name, roles FROM users WHERE NOT suspended ORDER BY created, name")
        return [self._user(*row) for row in rows]

    def get(self, name: str) -> User:
        """NotFound, with the nearest name, when there is no such user or it was removed."""
        row = self._db.execute("SELECT name, roles FROM users WHERE name = ? AND NOT suspended", (name,)).fetchone()
        if row is None:
            near = difflib.get_close_matches(name, [user.name for user in self.all()], 1)
            hint = f"did you mean {near[0]!r}?" if near else "the action list shows who there is"
            raise NotFound(f"there is no user {name!r}; {hint}")
        return self._user(*row)

    def add(self, name: str, roles: Sequence[str]) -> User:
        """Conflict when the name is taken. A user who was removed comes back, with these roles."""
        if not name.isprintable() or name != name.strip() or not 1 <= len(name) <= 64 or ":" in name:
            raise BadRequest(
                f"{name!r} cannot be a user's name: 1 to 64 printable characters, no blanks around them, and no colon, "
                "which marks roles, as in role:NAME"
            )
        user = User(name, tuple(dict.fromkeys(roles)))
        added = self._db.execute(
            "INSERT INTO users VALUES (?, ?, ?, 0) "
            "ON CONFLICT (name) DO UPDATE SET roles = excluded.roles, suspended = 0 WHERE suspended",
            self._row(user),
        )
        if not added.rowcount:
            raise Conflict(f"the user {name!r} exists already; remove it first to give it other roles")
        return user

    def remove(self, name: str) -> User:
        """
        Suspend a user. What belongs to the name stays, and only the owner of the system can bring the name back.
        """
        user = self.get(name)
        if name == OWNER.name:
            raise Conflict("the user 'owner' holds the bus's credentials and cannot be removed")
        self._db.execute("UPDATE users SET suspended = 1 WHERE name = ?", (name,))
        return user

    @staticmethod
    def _row(user: User) -> tuple[str, str, float]:
        return user.name, json.dumps(user.roles), time.time()

    @staticmethod
    def _user(name: str, roles: str) -> User:
        return User(name, tuple(json.loads(roles)))
