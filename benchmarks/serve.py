"""Serving many clients: texts decoded together against one at a time, through the same server.

    python benchmarks/serve.py [--config baby|gpt2] [--clients 1,8,64] [--rounds R] [--whole]
                               [--places P] [--memory REQUESTS] [--threads N] [--json FILE]
    python benchmarks/serve.py --score [--scorers N] ...
    python benchmarks/serve.py --engine [--cpu-time] ...

Two `tinygpt serve`, one with 16 places and one with a single one, take turns. A turn is so many
clients that each send some requests, one after the other, over a connection of their own, and read
the answer as a stream of events (``--whole``: in one piece); the clients are one other process,
this one. First the texts of requests that arrive together must be those of `tinygpt generate`.
``--memory`` sends as many short requests, and tells what they leave behind in the server.

``--score`` is about what programs that evaluate models ask for, the log probabilities of a prompt
(``echo`` with ``logprobs``): how many requests a second, and how long a stream of tokens takes
beside so many clients that ask for nothing else, against alone. First the scores of texts that
arrive together must be those of a forward pass of each text.

``--engine`` is about decoding alone: the engine, called in its own process, against `generate_text`
for one text after another.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    CLOCKS,
    MB,
    Side,
    Spread,
    add_cpu_time,
    arguments,
    machine,
    parse,
    ratio,
    show_machine,
    take_turns,
    write_json,
)

from tinygpt.config import PRESETS, GPTConfig, SampleConfig

ALPHABET = "".join(chr(33 + i) for i in range(65))
DONE = b"data: [DONE]\n\n"
SIDES = ("together", "one at a time")


@dataclass(frozen=True)
class Setting:
    """A model, the new tokens of a request, and how often a client asks in a turn."""

    model: GPTConfig
    new: int
    asks: int


SETTINGS = {
    "baby": Setting(GPTConfig(vocab_size=65, **PRESETS["baby"].model), 63, 4),
    "gpt2": Setting(GPTConfig(**PRESETS["gpt2"].model | {"vocab_size": 65}), 32, 1),
}


@dataclass
class Turn:
    """What the clients of a turn met."""

    tokens_per_second: float
    first: list[float]
    """Seconds from each request to its first token."""
    clients: list[float]
    """Seconds that each client needed for all it asked."""


@dataclass
class Client:
    """One connection, on which requests follow one another."""

    address: str
    port: int
    first: list[float] = field(default_factory=list)

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection(self.address, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def ask(self, body: dict[str, Any]) -> bytes:
        """The answer's body as it came, chunks and all."""
        start, content = time.perf_counter(), json.dumps(body).encode()
        self._writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"The server refused: {head.decode()}")
        if length := re.search(rb"(?i)content-length: (\d+)", head):
            answer = await self._reader.readexactly(int(length[1]))
            self.first.append(time.perf_counter() - start)
            return answer
        answer = await self._reader.readuntil(b"data: ")
        self.first.append(time.perf_counter() - start)
        return answer + await self._reader.readuntil(b"\r\n0\r\n\r\n")


