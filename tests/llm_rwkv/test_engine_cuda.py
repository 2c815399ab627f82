"""What measures the engine on a GPU runs to its end without one, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "engine_cuda.py"


def test_a_rehearsal(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(report)]
    done = subprocess.run([*command, "--versions", "rwkv7", "rwkv6"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    text = report.read_text("utf-8")
    assert text == done.stdout and text.count("| a prompt of 64 | **") == 2
    assert text.count("The `rwkv` package, without its own kernels: 1 text ") == 2
