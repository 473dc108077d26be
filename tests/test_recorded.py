"""Captured functions on disk: the bits of the capture, and refused where anything changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Context, Device, Tensor

from tinygpt import GPT, GPTConfig, TrainConfig
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.decoder import Sequence as Text
from tinygpt.kernels import use
from tinygpt.machine import disk_cache
from tinygpt.machine.disk_cache import ENDING, KernelCache
from tinygpt.machine.jit import Capture, Jitted, jit
from tinygpt.machine.pool import recorded
from tinygpt.machine.pool.recorded import Kept
from tinygpt.machine.tinygrad_internals import helpers
from tinygpt.model.transformer import Transformer, description
from tinygpt.training.optim import make_optimizer
from tinygpt.training.step import make_evaluate, make_train_step

pytestmark = pytest.mark.skipif(
    Device.DEFAULT != "CPU" or Device["CPU"].graph is None, reason="the pool runs kernels"
)

CONFIG = GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Recordings are on, and lie here."""
    cache, own, before = KernelCache(tmp_path), helpers.diskcache_get, helpers.diskcache_put

    def get(table: str, key: object) -> object:
        return cache.get(table, key) if table == recorded.TABLE else own(table, key)

    def put(table: str, key: object, value: object) -> object:
        return (
            cache.put(table, key, value) if table == recorded.TABLE else before(table, key, value)
        )

    get.__module__ = disk_cache.__name__
    monkeypatch.setattr(helpers, "diskcache_get", get)
    monkeypatch.setattr(helpers, "diskcache_put", put)
    monkeypatch.delenv(recorded.SWITCH)
    recorded._sources.cache_clear()
    monkeypatch.setattr(recorded, "STARTED", float("inf"))
    yield tmp_path
    recorded._sources.cache_clear()


def captures(function: object) -> list[Capture]:
    assert isinstance(function, Jitted)
    return list(function.captures.values())


def was_traced(function: object) -> list[bool]:
    return [capture.kernels.captured is not None for capture in captures(function)]


def written(decoder: Decoder) -> list[np.ndarray]:
    """Logits of a prompt, of steps one by one and together, and beyond the context."""
    one, two = Text([1, 2, 3]), Text(range(9))
    found = [decoder.next_logits([one]), decoder.next_logits([two])]
    for token in range(10):
        one.ids.append(token)
        two.ids.append(10 - token)
        found += decoder.next_logits([one]), decoder.next_logits([one, two])
    return found


def test_a_recording_gives_the_bits_of_the_capture(folder: Path) -> None:
    first, second = (GPT(CONFIG, seed=seed).eval() for seed in (1, 2))
    captured = Decoder(first, slots=2)
    expected = written(captured)
    assert was_traced(captured._passes.step) == [True, True]
    assert len(list(folder.glob(f"*{ENDING}"))) == 4  # prefill, a step of 1 and of 2, the window

    replayed = Decoder(second, slots=2)
    other = written(replayed)
    functions = replayed._passes.prefill, replayed._passes.step, replayed._passes.window
    assert not any(traced for function in functions for traced in was_traced(function))
    assert not np.array_equal(expected[0], other[0])  # the weights are the second model's own
    for name, weight in second.parameters().items():
        weight.assign(first.parameters()[name]).realize()
    again = written(Decoder(second, slots=2))
    for a, b in zip(expected, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_recording_is_made_again(folder: Path) -> None:
    model = GPT(CONFIG).eval()
    expected = Decoder(model).next_logits([Text([1, 2, 3])])
    [entry] = folder.glob(f"*{ENDING}")
    whole = entry.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        entry.write_bytes(broken)
        decoder = Decoder(model)
        np.testing.assert_array_equal(decoder.next_logits([Text([1, 2, 3])]), expected)
        assert was_traced(decoder._passes.prefill) == [True]
        assert entry.read_bytes() == whole


def name(about: str | None = "f", state: Sequence[Tensor] = (), short: bool = True) -> str | None:
    kept = Kept(lambda: about, lambda: state)
    return recorded.name_of(kept, "f", [Tensor.empty(2, 3)], short)


def test_whatever_changes_a_function_changes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name(), name("g"), name(short=False), name(state=[Tensor.empty(2)])]
    names.append(name(state=[Tensor.empty(2, dtype="int32")]))
    with Context(NOOPT=1):
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setenv("TINYGPT_STRICT", "1")
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(recorded.pool, "threads", lambda: 77)
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "ROOMS", ("config",))  # other source
        recorded._sources.cache_clear()
        names.append(name())
    recorded._sources.cache_clear()
    assert None not in names and len(set(names)) == len(names)
    assert name() == names[0]


