"""Whatever may be called in a loop keeps nothing of a call: no UOps, no memory of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import Context, GlobalCounters
from tinygrad.tensor import all_tensors
from tinygrad.uop.ops import UOpMetaClass

from tinygpt import GPT, ByteTokenizer, GPTConfig, SampleConfig, kernels
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.stream import generate_text
from tinygpt.machine.resources import memory
from tinygpt.server.engine import scoring
from tinygpt.server.playground import introspection
from tinygpt.training import evaluation

CONFIG = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=32, dropout=0.1)
IDS = np.arange(32, dtype=np.int32).reshape(2, 16)
CALLS, MANY = 2, 500
LEAK = 1 << 16
"""Bytes a call of resident memory; the allocator's own growth is far below."""


pytestmark = pytest.mark.usefixtures("only_what_is_new_is_counted")


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(CONFIG).eval()


def forward(model: GPT) -> None:
    model(Tensor(IDS)).realize()


def forward_unrealized(model: GPT) -> None:
    model(Tensor(IDS))


def forward_in_training(model: GPT) -> None:
    with Context(TRAINING=1):
        model(Tensor(IDS)).realize()


def forward_plain(model: GPT) -> None:
    with kernels.plain():
        model(Tensor(IDS)).realize()


def gradients(model: GPT) -> None:
    loss = model.loss(Tensor(IDS), Tensor(IDS))
    Tensor.realize(loss, *loss.gradient(*model.parameters().values()))


def gradients_of_logits(model: GPT) -> None:
    logits = model(Tensor(IDS))
    loss = kernels.cross_entropy(logits.reshape(-1, 256), Tensor(IDS.reshape(-1)))
    Tensor.realize(loss, *loss.gradient(*model.parameters().values()))


def generate(model: GPT) -> None:
    model.generate(Tensor(IDS[:, :15]), max_tokens=3)


looking = cache(introspection.AttentionLook)
decoding = cache(Decoder)


def look(model: GPT) -> None:
    looking(model).weights([1, 2, 3], 0, 3)


def score(model: GPT) -> None:
    assert list(scoring.score_texts(decoding(model), [([1, 2, 3], 2)], 256))


def evaluate(model: GPT) -> None:
    evaluation.measure(model, IDS.reshape(-1), ByteTokenizer(), batch_size=1)


def write(model: GPT) -> None:
    "".join(generate_text(model.decoder, ByteTokenizer(), "a", 3))


def next_token(model: GPT) -> None:
    introspection.next_token(model.decoder, (1, 2, 3), SampleConfig(), 256)


CALLED = [
    *(forward, forward_unrealized, forward_in_training, forward_plain, gradients),
    *(gradients_of_logits, generate, write, next_token, look, score, evaluate),
]


def counted(model: GPT, call: Callable[[GPT], None], calls: int) -> dict[str, int]:
    """What there is after so many calls."""
    for _ in range(calls):
        call(model)
    gc.collect()
    return {
        "UOps": len(UOpMetaClass.ucache),
        "bytes": GlobalCounters.mem_used,
        "objects": len(gc.get_objects()),
    }


def check_flat(before: dict[str, int], after: dict[str, int]) -> None:
    for what in before:
        assert after[what] <= before[what] + (10 if what == "objects" else 0), what


@pytest.mark.parametrize("call", CALLED)
def test_memory_is_flat(model: GPT, call: Callable[[GPT], None]) -> None:
    check_flat(counted(model, call, CALLS), counted(model, call, CALLS))


def test_a_decoder_that_ends_leaves_nothing_in_tinygrads_list_of_tensors(model: GPT) -> None:
    def ended() -> int:
        gc.collect()
        return sum(entry() is None for entry in all_tensors)

    before = ended()
    "".join(generate_text(model, ByteTokenizer(), "a", 3))
    assert ended() <= before


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLED)
def test_memory_is_flat_over_500_calls(model: GPT, call: Callable[[GPT], None]) -> None:
    before, resident = counted(model, call, CALLS), memory()
    after, grown = counted(model, call, MANY), memory() - resident
    print(call.__name__, before, after, f"{grown / 2**20:.1f} MB")  # for pytest -s
    check_flat(before, after)
    assert grown < MANY * LEAK
