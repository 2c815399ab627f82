"""The engine on the built-in model: batches, gaps, fairness, several texts, kept states, and everything that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from aiirwkv import Chunk, Completion, DeadlineExceeded, ServiceError
from aiirwkv_llm_rwkv.cache.states import StateCache
from aiirwkv_llm_rwkv.card import Sampling
from aiirwkv_llm_rwkv.engine.loop import Engine
from aiirwkv_llm_rwkv.engine.output import Output
from aiirwkv_llm_rwkv.engine.requests import Run
from aiirwkv_llm_rwkv.engine.sampling import Sampler
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.network.model import RWKV
from aiirwkv_llm_rwkv.runtimes.cpu import CpuRuntime
from aiirwkv_llm_rwkv.runtimes.runtime import Adapter, Lost, Piece, Runtime, TorchRuntime
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from torch import Tensor

from .conftest import NANO
from .questions import READING

TOKENIZER = Tokenizer.load(NANO / "vocab.txt")
GREEDY = Sampling(temperature=0, presence=0, frequency=0)
LIVELY = Sampling(temperature=1, top_p=0.9)


@pytest.fixture(scope="module")
def model() -> RWKV:
    return load(NANO / "model.safetensors", torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_num_threads(1)  # as an engine's thread does it; Numba's pool sets another number when it starts
    with torch.inference_mode():
        yield


class Recorded(TorchRuntime):
    """
    Notes what it is asked to read. `fail` may raise before it reads; `cost` says how long a pass takes.

    With `idle`, it only pretends to read: all tokens are equally likely then.
    """

    def __init__(self, model: RWKV, idle: bool = False) -> None:
        super().__init__(model)
        self.idle = idle
        self.passes: list[list[int]] = []
        self.now = 0.0
        self.fail: Callable[[Sequence[Piece]], None] = lambda pieces: None
        self.cost: Callable[[list[int]], float] = lambda lengths: 1.0
        self.most_slots = 1000

    def grow(self, slots: int) -> None:
        if slots > getattr(self, "most_slots", 1000):
            raise MemoryError(f"no memory for {slots} slots")
        super().grow(slots)

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        self.fail(pieces)
        lengths = [len(piece.tokens) for piece in pieces]
        self.passes.append(lengths)
        self.now += self.cost(lengths)
        return torch.zeros(len(pieces), self.vocabulary) if self.idle else super().forward(pieces)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.passes))


class Asked(Run):
    """A request and what came of it."""

    def __init__(self, prompt: str | list[int], sampling: Sampling = GREEDY, seed: int = 0, n: int = 1, **more: Any):
        self.pieces: list[Chunk] = []
        self.ended = threading.Event()
        self.in_order: list[Run] = []
        self.error: ServiceError | None = None
        tokens = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
        super().__init__(
            **{
                "prompt": tokens,
                "samplers": [Sampler(sampling, seed + index) for index in range(n)],
                "outputs": [Output(["\n\n"] if sampling is GREEDY else []) for _ in range(n)],
                "emit": self.told,
                "max_tokens": 40,
                **more,
            }
        )

    def told(self, piece: Chunk | ServiceError) -> None:
        assert not self.error and not self.whole
        if isinstance(piece, ServiceError):
            self.error = piece
        else:
            self.pieces.append(piece)
        if self.error or self.whole:
            self.in_order.append(self)
            self.ended.set()

    @property
    def whole(self) -> bool:
        return bool(self.pieces and self.pieces[-1].usage)

    @property
    def reply(self) -> Completion:
        assert self.whole, self.error
        return Completion.fold(self.pieces)


def reading(number: int) -> str:
    passage, questions = READING[number % len(READING)]
    return f"User: {passage}\nQuestion: {questions[0][0]}\n\nAssistant:"


def long_text(tokens: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(1, 1000), k=tokens)


def engine_of(runtime: Runtime, **more: Any) -> Engine:
    clock = {"clock": lambda: runtime.now} if isinstance(runtime, Recorded) else {}
    return Engine(runtime, TOKENIZER, name="nano", **{**clock, **more})


def steps(engine: Engine, count: int = 1) -> None:
    for _ in range(count):
        if engine.busy:
            engine.take()
            engine.step()


def finish(engine: Engine, *runs: Run) -> None:
    """Work in this thread until nothing is left to do."""
    for run in runs:
        engine.submit(run)
    passes = 0
    while engine.busy:
        steps(engine)
        passes += 1
        assert passes < 20_000, "the engine does not come to an end"


# Batches


def various(number: int) -> Asked:
    """One of twelve requests that have nothing in common."""
    sampling = [
        GREEDY,
        LIVELY,
        Sampling(temperature=0.7, top_p=1, top_k=20),
        Sampling(temperature=1.3, top_p=1, min_p=0.05, presence=0, frequency=0.8),
    ][number % 4]
    prompt: str | list[int] = reading(number) if number % 3 else long_text(50 + 90 * number, number)
    return Asked(prompt, sampling, seed=number, max_tokens=5 + 4 * number, logprobs=True, stop=frozenset())


def test_results_do_not_depend_on_neighbours(model: RWKV) -> None:
    alone = [various(number) for number in range(12)]
    for run in alone:
        finish(engine_of(TorchRuntime(model)), run)
    together = [various(number) for number in range(12)]
    finish(engine_of(TorchRuntime(model)), *together)
    arriving = [various(number) for number in range(12)]
    engine, random = engine_of(Recorded(model), rows=5), Random(1)
    for run in random.sample(arriving, 12):
        engine.submit(run)
        steps(engine, random.randrange(9))
    finish(engine)
    for others in (together, arriving):
        for one, other in zip(alone, others, strict=True):
            assert one.reply.text == other.reply.text and one.reply.usage == other.reply.usage
            assert one.reply.logprobs == pytest.approx(other.reply.logprobs, abs=1e-4)
    assert len({run.reply.text for run in alone}) == 12


def test_one_forward_call_reads_a_token_of_each_text_and_some_of_a_prompt(model: RWKV) -> None:
    runtime = Recorded(model)
    engine = engine_of(runtime)
    writing = [Asked("User:", LIVELY, seed, stop=frozenset()) for seed in range(3)]
    for run in writing:
        engine.submit(run)
    steps(engine, 5)
    finish(engine, Asked(long_text(700)))
    mixed = [lengths for lengths in runtime.passes if max(lengths) > 1 and min(lengths) == 1]
    assert mixed and all(lengths[:3] == [1, 1, 1] for lengths in mixed[:-1])
    assert sum(lengths[-1] for lengths in runtime.passes if max(lengths) > 1) >= 700


@pytest.mark.parametrize(
    ("cost", "passes"),
    [
        pytest.param(lambda lengths: 1 + 0.02 * len(lengths) + 0.002 * sum(lengths), 20, id="cheap"),
        pytest.param(lambda lengths: 1 + 0.02 * len(lengths) + 0.1 * sum(lengths), 420, id="dear"),
        pytest.param(lambda lengths: 1 + 0.8 * (max(lengths) > 1) + 0.01 * sum(lengths), 300, id="in steps"),
    ],
)
def test_a_long_prompt_never_stalls_the_others(cost: Callable[[list[int]], float], passes: int, model: RWKV) -> None:
    runtime = Recorded(model, idle=True)
    runtime.cost = cost
    engine = engine_of(runtime)
    writing = Asked("User:", LIVELY, max_tokens=1500, stop=frozenset())
    engine.submit(writing)
    steps(engine, 100)
    assert runtime.passes[50:] == [[1]] * 50
    arriving = Asked(long_text(4000), max_tokens=1)
    engine.submit(arriving)
    while not arriving.whole:
        steps(engine)
    meanwhile = runtime.passes[100:]
    assert all(lengths[0] == 1 for lengths in meanwhile), "a token of the text that is being written in each pass"
    assert max(map(cost, meanwhile)) <= 3 * cost([1]), "the longest time between two of its tokens"
    assert len(meanwhile) <= passes, "and the prompt is read soon"
    assert engine.stats()["longest_gap"] == pytest.approx(max(map(cost, meanwhile)), abs=1e-4)


def test_alone_a_prompt_is_read_in_large_portions(model: RWKV) -> None:
    runtime = Recorded(model, idle=True)
    finish(engine_of(runtime), Asked(long_text(2000), max_tokens=1))
    assert [sum(lengths) for lengths in runtime.passes] == [512, 512, 512, 464]


# Fairness


def test_many_requests_of_one_user_do_not_starve_another(model: RWKV) -> None:
    runtime = Recorded(model)
    engine = engine_of(runtime, rows=4)
    crowd = [Asked(long_text(300, seed), LIVELY, seed, owner="ann", max_tokens=40) for seed in range(12)]
    for run in crowd:
        engine.submit(run)
    steps(engine, 3)
    before = runtime.tokens
    single = Asked(reading(0), owner="bob")
    engine.submit(single)
    while not single.whole:
        steps(engine)
    assert single.reply.text.strip() == "half past six"
    assert runtime.tokens - before < 1500, "bob waits neither for all of ann's prompts nor for her texts"
    done = [run.whole for run in crowd]
    assert not any(done[4:])
    finish(engine)
    alone = Asked(long_text(300, 3), LIVELY, 3, owner="ann", max_tokens=40)
    finish(engine_of(TorchRuntime(model)), alone)
    assert crowd[3].reply == alone.reply, "who had to make room goes on as if nothing had happened"
    assert all(run.whole for run in crowd)


def test_users_take_turns_at_reading(model: RWKV) -> None:
    engine = engine_of(Recorded(model, idle=True))
    ann = [Asked(long_text(3000, seed), owner="ann", max_tokens=1) for seed in range(3)]
    bob = Asked(long_text(3000, 9), owner="bob", max_tokens=1)
    finish_order: list[Run] = []
    for run in (*ann, bob):
        run.in_order = finish_order
    finish(engine, *ann, bob)
    assert finish_order.index(bob) <= 1, "half of the passes are bob's"
    assert [run for run in finish_order if run is not bob] == ann, "one's own requests come first come first"


def test_short_prompts_overtake_a_very_long_one_and_what_is_only_read_for_later(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Recorded(model, idle=True), cache=cache)
    order: list[Run] = []

    def asked(tokens: int, seed: int, **more: Any) -> Asked:
        run = cached(cache, long_text(tokens, seed), **{"max_tokens": 1, **more})
        run.in_order = order
        return run

    later = asked(3000, 1, samplers=[], read_only=True)
    endless = asked(20_000, 2)
    engine.submit(later)
    engine.submit(endless)
    steps(engine, 12)
    shorter = [asked(2000, seed) for seed in (3, 4)]
    finish(engine, *shorter)
    assert order == [*shorter, endless, later]


# Several texts


@pytest.mark.parametrize("rows", [0, 3])
def test_several_texts_of_one_prompt(rows: int, model: RWKV) -> None:
    runtime = Recorded(model)
    run = Asked(reading(1), LIVELY, seed=5, n=7, logprobs=True, stop=frozenset(), max_tokens=20)
    finish(engine_of(runtime, rows=rows), run)
    alone = [Asked(reading(1), LIVELY, 5 + index, logprobs=True, stop=frozenset(), max_tokens=20) for index in range(7)]
    for each in alone:
        finish(engine_of(TorchRuntime(model)), each)
    reply = run.reply
    assert [choice.text for choice in reply.choices] == [each.reply.text for each in alone]
    assert len({choice.text for choice in reply.choices}) > 3
    assert [choice.finish for choice in reply.choices] == ["length"] * 7
    assert reply.choices[6].logprobs == pytest.approx(alone[6].reply.logprobs, abs=1e-4)
    assert reply.usage.completion == 140 and reply.usage.prompt == len(run.prompt)
    assert [piece.usage for piece in run.pieces[:-1]] == [None] * (len(run.pieces) - 1)
    assert runtime.tokens == len(run.prompt) + 7 * 19, "the prompt was read once"


# Kept states


@pytest.fixture
def cache(model: RWKV, tmp_path: Path) -> Iterator[StateCache]:
    cache = states(model, tmp_path)
    yield cache
    cache.close()


def states(model: RWKV, folder: Path) -> StateCache:
    return StateCache(folder, 1 << 26, 1 << 28, "nano", model.layout.size, vocabulary=1024, precision="float32")


def cached(cache: StateCache, prompt: str | list[int], *args: Any, owner: str = "ann", **more: Any) -> Asked:
    return Asked(prompt, *args, owner=owner, cache=True, root=cache.root(owner), **more)


def test_what_was_read_is_not_read_again(model: RWKV, cache: StateCache) -> None:
    runtime = Recorded(model)
    engine = engine_of(runtime, cache=cache)
    text = long_text(300)
    runs = [
        cached(cache, text, cuts=[100, 200]),
        cached(cache, text, cuts=[100, 200]),  # the whole of it
        cached(cache, [*text[:200], *long_text(50, 1)], cuts=[100, 200]),  # as far as a cut
        cached(cache, text[:150], cuts=[100]),
        cached(cache, text, cuts=[100, 200], owner="bob"),  # nothing of somebody else's
        Asked(text),
    ]
    read = []
    for run in runs:
        before = engine.tokens_read
        finish(engine, run)
        read.append(engine.tokens_read - before)
    assert read == [300, 0, 50, 50, 300, 300]
    assert [run.reply.usage.cached for run in runs] == [0, 300, 200, 100, 0, 0]
    assert [run.reply.usage.hits for run in runs] == [0, 1, 1, 1, 0, 0]
    assert runs[1].reply.usage.bytes >= 4 * model.layout.size
    assert runs[0].reply.text == runs[1].reply.text == runs[4].reply.text == runs[5].reply.text
    assert engine.stats()["states"]["hits"] == 3
    fresh = Asked([*text[:200], *long_text(50, 1)])
    finish(engine_of(TorchRuntime(model)), fresh)
    assert runs[2].reply.text == fresh.reply.text


def test_states_survive_a_restart(model: RWKV, tmp_path: Path) -> None:
    replies = []
    for _ in range(2):
        cache = states(model, tmp_path)
        engine = engine_of(Recorded(model), cache=cache)
        run = cached(cache, long_text(400))
        finish(engine, run)
        replies.append((run.reply, engine.tokens_read))
        cache.close()
    (first, read), (second, nothing) = replies
    assert (read, nothing) == (400, 0)
    assert first.text == second.text and second.usage.cached == 400


def test_what_is_being_read_is_not_read_twice(model: RWKV, cache: StateCache) -> None:
    runtime = Recorded(model)
    engine = engine_of(runtime, cache=cache)
    text = long_text(900)
    same = [cached(cache, text, cuts=[600]) for _ in range(5)]
    other = cached(cache, [*text[:600], *long_text(40, 1)], cuts=[600])
    for run in (*same, other):
        engine.submit(run)
    steps(engine)
    assert engine.stats()["parked"] == 5 and engine.stats()["running"] == 1
    finish(engine)
    assert engine.tokens_read == 900 + 40
    assert [run.reply.usage.cached for run in (*same, other)] == [0, 900, 900, 900, 900, 600]
    assert len({run.reply.text for run in same}) == 1


def test_who_waits_for_a_request_that_is_cancelled_reads_for_itself(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Recorded(model), cache=cache)
    first, second = (cached(cache, long_text(2000)) for _ in range(2))
    engine.submit(first)
    engine.submit(second)
    steps(engine, 2)
    first.cancel()
    finish(engine)
    assert not first.pieces and second.reply.usage.cached == 0
    assert engine.tokens_read == 1024 + 2000


def test_a_conversation_goes_on_from_the_end_of_an_answer(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Recorded(model), cache=cache)
    prompt = reading(2)
    first = cached(cache, prompt, LIVELY, 3, max_tokens=40, stop=frozenset(), answered=TOKENIZER.encode)
    finish(engine, first)
    ids = [*first.prompt, *TOKENIZER.encode(first.reply.text)]
    second = cached(cache, [*ids, *TOKENIZER.encode("\n\nUser: And then?\n\nAssistant:")])
    finish(engine, second)
    as_written = TOKENIZER.encode(first.reply.text)
    assert len(as_written) == 40, "this text has the same tokens when it is encoded again"
    assert second.reply.usage.cached == len(first.prompt) + 39, "the last token was chosen, not read"
    strange = cached(cache, reading(3), LIVELY, 3, stop=frozenset(), answered=lambda text: [1, *TOKENIZER.encode(text)])
    before = cache.stats().states
    finish(engine, strange)
    assert cache.stats().states == before + 1, "the prompt's; after the answer it would never be found"


def test_without_the_cache_nothing_is_kept(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Recorded(model), cache=cache)
    for _ in range(2):
        run = cached(cache, long_text(100))
        run.cache = False
        finish(engine, run)
        assert run.reply.usage.cached == 0
    assert engine.tokens_read == 200 and cache.stats().states == 0


def test_reading_only(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Recorded(model), cache=cache)
    document = long_text(1000)
    for read in (1000, 0):
        before = engine.tokens_read
        run = cached(cache, document, n=1, samplers=[], read_only=True, pin=True, label="a document")
        finish(engine, run)
        assert run.reply.finish == "stop" and run.reply.text == "" and engine.tokens_read - before == read
        (kept,) = cache.list("ann")
        assert kept.id == run.kept and kept.pinned and kept.label == "a document" and kept.tokens == 1000
    asked = cached(cache, document + TOKENIZER.encode(" What?"))
    finish(engine, asked)
    assert asked.reply.usage.cached == 1000


def test_several_texts_of_a_kept_prompt(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Recorded(model), cache=cache)
    texts = []
    for _ in range(2):
        run = cached(cache, reading(4), LIVELY, 1, n=3)
        finish(engine, run)
        texts.append([choice.text for choice in run.reply.choices])
    assert texts[0] == texts[1] and engine.tokens_read == len(run.prompt)


# Ends


def test_how_texts_end(model: RWKV) -> None:
    engine = engine_of(TorchRuntime(model))
    stopped = Asked(reading(0), outputs=[Output(["past"])])
    cut = Asked(reading(0), max_tokens=2)
    ended = Asked(reading(0))
    finish(engine, stopped, cut, ended)
    assert (stopped.reply.text.strip(), stopped.reply.finish) == ("half", "stop")
    assert (cut.reply.finish, cut.reply.usage.completion) == ("length", 2)
    assert (ended.reply.text.strip(), ended.reply.finish) == ("half past six", "stop")


def test_a_cancelled_request_leaves_within_one_pass(model: RWKV) -> None:
    runtime = Recorded(model, idle=True)
    engine = engine_of(runtime)
    writing, reader = Asked("User:", LIVELY, stop=frozenset(), max_tokens=1000), Asked(long_text(5000))
    engine.submit(writing)
    steps(engine, 5)
    engine.submit(reader)
    steps(engine, 3)
    written, passes = len(writing.pieces), len(runtime.passes)
    writing.cancel()
    reader.cancel()
    steps(engine, 3)
    assert len(runtime.passes) <= passes + 1 and len(writing.pieces) == written
    assert not engine.busy and engine.stats()["running"] == 0


def test_deadlines(model: RWKV) -> None:
    runtime = Recorded(model)
    engine = engine_of(runtime, rows=1)
    writing = Asked("User:", LIVELY, stop=frozenset(), max_tokens=1000, deadline=20.5)
    waiting = Asked("User:", deadline=10.5)
    patient = Asked(reading(0))
    finish(engine, writing, waiting, patient)
    assert isinstance(writing.error, DeadlineExceeded) and 15 < len(writing.pieces) <= 21
    assert isinstance(waiting.error, DeadlineExceeded) and not waiting.pieces
    assert patient.reply.text.strip() == "half past six"


# Failures


def test_when_memory_is_out_less_is_tried(model: RWKV) -> None:
    def scarce(pieces: Sequence[Piece]) -> None:
        if sum(len(piece.tokens) for piece in pieces) > 40:
            raise MemoryError("no memory")

    runtime = Recorded(model)
    runtime.fail = scarce
    engine = engine_of(runtime)
    runs = [various(number) for number in range(6)]
    finish(engine, *runs)
    assert max(map(sum, runtime.passes)) <= 40 and engine.reader.most < 512
    for number, run in enumerate(runs):
        alone = various(number)
        finish(engine_of(TorchRuntime(model)), alone)
        assert run.reply.text == alone.reply.text
    runtime.fail = lambda pieces: None
    runtime.idle = True
    finish(engine, Asked("User:", LIVELY, stop=frozenset(), max_tokens=2000))
    assert engine.reader.most == 512, "it tries more again"


def test_texts_that_are_lost_are_not_read_again(model: RWKV) -> None:
    def lose(pieces: Sequence[Piece]) -> None:
        raise Lost("a batch failed half-way: no memory")

    runtime = Recorded(model)
    engine = engine_of(runtime)
    runtime.fail = lose
    runs = [Asked(reading(0)), Asked(reading(1))]
    finish(engine, *runs)
    assert all(run.error and "half-way" in str(run.error) for run in runs)
    assert len(runtime.passes) <= 2, "nothing is tried in halves, since the states are worth nothing"
    runtime.fail = lambda pieces: None
    again = Asked(reading(0))
    finish(engine, again)
    assert again.reply.text.strip() == "half past six"


def test_when_there_is_no_memory_at_all_a_request_fails_and_the_engine_lives(model: RWKV) -> None:
    runtime = Recorded(model)
    engine = engine_of(runtime)

    def none(pieces: Sequence[Piece]) -> None:
        raise MemoryError("no memory")

    runtime.fail = none
    run = Asked(reading(0))
    finish(engine, run)
    assert run.error and "out of memory" in str(run.error)
    runtime.fail = lambda pieces: None
    again = Asked(reading(0))
    finish(engine, again)
    assert again.reply.text.strip() == "half past six"


def test_fewer_rows_when_the_pool_cannot_grow(model: RWKV) -> None:
    runtime = Recorded(model)
    runtime.most_slots = 2
    engine = engine_of(runtime)
    runs = [Asked(reading(number)) for number in range(6)]
    finish(engine, *runs)
    assert all(run.whole for run in runs) and engine.stats()["rows"] == 2
    assert max(map(len, runtime.passes)) == 2
    none = Recorded(model)
    none.most_slots = 0
    run = Asked(reading(0))
    finish(engine_of(none), run)
    assert run.error and "no memory for 1 slots" in str(run.error)


class Poison:
    """An adapter that breaks the forward pass of whoever uses it."""

    deltas: dict[str, tuple[Tensor, Tensor]] = {}


def test_only_who_is_to_blame_fails(model: RWKV) -> None:
    poison: Adapter = Poison()

    def poisoned(pieces: Sequence[Piece]) -> None:
        if any(piece.adapter is poison for piece in pieces):
            raise ValueError("a shape does not fit")

    runtime = Recorded(model)
    runtime.fail = poisoned
    good = [Asked(reading(number)) for number in range(5)]
    bad = Asked(reading(0), adapter=poison)
    finish(engine_of(runtime), *good[:3], bad, *good[3:])
    assert bad.error and "the model failed with ValueError: a shape does not fit" in str(bad.error)
    for number, run in enumerate(good):
        alone = Asked(reading(number))
        finish(engine_of(TorchRuntime(model)), alone)
        assert run.reply.text == alone.reply.text


class Spoilt(Recorded):
    """Its pass gives no numbers for texts that hold a certain token."""

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        logits = super().forward(pieces)
        for row, piece in enumerate(pieces):
            if 999 in piece.tokens:
                logits[row, 3] = float("nan")
        return logits


def test_numbers_that_are_none_fail_one_request_only(model: RWKV, cache: StateCache) -> None:
    engine = engine_of(Spoilt(model), cache=cache)
    good, bad = Asked(reading(0)), cached(cache, [5, 6, 999, *range(20, 60)])
    finish(engine, bad, good)
    assert bad.error and "not finite" in str(bad.error)
    assert good.reply.text.strip() == "half past six" and cache.stats().states == 0


def test_a_sampler_that_fails_is_no_concern_of_others(model: RWKV) -> None:
    good = Asked(reading(0))
    bad = Asked(reading(0), samplers=[Sampler(GREEDY, ban=range(1024))])
    finish(engine_of(TorchRuntime(model)), bad, good)
    assert bad.error and good.reply.text.strip() == "half past six"


def test_a_mistake_of_the_engine_ends_what_runs_and_nothing_else(
    model: RWKV, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(TorchRuntime(model))
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_plan", lambda: 1 / 0)
        run = ask(engine, Asked(reading(0)))
        assert run.error and "ZeroDivisionError" in str(run.error)
    ask(engine, Asked(reading(0)))
    engine.close()
    assert "a pass of the engine failed" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_everybody_is_told_an_end_and_nothing_is_left_behind(
    seed: int, model: RWKV, cache: StateCache
) -> None:
    random = Random(seed)
    runtime = Recorded(model, idle=True)
    poison: Adapter = Poison()

    def unlucky(pieces: Sequence[Piece]) -> None:
        if random.random() < 0.05 or any(piece.adapter is poison for piece in pieces):
            raise random.choice([MemoryError("no memory"), ValueError("a shape does not fit")])

    runtime.fail = unlucky
    engine = engine_of(runtime, cache=cache, rows=6)
    texts = [long_text(300, 7), [*long_text(200, 7), *long_text(300, 8)], long_text(40, 9)]
    runs: list[Asked] = []
    cancelled = []
    for _ in range(120):
        owner = random.choice(["ann", "bob", "eve"])
        run = Asked(
            random.choice(texts)[: random.choice([30, 200, 1000])],
            LIVELY,
            random.randrange(99),
            n=random.choice([1, 1, 1, 5]),
            owner=owner,
            cache=random.random() < 0.8,
            root=cache.root(owner),
            cuts=[20, 200],
            max_tokens=random.choice([1, 5, 40]),
            deadline=random.choice([float("inf"), runtime.now + 10]),
            adapter=random.choice([None] * 9 + [poison]),
            answered=TOKENIZER.encode,
        )
        if random.random() < 0.1:
            run.read_only = run.pin = True
            run.outputs = run.outputs[:1]
            run.unfinished = 1
        engine.submit(run)
        runs.append(run)
        steps(engine, random.randrange(4))
        if random.random() < 0.2:
            random.choice(runs).cancel()
        cancelled = [run for run in runs if run.over and not run.whole and not run.error]
    finish(engine)
    assert all(run.over for run in runs)
    assert all(run.whole or run.error for run in runs if run not in cancelled)
    assert sum(run.whole for run in runs) > 40 and any(run.error for run in runs)
    schedule = engine.schedule
    assert not schedule.everybody() and sorted(schedule._free) == list(range(schedule._slots)) and schedule.most == 6
    assert cache.begin(*(key for run in runs for key in set(cache.keys(run.root, run.prompt, run.marks()))))


# The thread


def ask(engine: Engine, run: Asked) -> Asked:
    """As another thread does it."""
    engine.submit(run)
    assert run.ended.wait(30)
    return run


def test_closing(model: RWKV) -> None:
    engine = engine_of(TorchRuntime(model))
    engine.start()
    assert ask(engine, Asked(reading(0))).reply.text.strip() == "half past six"
    runs = [Asked("User:", LIVELY, stop=frozenset(), max_tokens=100_000) for _ in range(3)]
    for run in runs:
        engine.submit(run)
    engine.close()
    late = Asked(reading(0))
    engine.submit(late)
    assert all(run.error and "the worker was stopped" in str(run.error) for run in (*runs, late))


def test_closing_after_the_work(model: RWKV) -> None:
    engine = engine_of(TorchRuntime(model))
    engine.start()
    runs = [Asked(reading(number)) for number in range(3)]
    for run in runs:
        engine.submit(run)
    engine.close(finish=True)
    assert all(run.whole for run in runs)


def test_what_a_pass_has_to_tell_is_handed_over_at_once(model: RWKV) -> None:
    batches: list[int] = []
    engine = engine_of(TorchRuntime(model), deliver=lambda told: batches.append(len(told)))
    finish(engine, *(Asked("User:", LIVELY, seed, stop=frozenset()) for seed in range(8)))
    assert max(batches) == 8 and len(batches) <= 45


def test_figures(model: RWKV) -> None:
    runtime = Recorded(model)
    runtime.cost = lambda lengths: 0.01
    engine = engine_of(runtime)
    finish(engine, *(Asked(long_text(100, seed), LIVELY, seed, stop=frozenset()) for seed in range(4)))
    stats = engine.stats()
    assert stats["tokens_read"] == 400 and stats["tokens_written"] == 160
    assert stats["rows_mean"] == 4 and stats["longest_gap"] == pytest.approx(0.01)
    assert stats["written_per_second"] == pytest.approx(160 / runtime.now, rel=0.1)
    assert stats["running"] == stats["waiting"] == stats["parked"] == 0 and stats["runtime"]


def test_a_prompt_of_200_000_tokens(model: RWKV) -> None:
    import resource

    run = Asked(long_text(200_000), max_tokens=3)
    engine = engine_of(CpuRuntime(model))
    engine.submit(run)
    steps(engine, 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    finish(engine)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert run.reply.usage.prompt == 200_000 and run.reply.usage.completion == 3
    assert grown < 20_000, f"{grown} KiB more"
