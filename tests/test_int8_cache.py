"""An int8 cache of keys and values: what it holds, what it costs, what it takes."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.test_attention import RENDERERS, THREAD, render
from tests.test_generate import with_strong_weights
from tinygpt import kernels
from tinygpt.config import GPTConfig
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.kernels.attention.rows import Cache, decode_rows, keep_rows
from tinygpt.model.cache import KVCache, cache_bytes
from tinygpt.model.half import halve
from tinygpt.model.transformer import Transformer

CONFIG = GPTConfig(block_size=24, vocab_size=29, n_layer=2, n_head=2, n_embd=16)
RNG = np.random.default_rng(0)


def model_with(kind: object) -> Transformer:
    model = with_strong_weights(Transformer(CONFIG)).eval()
    model.cache_type = kind
    return model


def emptied(P: int, H: int, T: int, D: int) -> list[Tensor]:
    """An int8 cache: keys, values, and the scales of both."""
    kinds = [(dtypes.int8, D)] * 2 + [(dtypes.float32, 1)] * 2
    return [Tensor.zeros(P, H, T, n, dtype=k).contiguous().realize() for k, n in kinds]


@pytest.mark.parametrize("plain", [False, True])
def test_a_vector_is_off_by_half_a_scale_at_most(plain: bool) -> None:
    P, H, T, D, n = 3, 2, 12, 20, 7
    qkv = (RNG.standard_normal((n, 3 * H * D)) * 5).astype(np.float32)
    qkv[3] = 0  # the scale is then 0, and so is what is read
    keys, values, *scales = emptied(P, H, T, D)
    with kernels.use("plain" if plain else "auto"):
        slot = Tensor([1], dtype=dtypes.int32)
        Tensor.realize(*kernels.keep(Tensor(qkv).realize(), keys, values, slot, scales))
    for part, (q, scale) in enumerate(zip((keys, values), scales, strict=True), start=1):
        wanted = qkv.reshape(n, 3, H, D)[:, part].transpose(1, 0, 2)
        whole, factor = q.numpy()[1, :, :n], scale.numpy()[1, :, :n]
        np.testing.assert_allclose(factor[..., 0], np.abs(wanted).max(-1) / 127, rtol=1e-6)
        assert (np.abs(whole * factor - wanted) <= factor * 0.5001 + 1e-12).all()
        assert np.abs(whole).max() == 127
        others = np.delete(q.numpy(), 1, 0)
        assert not others.any() and not q.numpy()[1, :, n:].any()


def test_a_step_writes_what_a_prompt_writes_and_equals_its_twin() -> None:
    P, H, T, D = 3, 2, 70, 24
    qkv = RNG.standard_normal((5, 3 * H * D)).astype(np.float32)
    prompt, step, twin = (emptied(P, H, T, D) for _ in range(3))

    def row(cache: list[Tensor], at: int) -> np.ndarray:
        given = (Tensor(qkv[at][None]), *cache[:2], *(Tensor([i], dtype="int32") for i in (2, at)))
        found: np.ndarray = kernels.rows_attention(*given, cache[2:]).realize().numpy()
        return found

    Tensor.realize(*kernels.keep(Tensor(qkv), *prompt[:2], Tensor([2], dtype="int32"), prompt[2:]))
    for at in range(5):
        fast = row(step, at)
        with kernels.plain():
            np.testing.assert_allclose(fast, row(twin, at), atol=2e-6)
    for one, two, three in zip(prompt, step, twin, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
        np.testing.assert_allclose(two.numpy(), three.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", RENDERERS)
def test_the_kernels_can_be_written_for_gpus(name: str) -> None:
    sizes, cache, vectors = {"s": Cache(2, 3, 2, 40, 16, int8=True)}, 3 * 2 * 40 * 16, 3 * 2 * 40
    for kernel, outputs, lengths in (
        (decode_rows, 5, (64, cache, cache, vectors, vectors, 192, 1, 1)),
        (keep_rows, 4, (cache, cache, vectors, vectors, 192, 1)),
    ):
        source = render(name, kernel, outputs, lengths, sizes)
        assert THREAD[name] in source
        assert "long" not in source and "i64" not in source


def test_a_decoder_is_near_the_float_cache_and_bitwise_itself_in_a_batch() -> None:
    ids = [int(i) for i in RNG.integers(0, 29, 20)]
    exact, rounded = (decoded(Decoder(model_with(kind)), [ids])[0] for kind in (None, dtypes.int8))
    assert 0 < np.abs(exact - rounded).max() < 0.03 * np.abs(exact).max()
    together = decoded(Decoder(model_with(dtypes.int8), 3), [ids[::-1], ids, [*ids[3:], 1, 2, 3]])
    np.testing.assert_array_equal(together[1], rounded)


def decoded(decoder: Decoder, texts: list[list[int]]) -> list[np.ndarray]:
    """For each text the logits behind each token from the second on, one step after another."""
    sequences = [Sequence(ids[:1]) for ids in texts]
    decoder.next_logits(sequences)
    found = []
    for at in range(1, len(texts[0])):
        for sequence, ids in zip(sequences, texts, strict=True):
            sequence.ids.append(ids[at])
        found.append(decoder.next_logits(sequences))
    return list(np.stack(found, 1))


def test_bfloat16_weights_go_with_an_int8_cache() -> None:
    model = halve(model_with(dtypes.int8), "bfloat16")
    found = decoded(Decoder(model), [[1, 2, 3, 4, 5]])[0]
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", [dtypes.float32, dtypes.bfloat16, dtypes.int8])
def test_the_memory_of_a_cache_is_what_is_said(kind: object) -> None:
    layers = KVCache(CONFIG, 3, kind).layers
    taken = sum(t.nbytes() for layer in layers for t in layer)
    assert taken == cache_bytes(CONFIG, kind, 3)
    assert cache_bytes(GPTConfig(), dtypes.int8) < 0.3 * cache_bytes(GPTConfig(), dtypes.float32)