def test_nothing_is_kept_where_its_name_might_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    assert name() is not None
    assert name(None) is None
    assert name(state=[Tensor.ones(3)]) is None  # no buffer of its own
    with Context(DEBUG=2):
        assert name() is None
    with monkeypatch.context() as patch:
        patch.setenv(recorded.SWITCH, "0")
        assert name() is None
    recorded._sources.cache_clear()
    monkeypatch.setattr(recorded, "STARTED", 0.0)  # all source was changed after that
    assert name() is None


def test_a_function_that_reads_what_it_does_not_name_is_not_kept(folder: Path) -> None:
    hidden, named = (Tensor([1.0, 2.0, 3.0]).contiguous().realize() for _ in range(2))

    def add(x: Tensor) -> Tensor:
        return (x * 2).contiguous() + hidden + named

    for state, entries in (([named], 0), ([named, hidden], 1)):
        function = jit(add, short=True, kept=Kept(lambda: "add", lambda s=state: s))
        assert function([1.0, 1.0, 1.0]).tolist() == [4.0, 6.0, 8.0]
        assert len(list(folder.glob(f"*{ENDING}"))) == entries
    again = jit(add, short=True, kept=Kept(lambda: "add", lambda: [named, hidden]))
    assert again([0.0, 1.0, 2.0]).tolist() == [2.0, 6.0, 10.0]
    assert was_traced(again) == [False]


class Louder(GPT):
    """A model of a user's."""


def test_a_description_holds_all_that_a_forward_pass_looks_at() -> None:
    model = GPT(CONFIG)
    told = {description(model)}
    model.cast("bfloat16")
    told.add(description(model))
    told.add(description(GPT(CONFIG).quantize()))
    told.add(description(GPT(GPTConfig(**CONFIG.to_dict() | {"attention": "plain"}))))
    assert len(told) == 4 and None not in told
    assert description(Louder(CONFIG)) is None
    model = GPT(CONFIG)
    model.h[0].mlp.__call__ = lambda x: x  # type: ignore[method-assign]
    assert description(model) is None


def test_a_block_of_plain_formulas_has_recordings_of_its_own(folder: Path) -> None:
    model = GPT(CONFIG).eval()
    fast = Decoder(model).next_logits([Text([1, 2])])
    with use("plain"):
        decoder = Decoder(model)
        plain = decoder.next_logits([Text([1, 2])])
    assert was_traced(decoder._passes.prefill) == [True]
    np.testing.assert_allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_recorded_step_of_training_gives_the_bits_of_the_capture(
    optimizer: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []
    loss = Transformer.loss
    monkeypatch.setattr(Transformer, "loss", lambda *a, **k: (traced.append(1), loss(*a, **k))[1])
    config = TrainConfig(optimizer=optimizer, batch_size=2, max_iters=9)
    x = np.random.default_rng(0).integers(0, 11, (1, 2, 16), np.int32)

    def learned(clip: float = 1.0) -> list[object]:
        model = GPT(GPTConfig(**CONFIG.to_dict() | {"dropout": 0.25}))
        used = replace(config, grad_clip=clip)
        step = make_train_step(model, make_optimizer(model.parameters(), used), used)
        evaluate = make_evaluate(model)
        found: list[object] = [step(x, x, 1e-2, (7, i)) for i in range(3)]
        found.append(step(x, x, 1e-2, (7, 3), (0.0, math.inf)))  # it changes nothing
        found.append(evaluate(x[0], x[0]))
        return found + [p.numpy().tobytes() for p in model.parameters().values()]

    expected = learned()
    assert len(traced) == len(list(folder.glob(f"*{ENDING}"))) == 2  # the step and the evaluation
    assert learned() == expected
    assert len(traced) == 2
    assert learned(0.5) != expected
    assert len(traced) == 3  # another step; the evaluation is the same


def test_a_function_that_gives_its_state_another_buffer_is_not_kept(folder: Path) -> None:
    state = Tensor([1.0, 2.0]).contiguous().realize()

    def move(x: Tensor) -> Tensor:
        state.replace((state + x).contiguous())
        return (state * 2).contiguous().realize(state)

    function = jit(move, short=True, kept=Kept(lambda: "move", lambda: [state]))
    assert function([1.0, 1.0]).tolist() == [4.0, 6.0]
    assert not list(folder.glob(f"*{ENDING}"))
