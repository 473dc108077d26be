"""Muon against an implementation in PyTorch, in float64, and what is around it."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.device_memory import device_bytes
from tests.run_script import TRAIN as RUN
from tests.run_script import make_run
from tests.test_resume import differing, stopped_at
from tinygpt import kernels
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.config.weights import matrices_in, weights
from tinygpt.errors import CheckpointError
from tinygpt.kernels import muon
from tinygpt.kernels.muon import TOGETHER, together
from tinygpt.kernels.newton_schulz import plain_orthogonal
from tinygpt.machine.jit import jit
from tinygpt.machine.transfer import zeros
from tinygpt.model import lora
from tinygpt.model.transformer import Transformer
from tinygpt.runs import checkpoint
from tinygpt.training.optim import AdamW, Muon, make_optimizer, optimizer_state
from tinygpt.training.preflight import preflight
from tinygpt.training.step import make_train_step

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
TRAIN = TrainConfig(
    batch_size=3, optimizer="muon", weight_decay=0.1, grad_clip=1.0, learning_rate=3e-3
)
RNG = np.random.default_rng(0)
BATCH = RNG.integers(0, 11, (2, 1, 3, 8))


POLYNOMIALS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
)


def exact_orthogonal(u):
    """Four steps of Newton and Schulz, in float64."""
    x = u / (np.linalg.norm(u) + 1e-7)
    x = x.T if u.shape[0] > u.shape[1] else x
    for a, b, c in POLYNOMIALS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (24, 7)])
def test_every_singular_value_comes_near_one(shape):
    u = RNG.normal(size=(3, *shape)).astype(np.float32)
    found = plain_orthogonal(Tensor(u)).numpy()
    for one, start in zip(found, u, strict=True):
        np.testing.assert_allclose(one, exact_orthogonal(start.astype(float)), atol=6e-5)
        values = np.linalg.svd(one, compute_uv=False)
        before = np.linalg.svd(start, compute_uv=False) / np.linalg.norm(start)
        assert 0.4 < values[before > 3e-3].min() <= values.max() < 1.6


def test_the_names_of_the_blocks_matrices_are_those_of_their_kind():
    for weight in weights(CONFIG):
        assert (matrices_in(weight.name) > 0) == (weight.kind == "linear"), weight.name


@pytest.mark.parametrize(
    ("way", "atol"),
    [(nullcontext, 2e-4), pytest.param(kernels.plain, 3e-5, marks=pytest.mark.slow)],
)
def test_twenty_steps_are_those_of_pytorch_in_float64(way, atol):
    torch = pytest.importorskip("torch")
    shapes = {w.name: w.shape for w in weights(CONFIG) if w.block < 1}
    start = {name: 0.02 * RNG.normal(size=shape) for name, shape in shapes.items()}
    ours = {n: Tensor(v.astype(np.float32)).contiguous().realize() for n, v in start.items()}
    theirs = {n: torch.tensor(v, requires_grad=True) for n, v in start.items()}
    mine = Muon(ours, 3e-3, 0.9, 0.95, weight_decay=0.1, ratio=0.02 / 3e-3)
    rest = [p for n, p in theirs.items() if not matrices_in(n)]
    adam = torch.optim.AdamW(rest, 3e-3, (0.9, 0.95), weight_decay=0.0)
    momenta = {n: torch.zeros_like(p) for n, p in theirs.items()}
    for _ in range(20):
        gradients = {n: RNG.normal(size=shape) for n, shape in shapes.items()}
        names = {id(p): n for n, p in ours.items()}
        given = [Tensor(gradients[names[id(p)]].astype(np.float32)) for p in mine.params]
        with way():
            mine.update(given, clip=1.0).realize(*mine.changed())
        for n, p in theirs.items():
            p.grad = torch.tensor(gradients[n])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adam.step()
        with torch.no_grad():
            for n in filter(matrices_in, theirs):
                p = theirs[n]
                m = momenta[n].lerp_(p.grad, 0.05)
                u = p.grad.lerp(m, 0.95).numpy()
                step = np.concatenate([exact_orthogonal(x) for x in np.split(u, matrices_in(n))])
                p.mul_(1 - 0.02 * 0.1)
                p.add_(torch.tensor(step), alpha=-0.02 * math.sqrt(max(1, len(u) / u.shape[1])))
    for n, p in theirs.items():
        np.testing.assert_allclose(ours[n].numpy(), p.detach().numpy(), atol=atol, err_msg=n)


def losses(make=make_optimizer, steps=3, **settings):
    config = TrainConfig(**{**TRAIN.to_dict(), **settings})
    model = Transformer(CONFIG)
    step = make_train_step(model, make(model.parameters(), config), config)
    A = config.grad_accum_steps
    x, y = (part.reshape(A, 3 // A, 8).astype(np.int32) for part in BATCH)
    return [step(x, y, 3e-3, (0, i)) for i in range(steps)], model


def test_micro_batches_take_the_same_steps_and_name_the_norms_of_their_layers():
    whole, _ = losses()
    parts, _ = losses(grad_accum_steps=3, batch_size=1)
    adam, _ = losses(steps=1, optimizer="adam")
    for one, other in zip(whole, parts, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.norms == pytest.approx(other.norms, rel=1e-2)
    assert whole[0].norms == pytest.approx(adam[0].norms)
    assert whole[2].loss < whole[0].loss


def test_the_state_is_two_moments_of_what_adam_changes_and_one_of_a_matrix():
    model = Transformer(CONFIG)
    state = optimizer_state(make_optimizer(model.parameters(), TRAIN), model.parameters())
    for weight in weights(CONFIG):
        kinds = {kind for kind in "mvb" if f"{kind}.{weight.name}" in state}
        assert kinds == ({"b"} if weight.kind == "linear" else {"m", "v"})


def test_a_frozen_matrix_is_left_alone_and_adapters_are_adams():
    model = Transformer(CONFIG)
    model.parameters()["h.0.mlp.c_fc.weight"].is_param_(False)
    optimizer = make_optimizer(model.parameters(), TRAIN)
    assert len(optimizer.b) == 7 and len(optimizer.params) == len(model.parameters()) - 1
    adapters = {"h.0.mlp.c_fc.lora_a": Tensor.zeros(2, 16).contiguous()}
    assert type(make_optimizer(adapters, TRAIN)) is AdamW


SHAPES = ((48, 16), (16, 16), (64, 16), (16, 64), (21, 33), (100, 40), (99, 40), (3, 3))
COUNTS = (3, 1, 1, 1, 1, 2, 3, 1)


def update(way, norm=2.0, taken=1.0):
    """Weights and momenta after two steps that are computed in a way."""
    rng = np.random.default_rng(1)
    p, g, m = (
        [Tensor(rng.normal(size=s).astype(np.float32)).contiguous().realize() for s in SHAPES]
        for _ in range(3)
    )
    lr, report = Tensor([0.01]).realize(), Tensor([1.0, norm, taken]).contiguous().realize()
    with way():
        for _ in range(2):
            kernels.muon_update(
                p, g, m, COUNTS, lr, report,
                ratio=3.0, momentum=0.9, decay=0.1, clip=1.0, scale=0.5,
            )  # fmt: skip
            Tensor.realize(*p, *m)
    return [t.numpy() for t in (*p, *m)]


def test_the_kernels_are_their_twin_for_any_number_of_threads(monkeypatch):
    plain = update(kernels.plain)
    ours = []
    for threads in ("1", "2"):
        monkeypatch.setenv("TINYGPT_THREADS", threads)
        ours.append(update(nullcontext))
    for one, other, twin in zip(*ours, plain, strict=True):
        assert (one == other).all()
        np.testing.assert_allclose(one, twin, atol=2e-4)  # two steps at a rate of 0.03


def test_a_step_that_is_not_taken_changes_nothing():
    before = update(nullcontext, taken=0.0)
    rng = np.random.default_rng(1)
    p, _, m = ([rng.normal(size=s).astype(np.float32) for s in SHAPES] for _ in range(3))
    for found, wanted in zip(before, (*p, *m), strict=True):
        assert (found == wanted).all()


def test_no_more_matrices_are_worked_on_at_once_than_memory_is_meant_for():
    blocks = [(3, 8, 8), (1, 8, 8), (1, 32, 8), (1, 8, 32)] * 12
    chosen = list(together(blocks))
    assert sorted(i for some in chosen for i in some) == list(range(48))
    for some in chosen:
        assert len({blocks[i][1:] for i in some}) == 1
        assert sum(blocks[i][0] for i in some) <= TOGETHER


def test_large_matrices_come_in_smaller_stacks_with_some_for_each_thread(monkeypatch):
    monkeypatch.setattr(muon.pool, "threads", lambda: 2)
    assert [muon.at_once((n, 4 * n)) for n in (16, 128, 384, 768, 1600)] == [16, 16, 4, 4, 4]
    monkeypatch.setattr(muon.pool, "threads", lambda: 64)
    assert muon.at_once((1600, 6400)) == TOGETHER


def test_no_more_than_one_stack_is_in_memory(monkeypatch):
    """All of the first kernels could run before all of the others, each with its own stack."""
    monkeypatch.setattr(muon, "TOGETHER", 1)
    p, g, m = ([zeros((64, 64), dtypes.float32) for _ in range(6)] for _ in range(3))
    lr, report = zeros((1,), dtypes.float32), zeros((3,), dtypes.float32)

    def change():
        kernels.muon_update(
            p, g, m, [1] * 6, lr, report, ratio=3.0, momentum=0.9, decay=0.1
        )  # fmt: skip
        return Tensor.realize(*p, *m)

    before, step = device_bytes(), jit(change)
    for _ in range(2):
        step()
    assert device_bytes() - before < 1.5 * 4 * muon.Sizes.of(1, 64, 64).needed


def test_a_run_goes_on_bit_for_bit_and_with_no_other_optimizer(tmp_path):
    config = replace(RUN, optimizer="muon", max_iters=4, eval_interval=2, checkpoint_interval=2)
    whole = tmp_path / "whole"
    list(make_run(whole, config=config))
    folder = stopped_at(whole, 2, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optimizer \(was 'muon', now 'adam'\)"):
        make_run(folder, resume=True, config=replace(config, optimizer="adam"))
    assert [step.iter for step in make_run(folder, resume=True, config=config)] == [3, 4]
    assert differing(whole, folder) == []


@pytest.mark.parametrize("kinds", [("adam", "muon"), ("muon", "adam")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, kinds):
    model = Transformer(CONFIG)
    one, other = (
        make_optimizer(model.parameters(), replace(TRAIN, optimizer=kind)) for kind in kinds
    )
    path = checkpoint.save(tmp_path / "ckpt_1.safetensors", model, one, checkpoint.Meta(1, CONFIG))
    with pytest.raises(CheckpointError, match="saved with another kind of optimizer"):
        checkpoint.load(path, model, other)


@pytest.mark.parametrize("settings", [{}, {"freeze": 1}, {"lora_rank": 2}])
def test_what_is_needed_is_known_before(settings):
    train, adam = (replace(TRAIN, optimizer=kind, **settings) for kind in ("muon", "adam"))
    model = Transformer(CONFIG)
    lora.prepare(model, train)
    estimate, other = preflight(CONFIG, train), preflight(CONFIG, adam)
    size = checkpoint.state_size(model, make_optimizer(model.trainable(), train))
    assert 0 <= size - estimate.saving < 20
    if "lora_rank" in settings:
        assert estimate.needed == other.needed and estimate.flops == other.flops
    else:
        assert estimate.optimizer < other.optimizer and estimate.gradients > other.gradients
        assert estimate.flops > other.flops
