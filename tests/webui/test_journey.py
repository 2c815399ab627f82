"""One person, one browser, the real system: a file becomes an answer with a source that opens at the cited words."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiirwkv_webui.sanitise import lit, markdown
from playwright.async_api import Page, Request, async_playwright, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt install chromium")

FACTS = """\
Harbour Street Library

The library opens at nine and closes at half past six. The director of the library is Clara Novak.

A library card costs 12 euros a year. The reading room is on the second floor.
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A whole system, started the way everybody starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = tmp_path_factory.mktemp("data")
    environment = os.environ | {"AIIRWKV_WEB__PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "aiirwkv", "--data", str(data), "up"]
    with (data / "out").open("wb") as out:
        up = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=data)
        try:
            give_up = time.monotonic() + 60
            while not (data / "up.json").exists():
                assert up.poll() is None and time.monotonic() < give_up, (data / "out").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(30)


@pytest.fixture
async def page(address: str) -> AsyncIterator[Page]:
    """A browser tab that may not say anything on its console nor ask any other host."""
    complaints: list[str] = []

    def check(request: Request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            complaints.append(f"request to {request.url}")

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        page.set_default_timeout(20_000)
        page.on("request", check)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        await page.goto(address)
        yield page
        await browser.close()
    assert not complaints


async def drop(page: Page, name: str, text: str) -> None:
    """Drop a file anywhere on the page."""
    files = await page.evaluate_handle(
        "([name, text]) => { const d = new DataTransfer();"
        " d.items.add(new File([text], name, {type: 'text/plain'})); return d; }",
        [name, text],
    )
    for event in ("dragenter", "dragover", "drop"):
        await page.dispatch_event(".room", event, {"dataTransfer": files})


async def test_from_a_file_to_the_lit_words(page: Page) -> None:
    await page.get_by_role("button", name="New collection").click()
    await page.get_by_label("Name of the new collection").fill("Town")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Town")).to_be_visible()

    await drop(page, "library.txt", FACTS)
    documents = page.get_by_label("Documents of the collection")
    await expect(documents.get_by_text("library.txt")).to_be_visible(timeout=30_000)
    await expect(documents.get_by_text("ready · 1 chunk")).to_be_visible()

    await page.get_by_label("Your question").fill("How much does a library card cost?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Source 1")).to_be_visible(timeout=30_000)
    await expect(page.locator(".answer")).to_contain_text("12 euros")

    await page.get_by_role("button", name="Source 1").click()
    await expect(page.locator("#source mark")).to_contain_text("A library card costs 12 euros a year.")
    await expect(page.locator("#source mark")).to_be_in_viewport()
    await expect(page.locator("#source")).to_contain_text("The reading room is on the second floor.")

    await page.get_by_text("How this was answered").click()
    await expect(page.get_by_role("heading", name="1 passage kept")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator("#source")).to_be_hidden()

    await page.reload()
    await expect(page.locator(".answer")).to_contain_text("12 euros")


async def test_on_a_phone_a_taken_name_is_refused_in_its_place(page: Page) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    await page.get_by_role("button", name="Documents").click()
    await expect(page.get_by_role("button", name="Add files")).to_be_visible()
    await page.get_by_role("button", name="New collection").click()
    await page.get_by_label("Name of the new collection").fill("Town")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("Town")  # it exists, and the page says so
    width = await page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390


async def test_what_the_name_of_a_file_says_is_not_obeyed(page: Page) -> None:
    name = "<img src=x onerror=document.title='pwned'>.txt"
    await drop(page, name, "<script>document.title='pwned'</script> The password is <b>maple77</b>.\n")
    documents = page.get_by_label("Documents of the collection")
    await expect(documents.get_by_text(name)).to_be_visible(timeout=30_000)
    await documents.get_by_text(name).click()
    await expect(page.locator("#source .document")).to_contain_text("<script>document.title")
    assert await page.title() == "AIIRWKV"


async def test_a_new_collection_can_be_made_below_many(page: Page) -> None:
    button = page.get_by_role("button", name="New collection")
    for number in range(12):
        await button.click()
        await page.get_by_label("Name of the new collection").fill(f"Shelf {number}")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", name=f"Shelf {number}", exact=True)).to_be_visible()
    shelf = page.get_by_label("Collections", exact=True)
    assert await shelf.evaluate("shelf => { shelf.scrollTop = 0; return shelf.scrollHeight > shelf.clientHeight }")
    await expect(button).to_be_in_viewport(ratio=1)
    await button.click()
    assert await shelf.evaluate("shelf => { shelf.scrollTop = 0; return true }")
    await expect(page.get_by_label("Name of the new collection")).to_be_in_viewport(ratio=1)


def test_the_page_answers_on_loopback_only_and_says_it_is_well(address: str) -> None:
    with urllib.request.urlopen(f"{address}/healthz") as reply:
        assert json.load(reply) == {"status": "ok"}
    request = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


async def test_payloads_do_nothing_in_a_real_browser() -> None:
    spec = importlib.util.spec_from_file_location("payloads", Path(__file__).with_name("payloads.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clean = "".join(f"<div>{markdown(text, {1})}</div><pre>{lit(text, 1, 4)}</pre>" for text in module.PAYLOADS)
    raw = "<img src=x onerror=pwned()>"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for html, harmless in ((clean, True), (raw, False)):  # the raw one shows that the test would notice
            page = await browser.new_page()
            requests: list[str] = []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            await page.evaluate("() => { window.hits = 0; window.pwned = () => { window.hits++ } }")
            await page.evaluate("html => { document.body.innerHTML = html }", html)
            for element in await page.query_selector_all("body a, body button"):
                await element.dispatch_event("mouseover")
            await asyncio.sleep(0.3)
            assert (await page.evaluate("window.hits") == 0 and not requests) is harmless
        await browser.close()
