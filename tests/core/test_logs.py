"""Log lines travel on the bus, where a bounded stream keeps the last ones."""

import json
import logging
from pathlib import Path

import anyio
from aiirwkv import logs
from aiirwkv.testing import Fake, running


async def test_log_lines_are_on_the_bus(tmp_path: Path) -> None:
    async with running({"fake": Fake()}, tmp_path) as bus:
        sub = await bus.nc.subscribe("aiirwkv.log.>")
        root = logging.getLogger()
        before = list(root.handlers)
        await logs.to_bus(bus, "here")
        try:
            logging.getLogger("aiirwkv_fake").warning("the %s is %d", "answer", 42)
            msg = await sub.next_msg(timeout=5)
        finally:
            for handler in set(root.handlers) - set(before):
                root.removeHandler(handler)
        line = json.loads(msg.data)
        assert msg.subject == "aiirwkv.log.fake.here"
        assert line["message"] == "the answer is 42" and line["level"] == "warning" and line["plugin"] == "fake"
        with anyio.fail_after(5):
            while (await bus.nc.jetstream().stream_info(logs.STREAM)).state.messages < 1:
                await anyio.sleep(0.05)
