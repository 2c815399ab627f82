"""What an import brings along, how fast it is, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "numpy", "chromadb", "nicegui", "transformers", "nats", "rich", "cryptography", "onnxruntime"]
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists())


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "module", ["aiirwkv", "aiirwkv.cli", *(f"aiirwkv_{name}" for name in PLUGINS), "aiirwkv_webui"]
)
def test_an_import_brings_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & set(HEAVY)


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_who_imports_whom() -> None:
    names = {f"aiirwkv_{name}" for name in PLUGINS}
    for path in (ROOT / "core").rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith("aiirwkv_")}, path
    for name in PLUGINS:
        allowed = {"aiirwkv_llm_rwkv"} if name == "tune_peft" else set()
        for path in (ROOT / "plugins" / name / f"aiirwkv_{name}").rglob("*.py"):
            foreign = imported(path) & (names - {f"aiirwkv_{name}"} - allowed | {"nats", "pluggy", "aiirwkv_webui"})
            assert not foreign, (path, foreign)
    for path in (ROOT / "knowledge").rglob("*.py"):
        assert not imported(path) & (names | {"nats", "pluggy", "chromadb", "torch", "aiirwkv_webui"}), path
    for path in (ROOT / "webui").rglob("*.py"):
        assert not imported(path) & (names | {"nats", "pluggy", "chromadb", "torch", "aiirwkv_knowledge"}), path