class Served:
    """A `tinygpt serve` in a process of its own."""

    def __init__(self, name: str, checkpoint: Path, places: int, threads: int) -> None:
        command = [sys.executable, "-P", "-m", "tinygpt", "serve", str(checkpoint), "--port", "0"]
        self.name = name
        self._process = subprocess.Popen(
            [*command, "--places", str(places)],
            env=os.environ | {"TINYGPT_THREADS": str(threads), "NO_COLOR": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if found := re.search(r"at http://([\d.]+):(\d+)", line):
                self.client = partial(Client, found[1], int(found[2]))
                return
        raise SystemExit("The server did not start:\n" + "".join(said))

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def memory(self) -> int:
        """Bytes that the process holds now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found, "Linux tells"
        return int(found[1]) << 10

    async def turn(self, clients: int, asks: int, body: dict[str, Any]) -> Turn:
        """So many clients at once, each asking so often."""

        async def work(client: Client) -> float:
            async with client:
                begin = time.perf_counter()
                for _ in range(asks):
                    answer = await client.ask(body)
                    assert not body["stream"] or DONE in answer, answer[-200:]
                return time.perf_counter() - begin

        everybody = [self.client() for _ in range(clients)]
        begin = time.perf_counter()
        seconds = await asyncio.gather(*map(work, everybody))
        tokens = clients * asks * body["max_tokens"]
        first = [each for client in everybody for each in client.first]
        return Turn(tokens / (time.perf_counter() - begin), first, seconds)

    async def texts(self, bodies: Sequence[dict[str, Any]]) -> list[str]:
        """The answers to requests that arrive together."""

        async def one(body: dict[str, Any]) -> str:
            async with self.client() as client:
                answer = json.loads(await client.ask(body))
            assert answer["usage"]["completion_tokens"] == body["max_tokens"]
            text: str = answer["choices"][0]["text"]
            return text

        return await asyncio.gather(*map(one, bodies))


class Direct:
    """An engine and a decoder for the same model, without a server."""

    def __init__(self, name: str, checkpoint: Path, places: int) -> None:
        from tinygpt import load
        from tinygpt.server.engine.scheduler import Engine

        self.setting = SETTINGS[name]
        self.model, self.tokenizer = load(checkpoint)
        assert self.tokenizer is not None
        self.engine = Engine(self.model, self.tokenizer, places)
        self.engine.start()
        self.engine.warm_up().result()

    def texts_together(self, count: int, temperature: float) -> list[str]:
        from tinygpt.server.engine.sequence import Request

        config, prompt = SampleConfig(temperature=temperature), tuple(self.prompt())
        streams = [
            self.engine.submit(Request(prompt, self.setting.new, config, seed=seed))
            for seed in range(count)
        ]
        return ["".join(piece.text for piece in stream) for stream in streams]

    def texts_one_by_one(self, count: int, temperature: float) -> list[str]:
        from tinygpt.generation.stream import generate_text

        config, prompt = SampleConfig(temperature=temperature), self.tokenizer.decode(self.prompt())
        asked = (self.model.decoder, self.tokenizer, prompt, self.setting.new, config)
        work = self.engine.run(
            lambda: ["".join(generate_text(*asked, seed)) for seed in range(count)]
        )
        return work.result()

    def seconds(self, method: str, count: int, temperature: float, cpu_time: bool) -> float:
        """That this takes for each text."""
        start = CLOCKS[cpu_time]()
        getattr(self, method)(count, temperature)
        return (CLOCKS[cpu_time]() - start) / count

    def prompt(self) -> list[int]:
        return [0]


def measure_engine(options: Any, checkpoint: Path) -> list[dict[str, Any]]:
    """A row for each number of texts and temperature."""
    side = Side(Direct, options.config, checkpoint, options.places, threads=options.threads)
    new, rows = SETTINGS[options.config].new, []
    for temperature in (0.0, 0.8):
        wanted = side("texts_one_by_one", 3, temperature)
        if side("texts_together", 3, temperature) != wanted:
            raise SystemExit("the engine's texts are not those of generate_text")
        for count in options.clients:
            one, many = "texts_one_by_one", "texts_together"
            works = {
                name: partial(side, "seconds", name, n, temperature, options.cpu_time)
                for name, n in ((one, min(count, 4)), (many, count))
            }
            taken = take_turns(works, options.rounds)
            rows.append(
                {
                    "texts": count,
                    "temperature": temperature,
                    "gain": ratio(taken[one], taken[many]),
                    "together": Spread.of([new / s for s in taken[many]]),
                    "one_by_one": Spread.of([new / s for s in taken[one]]),
                }
            )
    side.close()
    return rows


def make_checkpoint(setting: Setting, folder: str) -> Path:
    """A model with random weights, large enough for its texts to differ."""
    from tinygpt import GPT
    from tinygpt.machine.transfer import read, write
    from tinygpt.text.tokenizers import CharTokenizer

    model = GPT(setting.model)
    for name, parameter in model.parameters().items():
        if name.endswith("weight") and ".ln_" not in f".{name}":
            write(parameter, read(parameter) * 5)
    return model.save_checkpoint(0, folder=folder, tokenizer=CharTokenizer(ALPHABET))


def check(setting: Setting, checkpoint: Path, servers: Sequence[Served]) -> None:
    """Raise SystemExit unless every server's texts are those of generate_text."""
    from tinygpt import load
    from tinygpt.generation.stream import generate_text

    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    bodies = [
        {
            "prompt": ALPHABET[: 1 + seed % 7],
            "max_tokens": setting.new + seed % 5,
            "temperature": seed % 3 / 2,
            "seed": seed,
            "stream": False,
        }
        for seed in range(12)
    ]
    wanted = []
    for body in bodies:
        config = SampleConfig(temperature=body["temperature"])
        asked = (body["prompt"], body["max_tokens"], config, body["seed"])
        wanted.append("".join(generate_text(model.decoder, tokenizer, *asked)))
    for server in servers:
        if asyncio.run(server.texts(bodies)) != wanted:
            raise SystemExit(f"{server.name}: the texts are not those of generate_text")


def measure(options: Any, servers: dict[str, Served], setting: Setting) -> list[dict[str, Any]]:
    """A row for each number of clients."""
    rows = []
    body = {
        "prompt": ALPHABET[0],
        "max_tokens": setting.new,
        "temperature": 0,
        "stream": not options.whole,
    }
    for clients in options.clients:
        asks = max(setting.asks, 2 * setting.asks // clients)
        turns: dict[str, list[Turn]] = {name: [] for name in servers}

        def one_turn(name: str, clients: int = clients, asks: int = asks) -> float:
            turn = run(servers[name].turn(clients, asks, body))
            turns[name].append(turn)  # noqa: B023  # called within this very iteration
            return turn.tokens_per_second

        for name in servers:  # what is made on first use is there
            run(servers[name].turn(clients, 1, body))
        taken = take_turns({name: partial(one_turn, name) for name in servers}, options.rounds)
        sides = {name: summary(taken[name], turns[name]) for name in servers}
        rows.append({"clients": clients, "gain": ratio(*(taken[n] for n in SIDES)), "sides": sides})
    return rows


def summary(speeds: Sequence[float], turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "tokens_per_second": Spread.of(speeds),
        "first_token_ms": Spread.of([1e3 * each for turn in turns for each in turn.first]),
        "worst_first_token_ms": 1e3 * max(each for turn in turns for each in turn.first),
        "slowest_client": Spread.of(  # against the middle one of its turn
            [max(turn.clients) / statistics.median(turn.clients) for turn in turns]
        ),
    }


def memory(server: Served, requests: int) -> dict[str, float]:
    """Megabytes before, after a tenth, and after all of so many requests of four tokens."""
    body = {"prompt": ALPHABET[0], "max_tokens": 4, "temperature": 0.8, "stream": False}
    clients, held = 16, [server.memory()]
    for count in (requests // 10, requests - requests // 10):
        run(server.turn(clients, count // clients, body))
        held.append(server.memory())
    return dict(zip(("before", "a_tenth", "all"), [n / MB for n in held], strict=True))


def score_body(prompt: str) -> dict[str, Any]:
    """What lm-evaluation-harness sends for a text."""
    return {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0,
            "seed": 1234, "stream": False}  # fmt: skip


def texts_to_score(count: int) -> list[str]:
    """Texts of many lengths, from two characters to 60."""
    return [(ALPHABET[i % 65 :] + ALPHABET)[: 2 + 17 * i % 59] for i in range(count)]


def check_scores(checkpoint: Path, server: Served) -> None:
    """Raise SystemExit unless scores of texts that arrive together are the forward pass's."""
    import numpy as np
    from tinygrad import Tensor

    from tinygpt import load
    from tinygpt.generation.sample import log_probabilities

    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    prompts = texts_to_score(12)

    async def answers() -> list[bytes]:
        async def one(prompt: str) -> bytes:
            async with server.client() as client:
                return await client.ask(score_body(prompt))

        return await asyncio.gather(*map(one, prompts))

    for prompt, answer in zip(prompts, asyncio.run(answers()), strict=True):
        ids = tokenizer.encode(prompt)
        rows = model(Tensor([ids], dtype="int32"))[0].numpy()
        wanted = [log_probabilities(row)[i] for row, i in zip(rows, ids[1:], strict=False)]
        told = json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"]
        if len(told) != len(ids) + 1 or not np.allclose(told[1:-1], wanted, atol=1e-3):
            raise SystemExit(f"the scores of {prompt!r} are not those of a forward pass")


def measure_scores(options: Any, checkpoint: Path) -> dict[str, Any]:
    """Requests a second of so many scorers, and seconds of a stream beside them and alone."""
    server = Served("scores", checkpoint, options.places, options.threads)
    stream = {"prompt": ALPHABET[0], "max_tokens": 150, "temperature": 0, "stream": True}
    bodies = [score_body(text) for text in texts_to_score(59)]

    async def requests_per_second() -> float:
        asks, everybody = 4, [server.client() for _ in range(options.scorers)]

        async def work(number: int, client: Client) -> None:
            async with client:
                for i in range(asks):
                    await client.ask(bodies[(number + 7 * i) % len(bodies)])

        begin = time.perf_counter()
        await asyncio.gather(*(work(i, client) for i, client in enumerate(everybody)))
        return asks * options.scorers / (time.perf_counter() - begin)

    async def stream_seconds(scorers: int) -> float:
        over = asyncio.Event()

        async def score(number: int) -> None:
            async with server.client() as client:
                while not over.is_set():
                    number += 1
                    await client.ask(bodies[number % len(bodies)])

        work = [asyncio.create_task(score(7 * i)) for i in range(scorers)]
        await asyncio.sleep(0.3 if scorers else 0)
        async with server.client() as client:
            begin = time.perf_counter()
            answer = await client.ask(stream)
            seconds = time.perf_counter() - begin
        assert DONE in answer
        over.set()
        await asyncio.gather(*work)
        return seconds

    try:
        check_scores(checkpoint, server)
        works = {
            "rate": lambda: asyncio.run(requests_per_second()),
            "alone": lambda: asyncio.run(stream_seconds(0)),
            "beside": lambda: asyncio.run(stream_seconds(options.scorers)),
        }
        for work in works.values():  # what is made on first use is there
            work()
        taken = take_turns(works, options.rounds)
    finally:
        server.close()
    return {
        "scorers": options.scorers,
        "requests_per_second": Spread.of(taken["rate"]),
        "alone_ms": Spread.of([1e3 * each for each in taken["alone"]]),
        "beside_ms": Spread.of([1e3 * each for each in taken["beside"]]),
        "slowdown": ratio(taken["beside"], taken["alone"]),
    }


def show_scores(row: dict[str, Any]) -> None:
    print(
        f"{row['scorers']} scorers: {row['requests_per_second'].show('.0f')} requests/s; a stream "
        f"of 150 tokens takes {row['beside_ms'].show('.0f')} ms beside them, "
        f"{row['alone_ms'].show('.0f')} alone: {row['slowdown'].show()} times as long"
    )


def run(work: Coroutine[Any, Any, Turn]) -> Turn:
    return asyncio.run(work)


def measure_served(
    options: Any, checkpoint: Path, setting: Setting
) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """The rows, and what is known of memory."""
    places = dict(zip(SIDES, (options.places, 1), strict=True))
    servers = {n: Served(n, checkpoint, p, options.threads) for n, p in places.items()}
    try:
        check(setting, checkpoint, list(servers.values()))
        rows = measure(options, servers, setting)
        return rows, memory(servers[SIDES[0]], options.memory) if options.memory else None
    finally:
        for server in servers.values():
            server.close()


def show_served(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['clients']} client(s): {row['gain'].show()} times the tokens of one at a time")
        for name, side in row["sides"].items():
            print(
                f"  {name:14} {side['tokens_per_second'].show('.0f')} tokens/s   first token "
                f"{side['first_token_ms'].show('.1f')} ms, at worst "
                f"{side['worst_first_token_ms']:.0f}   slowest client "
                f"{side['slowest_client'].show()} x the middle one"
            )


def show_engine(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['texts']} text(s), temperature {row['temperature']}: "
            f"{row['together'].show('.0f')} tokens/s   one by one "
            f"{row['one_by_one'].show('.0f')}   gain {row['gain'].show()}"
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", choices=SETTINGS, default="baby")
    parser.add_argument(
        "--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64]
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--places", type=int, default=16, help="texts decoded together")
    parser.add_argument("--whole", action="store_true", help="answers in one piece, no streams")
    parser.add_argument("--memory", type=int, metavar="REQUESTS", help="as many short ones")
    parser.add_argument("--engine", action="store_true", help="decoding alone, without HTTP")
    parser.add_argument("--score", action="store_true", help="log probabilities of prompts")
    parser.add_argument("--scorers", type=int, default=30, help="clients that ask for scores")
    add_cpu_time(parser)
    options = parse(parser)
    where, setting = machine(), SETTINGS[options.config]
    show_machine(where, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(setting, folder)
        if options.score:
            rows, kept = [measure_scores(options, checkpoint)], None
        elif options.engine:
            rows, kept = measure_engine(options, checkpoint), None
        else:
            rows, kept = measure_served(options, checkpoint, setting)
    if options.score:
        show_scores(rows[0])
    else:
        print(f"{options.config}: {setting.new} tokens for each request, {options.places} places")
        (show_engine if options.engine else show_served)(rows)
    if kept:
        print(f"memory over {options.memory} requests: " + ", ".join(
            f"{name} {value:.1f} MB" for name, value in kept.items()
        ))  # fmt: skip
    result = {"benchmark": "serve", "machine": where, "config": options.config, "rows": rows}
    write_json(
        options.json,
        result | {"threads": options.threads, "setting": asdict(setting), "memory_mb": kept},
    )


if __name__ == "__main__":
    main()
