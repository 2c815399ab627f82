"""The face has one source: colours, sizes and radii stand in tokens.css, and readable contrast is computed from it."""

from __future__ import annotations

import re
from pathlib import Path

import aiirwkv_webui
import pytest

STATIC = Path(aiirwkv_webui.__file__).parent / "static"
TOKENS = (STATIC / "tokens.css").read_text()
OTHERS = sorted(path for path in STATIC.glob("*.css") if path.name != "tokens.css")


@pytest.mark.parametrize("sheet", OTHERS, ids=lambda path: path.name)
def test_no_other_sheet_names_a_colour_a_size_or_a_radius(sheet: Path) -> None:
    text = sheet.read_text()
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b|\b(?:rgb|hsl)a?\(|\d+px", text)
    for value in re.findall(r"(?:border-radius|font-size|font|color|background): ([^;]+);", text):
        assert "var(--" in value or value in ("0", "none", "inherit", "transparent"), value


def test_every_token_that_is_used_exists() -> None:
    used = {name for sheet in OTHERS for name in re.findall(r"var\((--[\w-]+)", sheet.read_text())}
    assert used - set(re.findall(r"(--[\w-]+):", TOKENS)) == set()


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["paper", "sheet"])
@pytest.mark.parametrize("text", ["ink", "ink-2", "ink-3", "accent", "good", "warn", "bad"])
def test_text_can_be_read(text: str, ground: str, scheme: int) -> None:
    pairs = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", TOKENS))
    a, b = sorted((luminance(pairs[name].split(", ")[scheme]) for name in (text, ground)), reverse=True)
    assert (a + 0.05) / (b + 0.05) >= 4.5
