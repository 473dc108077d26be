"""Whatever may be called in a loop keeps nothing of a call: no UOps, no memory of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import Context, GlobalCounters
from tinygrad.uop.ops import UOpMetaClass

from tinygpt import GPT, ByteTokenizer, GPTConfig, kernels
from tinygpt.generation.batching import BatchDecoder
from tinygpt.server.engine import scoring
from tinygpt.server.playground import introspection
from tinygpt.training import evaluation

CONFIG = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=32, dropout=0.1)
IDS = np.arange(32, dtype=np.int32).reshape(2, 16)
CALLS = 2


@pytest.fixture(scope="module", autouse=True)
def only_what_is_new_is_counted() -> Iterator[None]:
    """Objects of the tests before are left out: to go through them takes a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
decoding = cache(partial(BatchDecoder, places=1))


def look(model: GPT) -> None:
    looking(model).weights([1, 2, 3], 0, 3)


def score(model: GPT) -> None:
    assert list(scoring.score_texts(decoding(model), [([1, 2, 3], 2)], 256))


def evaluate(model: GPT) -> None:
    evaluation.measure(model, IDS.reshape(-1), ByteTokenizer(), batch_size=1)


@pytest.mark.parametrize(
    "call",
    [
        *(forward, forward_unrealized, forward_in_training, forward_plain, gradients),
        *(gradients_of_logits, generate, look, score, evaluate),
    ],
)
def test_memory_is_flat(model: GPT, call: Callable[[GPT], None]) -> None:
    found = []
    for _ in range(2):
        for _ in range(CALLS):
            call(model)
        gc.collect()
        found.append((len(UOpMetaClass.ucache), GlobalCounters.mem_used, len(gc.get_objects())))
    for what, before, after in zip(("UOps", "bytes", "objects"), *found, strict=True):
        assert after <= before + (10 if what == "objects" else 0), what
