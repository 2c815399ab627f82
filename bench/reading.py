"""
What giving a model whole passages costs and is worth: as ever (the sentences that fit best), concat, and parallel.

Each is asked cold (nothing is kept), read (the passages were read when they were indexed, the question is new) and
again (the same question once more). Right: the answer holds what was expected and cites the place where it stands.

    python bench/reading.py [SET] [--questions N] [--chunk-size TOKENS] [--top N] [--model NAME] [--max-tokens N]

SET is a file in SQuAD's form, of which every paragraph is a document in one collection; without it, the texts of
answers.json, each in a collection of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import string
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from aiirwkv import Answer, Bus, Chat, Collections, Index, ServiceError, Source, States
from aiirwkv.testing import running
from aiirwkv_convert_files import ConvertFiles
from aiirwkv_embed_minilm import EmbedMiniLM
from aiirwkv_index_chroma import IndexChroma
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_rag import Rag

Way = Literal["concat", "parallel"] | None
WAYS: dict[str, Way] = {"as ever": None, "concat": "concat", "parallel": "parallel"}


@dataclass
class Question:
    """`answers` is empty when the collection does not say; `sentence` are words of the place to be cited."""

    collection: str
    text: str
    answers: list[str]
    sentence: str = ""
    document: str = ""


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)
    """Of these, from the first token read to the last one written."""

    def add(self, question: Question, answer: Answer, seconds: float) -> None:
        self.seconds.append(seconds)
        self.writing.append(sum(stage.seconds for stage in answer.receipt.stages if stage.name == "write"))
        self.counts["prompt"] += answer.usage.prompt
        self.counts["cached"] += answer.usage.cached
        self.counts["written"] += answer.usage.completion
        if not question.answers:
            self.counts["unanswerable"] += 1
            self.counts["refused rightly"] += answer.refused
            return
        cited = " ".join(citation.text for citation in answer.citations)
        said = not answer.refused and any(plain(expected) in plain(answer.answer) for expected in question.answers)
        there = question.document in ("", *(citation.document for citation in answer.citations))
        stands = there and plain(question.sentence) in plain(cited)
        self.counts["answerable"] += 1
        self.counts["said"] += said
        self.counts["cited"] += stands
        self.counts["right"] += said and stands
        self.counts["own words"] += said and stands and answer.supported
        self.counts["refused wrongly"] += answer.refused

    def row(self, name: str) -> list[str]:
        c, n = self.counts, len(self.seconds)
        ninety = sorted(self.seconds)[min(int(n * 0.95), n - 1)]
        return [
            name,
            f"{c['right']}/{c['answerable']}",
            str(c["own words"]),
            str(c["cited"]),
            f"{c['refused wrongly']}",
            f"{c['refused rightly']}/{c['unanswerable']}",
            f"{c['prompt'] / n:.0f}",
            f"{100 * c['cached'] / max(c['prompt'], 1):.0f} %",
            f"{1000 * median(self.writing):.0f} ms",
            f"{1000 * median(self.seconds):.0f} ms",
            f"{1000 * ninety:.0f} ms",
        ]


HEAD = ["way", "right", "own words", "cited", "refused wrongly", "rightly", "prompt", "kept", "model", "in all", "p95"]


def plain(text: str) -> str:
    """For comparing: lower case, one blank between words, no punctuation around them."""
    return " ".join(word.strip(string.punctuation) for word in text.lower().split())


def own(path: Path) -> tuple[dict[str, list[Source]], list[Question]]:
    """The texts of answers.json."""
    texts = json.loads(path.read_text(encoding="utf-8"))
    sources = {text["name"]: [Source(text=text["text"], name=text["name"])] for text in texts}
    questions = [
        Question(text["name"], item["question"], item["answers"], item.get("sentence", ""))
        for text in texts
        for item in text["questions"]
    ]
    return sources, questions


def squad(path: Path) -> tuple[dict[str, list[Source]], list[Question]]:
    """A file in SQuAD's form; a question is right when its answer's own passage is cited."""
    sources, questions = [], []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            name = f"{article['title']}-{number}.txt"
            sources.append(Source(text=paragraph["context"], name=name))
            for item in paragraph["qas"]:
                answers = [answer["text"] for answer in item["answers"]]
                questions.append(Question("set", item["question"], answers, min(answers, key=len, default=""), name))
    return {"set": sources}, questions


async def ask(bus: Bus, questions: list[Question], way: Way, options: argparse.Namespace, cold: bool) -> Tally:
    tally = Tally()
    how: dict[str, Any] = {"top": options.top, "read": way, "max_tokens": options.max_tokens}
    for question in questions:
        if cold:
            await bus.call(States("drop"), timeout=60)
        began = time.perf_counter()
        answer = await bus.call(Chat(question.text, collections=[question.collection], **how), timeout=600)
        tally.add(question, answer, time.perf_counter() - began)
    return tally


async def switch(bus: Bus, sources: dict[str, list[Source]], on: bool) -> None:
    """Have all documents read, or forgotten."""
    for collection in sources:
        reply = await bus.call(Collections("describe", name=collection, read=on), timeout=3600)
        for problem in reply.problems:
            print(f"  {problem}")


async def measure(
    bus: Bus, sources: dict[str, list[Source]], asked: list[Question], options: argparse.Namespace
) -> list[list[str]]:
    rows = []
    for name, way in WAYS.items():
        await switch(bus, sources, way is not None)
        rows.append((await ask(bus, asked, way, options, True)).row(f"{name}, cold"))
        began = time.perf_counter()
        await switch(bus, sources, way is not None)
        if way:
            print(f"read for {name} in {time.perf_counter() - began:.1f} s")
        rows.append((await ask(bus, asked, way, options, False)).row(f"{name}, read" if way else f"{name}, kept"))
        rows.append((await ask(bus, asked, way, options, False)).row(f"{name}, again"))
    return rows


def show(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if row is rows[0]:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def hardware() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{names[0] if names else platform.processor()}, {threads} threads, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


async def main(options: argparse.Namespace) -> None:
    sources, questions = squad(options.set) if options.set else own(Path(__file__).with_name("answers.json"))
    if options.questions:
        questions = random.Random(0).sample(questions, min(options.questions, len(questions)))
    index = IndexChroma(chunk_size=options.chunk_size)
    model = LlmRwkv(model=options.model)
    plugins: dict[str, Any] = {"llm_rwkv": model, "embed_minilm": EmbedMiniLM(), "index_chroma": index}
    plugins |= {"convert_files": ConvertFiles(), "rag": Rag()}
    with tempfile.TemporaryDirectory() as folder:
        async with running(plugins, Path(folder)) as bus:
            chunks = 0
            for name, texts in sources.items():
                for start in range(0, len(texts), 50):
                    chunks += (await bus.call(Index(name, texts[start : start + 50]), timeout=600)).chunks
            documents = sum(map(len, sources.values()))
            print(
                f"{options.set.stem if options.set else 'answers'}: {len(questions)} questions on {documents} documents"
            )
            print(f"in {chunks} chunks of at most {options.chunk_size} tokens, {options.top} found per question")
            print(f"{options.model} on {hardware()}\n")
            try:
                show([HEAD, *await measure(bus, sources, questions, options)])
            except ServiceError as error:
                raise SystemExit(str(error)) from None
            cache = (await bus.call(States("list"))).cache
            print(f"\n{cache.states} states, {cache.memory / 1e6:.0f} MB in memory, {cache.disk / 1e6:.0f} MB on disk")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", type=Path)
    parser.add_argument("--questions", type=int, default=0, help="take so many at random [all]")
    parser.add_argument("--chunk-size", type=int, default=160)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--model", default="rwkv7-nano")
    parser.add_argument("--max-tokens", type=int, help="of an answer [as the model's card says]")
    asyncio.run(main(parser.parse_args()))
