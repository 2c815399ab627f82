"""`aiirwkv plugin new NAME`: a working plugin in a folder of its own, with a test."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from .errors import ConfigError
from .plugins import installed, origin

MODULE = '''"""{title}: hashed bags of words as vectors. Replace this by what your plugin does."""

from zlib import crc32

from aiirwkv import Embed, Embeddings, Plugin, hookimpl


class {title}(Plugin):
    dim: int = 64

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        rows = [[0.0] * self.dim for _ in request.texts]
        for row, text in zip(rows, request.texts):
            for word in text.lower().split():
                row[crc32(word.encode()) % self.dim] += 1.0
        return Embeddings.pack(rows)
'''

PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "aiirwkv-{dashed}"
version = "0.1.0"
dependencies = ["aiirwkv>=0.1,<0.2"]

[project.entry-points.aiirwkv]
{name} = "aiirwkv_{name}:{title}"

[tool.hatch.build.targets.wheel]
only-include = ["aiirwkv_{name}.py"]
"""

TEST = '''"""The plugin, over a real bus."""

from pathlib import Path

import pytest
from aiirwkv import Embed
from aiirwkv.testing import running
from aiirwkv_{name} import {title}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # NATS clients need it


async def test_embed(tmp_path: Path) -> None:
    async with running({{"{name}": {title}(dim=8)}}, tmp_path) as bus:
        [row] = (await bus.call(Embed(["two words"]))).rows()
        assert len(row) == 8 and sum(row) == 2
'''


def write(name: str, folder: Path) -> list[Path]:
    """Write the plugin's three files below `folder`; refuses to overwrite."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} cannot be a plugin's name: use lower-case letters, digits and _, like my_embedder")
    if name in installed():
        taken = origin(installed()[name])
        raise ConfigError(f"a plugin named {name!r} is installed already ({taken}); choose another name")
    names = {"name": name, "dashed": name.replace("_", "-"), "title": name.title().replace("_", "")}
    root = folder / f"aiirwkv-{names['dashed']}"
    files = {
        root / "pyproject.toml": PROJECT,
        root / f"aiirwkv_{name}.py": MODULE,
        root / "tests" / f"test_{name}.py": TEST,
    }
    if root.exists():
        raise ConfigError(f"{root} exists already; choose another name, or remove it")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**names), encoding="utf-8")
    return list(files)
