"""
How well the offline default answers: 22 texts of about ten facts, 220 questions they answer and 110 they do not.

Each text is a collection of its own. Right: the answer holds what was expected and cites the sentence it stands in.
The plugin was tuned on these questions, one set of texts after another; when they were still unseen, the last five
sets gave 143 of 180 right and 59 of 72 near misses refused; expect about that of new texts.

    python bench/answers.py [TEXT…]
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from aiirwkv import Bus, Chat, Index, Source
from aiirwkv.testing import running
from aiirwkv_convert_files import ConvertFiles
from aiirwkv_embed_minilm import EmbedMiniLM
from aiirwkv_index_chroma import IndexChroma
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_rag import Rag


async def measure(bus: Bus, text: dict[str, Any], counts: Counter[str], seconds: list[float]) -> None:
    name = text["name"]
    await bus.call(Index(name, [Source(text=text["text"], name=name)]), timeout=60)
    for item in text["questions"]:
        start = time.perf_counter()
        answer = await bus.call(Chat(item["question"], collections=[name]), timeout=60)
        seconds.append(time.perf_counter() - start)
        if not item["answers"]:
            kind = "near misses" if item["near"] else "strangers"
            counts[kind] += 1
            counts[f"{kind} refused"] += answer.refused
            wrong = not answer.refused
        else:
            said = any(expected.lower() in " ".join(answer.answer.lower().split()) for expected in item["answers"])
            cited = bool(answer.citations) and item["sentence"] in answer.citations[0].text
            counts["answerable"] += 1
            counts["cited rightly"] += cited
            counts["right"] += said and cited and not answer.refused
            counts["in the model's words"] += answer.supported
            wrong = not (said and cited) or answer.refused
        if wrong:
            print(f"  {name}: {item['question']} -> {answer.answer}")


async def main(names: list[str]) -> None:
    texts = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    plugins = {
        "llm_rwkv": LlmRwkv(),
        "embed_minilm": EmbedMiniLM(),
        "index_chroma": IndexChroma(),
        "convert_files": ConvertFiles(),
        "rag": Rag(),
    }
    counts: Counter[str] = Counter()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with running(plugins, Path(folder)) as bus:
            for text in texts:
                if not names or any(name in text["name"] for name in names):
                    await measure(bus, text, counts, seconds)
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"{median(seconds) * 1000:.0f} ms a question (median)")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
