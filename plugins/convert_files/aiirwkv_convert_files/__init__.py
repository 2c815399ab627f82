"""The text of files: txt, md, html, pdf, docx, pptx, xlsx, csv, epub, json, eml and source code. No OCR."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Self

import anyio
import msgspec
from aiirwkv.errors import BadRequest
from aiirwkv.hooks import Context, Plugin, hookimpl
from aiirwkv.types import Convert, Converted

from .kinds import ALIASES, MEDIA_TYPES, SUFFIXES, size

__all__ = ["ConvertFiles"]

INLINE = 512 << 10  # bytes: a longer reply keeps its text in an object
log = logging.getLogger(__name__)
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP")


class ConvertFiles(Plugin):
    """
    Serves `convert`. Each file is read in a child process that may neither grow nor run without end.

    memory: bytes a child may use. seconds: time it may take, on the clock and of CPU. at_once: children at a time.
    """

    memory: Annotated[int, msgspec.Meta(ge=256 << 20)] = 2 << 30
    seconds: Annotated[int, msgspec.Meta(ge=1)] = 120
    at_once: Annotated[int, msgspec.Meta(ge=1)] = 2

    async def __aenter__(self) -> Self:
        self._limiter = anyio.CapacityLimiter(self.at_once)
        return self

    def about(self) -> dict[str, Any]:
        return {"suffixes": sorted(SUFFIXES), "media_types": sorted({*MEDIA_TYPES.values(), *ALIASES})}

    @hookimpl
    async def convert(self, request: Convert, ctx: Context) -> Converted:
        """The text of an object, with its pages, headings and tables. BadRequest: why it cannot be read."""
        with tempfile.TemporaryDirectory(prefix="convert-") as name:
            folder = Path(name)
            source = await ctx.bus.get(request.object, into=folder / "file")
            file = request.name or source.name
            try:
                async with self._limiter:
                    result = await self._read(folder, file, request.media_type or source.media_type)
            except BadRequest as error:
                raise BadRequest(f"cannot read {file or 'the file'}: {error}") from error
            text = folder / "text"
            if text.stat().st_size + len(msgspec.json.encode(result)) <= INLINE:
                result.text = text.read_text(encoding="utf-8")
            else:
                stored = await ctx.bus.put(text, f"{file}.txt", "text/plain; charset=utf-8")
                result.object = stored.id
            return result

    async def _read(self, folder: Path, name: str, media_type: str) -> Converted:
        command = [sys.executable, "-P", "-m", "aiirwkv_convert_files.child"]
        command += [str(folder / "file"), str(folder), str(self.memory), str(self.seconds)]
        about = msgspec.json.encode({"name": name, "media_type": media_type})
        environment = {key: value for key in ENVIRONMENT if (value := os.environ.get(key))}
        environment |= {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            with anyio.fail_after(self.seconds):  # leaving, also by cancellation, kills the child
                done = await anyio.run_process(
                    command,
                    input=about,
                    stdout=subprocess.DEVNULL,
                    check=False,
                    env=environment,
                    start_new_session=True,
                )
        except TimeoutError:
            raise BadRequest(f"it took longer than {self.seconds} seconds to read") from None
        try:
            result = msgspec.json.decode((folder / "result.json").read_bytes())
        except (OSError, msgspec.DecodeError):
            log.warning("the reader of %s ended with %s: %s", name, done.returncode, done.stderr[-2000:].decode())
            if sys.platform != "win32" and done.returncode == -signal.SIGXCPU:
                raise BadRequest(f"it took longer than {self.seconds} seconds to read") from None
            raise BadRequest(f"it is damaged, or needs more than {size(self.memory)} of memory to read") from None
        if "error" in result:
            raise BadRequest(result["error"])
        return msgspec.convert(result, Converted)
