"""llama.cpp's own server with our exports: the same prompts, the same answers, the same ends.

It needs llama-server: on the PATH, or named by TINYGPT_LLAMA_SERVER.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import until
from tests.test_chat_template import conversations, dressed
from tinygpt import GPT, GPTConfig, TrainConfig
from tinygpt.api import train
from tinygpt.interop.gguf.gguf_file import export
from tinygpt.text.chat.template import TEMPLATES
from tinygpt.text.tokenizers import BaseTokenizer

pytestmark = pytest.mark.slow
WAIT = 60
"""Seconds for an answer, which takes milliseconds."""


@contextlib.contextmanager
def serving(path: Path, window: int) -> Iterator[str]:
    """The address of a llama-server with this model."""
    program = os.environ.get("TINYGPT_LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        pytest.skip("llama-server is not installed, and TINYGPT_LLAMA_SERVER names none")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", path, "--host", "127.0.0.1", "--port", port, "--jinja"]
    command += ["-t", 1, "-c", window, "--no-warmup"]
    address, log = f"http://127.0.0.1:{port}", path.with_suffix(".log")
    with log.open("wb") as file:
        started = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
    try:
        until(lambda: started.poll() is not None or is_up(address))
        assert started.poll() is None, log.read_text(errors="replace")[-2000:]
        yield address
    finally:
        started.kill()
        started.wait()


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=WAIT) as answer:
            return bool(answer.status == 200)
    except OSError:  # not yet
        return False


def post(address: str, **body: Any) -> Any:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gpt2"])
def test_its_jinja_and_its_tokenizer_make_our_ids_of_200_conversations(
    kind: str, name: str, tmp_path: Path
) -> None:
    tokenizer, template = dressed(kind, name), TEMPLATES[name]
    shape = GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size + 1, n_layer=1, n_head=1,
                      n_embd=32)  # fmt: skip
    path = export(GPT(shape), tokenizer, tmp_path / "m.gguf").path
    with serving(path, 64) as address:
        for talk in conversations(200, seed=7):
            asked = [*talk, {"role": "user", "content": "And <|user|> now?"}]
            prompt = post(f"{address}/apply-template", messages=asked)["prompt"]
            told = post(f"{address}/tokenize", content=prompt, parse_special=True)
            assert told["tokens"] == template.render(tokenizer, asked, answer=True).ids.tolist()


TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.mark.parametrize("name", ["marked", "plain"])
def test_it_answers_and_ends_as_we_do(name: str, tmp_path: Path) -> None:
    tokenizer: BaseTokenizer = dressed("byte", name)
    ids = TEMPLATES[name].render(tokenizer, TALK).ids.tolist()
    shape = GPTConfig(block_size=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4,
                      n_embd=64)  # fmt: skip
    model = GPT(shape, seed=1)
    recipe = TrainConfig(
        max_iters=250, batch_size=2, learning_rate=4e-3, warmup_steps=10, eval_interval=1000
    )
    train(model, recipe, ids * 60, show=False)
    path = export(model.eval(), tokenizer, tmp_path / "m.gguf").path
    with serving(path, 128) as address:
        for asked in (TALK[:1], TALK[:3]):
            answer = "".join(model.chat(asked, tokenizer, 40, temperature=0))
            told = post(f"{address}/v1/chat/completions", messages=asked, max_tokens=40,
                        temperature=0, stop=TEMPLATES[name].stop_strings)  # fmt: skip
            [choice] = told["choices"]
            assert choice["finish_reason"] == "stop" and answer
            assert choice["message"]["content"].strip() == answer
