"""Checks that a page's module computes what the model computes, before the page is written.

The module runs in node, where the page's own JavaScript feeds it, or else in wasmtime.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinygpt import pages
from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.errors import InteropError, extras
from tinygpt.files.strict_json import to_json
from tinygpt.generation import decoder
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.interop.hf.layout import fetch_from
from tinygpt.interop.parity import compare, fixed_prompt, our_logits, rounding_error
from tinygpt.interop.web.payload import Chunk, values
from tinygpt.model.transformer import Transformer

Logits = npt.NDArray[np.float32]

GREEDY = 100
"""Tokens that the module and the model have to choose alike."""
CHECK = pages.FOLDER / "local" / "check.mjs"


class Ran(NamedTuple):
    """The results of a module for a prompt."""

    by_steps: Logits
    """(T, V), a token at a time."""
    at_once: Logits
    """(V,), of the last position."""
    ids: list[int]
    """The prompt and what greedily follows."""
    where: str


def check(model: Transformer, module: bytes, chunks: Sequence[Chunk], node: bool = True) -> float:
    """The largest difference of a logit; ``model`` has the weights that the page will compute with.

    Raises InteropError if it is above the tolerance, or if greedy texts part where no tie excuses
    it; MissingExtraError if there is nothing to run the module in.
    """
    prompt = fixed_prompt(model.config)
    ours = our_logits(model, prompt)
    run = _node if node and shutil.which("node") else _wasmtime
    ran = run(module, chunks, model.config, prompt[0].tolist())
    both = np.concatenate([ours, ours[-1:]])
    theirs = np.concatenate([ran.by_steps, ran.at_once[None]])
    rounding = partial(rounding_error, fetch_from(model), model.config, prompt)
    found = compare(both, theirs, f"The page's module in {ran.where}", rounding)
    _compare_greedy(model, prompt, ran.ids, found.allowed)
    return found.difference


def _compare_greedy(
    model: Transformer, prompt: npt.NDArray[np.int32], theirs: list[int], tie: float
) -> None:
    """InteropError where the texts part, unless the two logits lie within ``tie`` there."""
    decode, ids = Decoder(model), prompt[0].tolist()
    for (token,) in generate_tokens(decode, prompt, GREEDY, SampleConfig(temperature=0)):
        other = theirs[len(ids)]
        if token != other:
            [row] = decode.next_logits([decoder.Sequence(ids)])
            if abs(row[token] - row[other]) <= tie:
                return  # a tie, which rounding may decide either way; what follows differs rightly
            raise InteropError(
                f"The page would write another text: its token {len(ids)} is {other}, the model's "
                f"{token}. Nothing was written."
            )
        ids.append(int(token))


# Two places to run it ---------------------------------------------------------------------------


def _node(module: bytes, chunks: Sequence[Chunk], config: GPTConfig, prompt: list[int]) -> Ran:
    with tempfile.TemporaryDirectory(prefix="tinygpt-") as name:
        folder = Path(name)
        (folder / "module").write_bytes(module)
        places, at = [], 0
        with (folder / "weights").open("wb") as file:
            for chunk in chunks:
                place = {"kind": chunk.kind, "at": chunk.at, "columns": chunk.columns}
                places.append({**place, "from": at, "to": at + len(chunk.data)})
                at += file.write(chunk.data)
        given = {
            **{part: str(folder / part) for part in ("module", "weights", "out")},
            "config": config.to_dict(),
            "chunks": places,
            "prompt": prompt,
            "count": GREEDY,
        }
        done = subprocess.run(
            ["node", str(CHECK)], input=to_json(given).encode(), capture_output=True, check=False
        )
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()[-300:]
            raise InteropError(f"The page's module does not run in node: {reason}")
        values = np.fromfile(folder / "out", "<f4").reshape(len(prompt) + 1, config.vocab_size)
        return Ran(values[:-1], values[-1], json.loads(done.stdout), "node")


def _wasmtime(module: bytes, chunks: Sequence[Chunk], config: GPTConfig, prompt: list[int]) -> Ran:
    running = _Running(module, config)
    for chunk in chunks:
        running.put(chunk)
    rows = [running.step(token, position) for position, token in enumerate(prompt)]
    ids = list(prompt)
    at_once = running.window(ids)
    logits = at_once
    for _ in range(GREEDY):
        ids.append(int(logits.argmax()))
        if len(ids) <= config.block_size:
            logits = running.step(ids[-1], len(ids) - 1)
        else:
            logits = running.window(ids[-config.block_size :])
    return Ran(np.stack(rows), at_once, ids, "wasmtime")


class _Running:
    """A module in wasmtime."""

    def __init__(self, module: bytes, config: GPTConfig) -> None:
        wasmtime = extras.need("web", "Checking a page where there is no node", "wasmtime")
        self._config = config
        self._store: Any = wasmtime.Store()
        instance = wasmtime.Instance(
            self._store, wasmtime.Module(self._store.engine, module), []
        ).exports(self._store)
        self._exports: Any = instance
        self._memory: Any = instance["memory"]

    def put(self, chunk: Chunk) -> None:
        self._write(self._call("weights") + 4 * chunk.at, values(chunk))

    def step(self, token: int, position: int) -> Logits:
        self._write(self._call("ids"), np.array([token], "<i4"))
        self._call("step", position)
        return self._logits()

    def window(self, ids: Sequence[int]) -> Logits:
        padded = np.zeros(self._config.block_size, "<i4")
        padded[: len(ids)] = ids
        self._write(self._call("ids"), padded)
        self._call("window", len(ids) - 1)
        return self._logits()

    def _call(self, name: str, *given: int) -> int:
        result = self._exports[name](self._store, *given)
        return 0 if result is None else int(result)

    def _write(self, at: int, values: npt.NDArray[Any]) -> None:
        self._memory.write(self._store, values.tobytes(), at)

    def _logits(self) -> Logits:
        at = self._call("logits")
        data = self._memory.read(self._store, at, at + 4 * self._config.vocab_size)
        return np.frombuffer(bytes(data), "<f4")
