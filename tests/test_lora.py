"""What is frozen stays as it is, bit for bit, and adapters learn what their weights would."""

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor, dtypes, nn
from tinygrad.helpers import GlobalCounters

from tests.run_script import MODEL, TOKENS, TRAIN, make_run
from tests.test_resume import differing, finish, rewrite, stopped_at
from tinygpt import kernels
from tinygpt.api import GPT, load, train
from tinygpt.config import ADAPTERS, GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, ConfigError, DataError, UsageError
from tinygpt.files.tensor_file import arrange, from_bfloat16, to_bfloat16
from tinygpt.machine import precision
from tinygpt.machine.transfer import read, write
from tinygpt.model import lora
from tinygpt.runs import checkpoint
from tinygpt.runs.checkpoint import Snapshot
from tinygpt.training import preflight
from tinygpt.training.gradcheck import gradcheck
from tinygpt.training.loop import train_steps
from tinygpt.training.optim import make_optimizer
from tinygpt.training.step import make_train_step

SHAPE = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
SMALL = replace(SHAPE, n_layer=1)
ROWS = np.random.default_rng(0).integers(0, 13, (2, 9)).astype(np.int32)
X, Y = Tensor(ROWS[:, :-1].copy()), Tensor(ROWS[:, 1:].copy())
TEXT = np.random.default_rng(1).integers(0, 13, 600).astype(np.uint16)


def adapted(shape=SHAPE, learned=True, **config):
    """A model with adapters; those that have ``learned`` something change what it computes."""
    model = GPT(shape).eval()
    lora.prepare(model, TrainConfig(lora_rank=3, **config))
    for name, p in model.parameters().items():
        if learned and name.endswith(".lora_b"):
            write(p, np.random.default_rng(len(name)).standard_normal(p.shape) * 0.1)
    return model


def values(model):
    return {name: p.numpy() for name, p in model.parameters().items()}


def same_bits(before, after):
    """The names of the parameters that have not changed."""
    return {name for name in before if before[name].tobytes() == after[name].tobytes()}


def taught(shape=SHAPE, steps=3, **settings):
    """A model before and after some steps, and the optimizer that took them."""
    defaults = {"max_iters": steps, "warmup_steps": 0, "batch_size": 4, "learning_rate": 1e-2}
    config = TrainConfig(**defaults | settings)
    model = GPT(shape)
    lora.prepare(model, config)
    optimizer, before = make_optimizer(model.parameters(), config), values(model)
    losses = [step.train_loss for step in train_steps(model, optimizer, config, TEXT)]
    return model, before, values(model), optimizer, losses


# ---- adapters ----


def test_new_adapters_change_nothing():
    plain = GPT(SHAPE).eval()(X).numpy()
    np.testing.assert_allclose(adapted(learned=False)(X).numpy(), plain, rtol=0, atol=1e-6)
    assert np.abs(adapted()(X).numpy() - plain).max() > 0.1


@pytest.mark.parametrize("positions", [1, 8])  # of a product's few rows, and of many
@pytest.mark.parametrize("fast", [True, False])
def test_the_merged_model_computes_what_the_adapted_one_does(positions, fast):
    model = adapted()
    names = list(GPT(SHAPE).parameters())
    inputs = Tensor(ROWS[:, :positions].copy())
    if fast:
        before, text = model(inputs).numpy(), model.generate(X, 6, temperature=0).tolist()
    else:
        with kernels.plain():
            before = model(inputs).numpy()
    lora.merge(model)
    np.testing.assert_allclose(model(inputs).numpy(), before, rtol=0, atol=1e-5)
    assert list(model.parameters()) == names and all(p.is_param for p in model.trainable().values())
    if fast:
        assert model.generate(X, 6, temperature=0).tolist() == text


def test_merging_twice_is_merging_once():
    model = adapted()
    lora.merge(model)
    before = values(model)
    lora.merge(model)
    assert same_bits(before, values(model)) == set(before)


def test_adapters_have_the_gradients_of_finite_differences():
    report = gradcheck(
        adapted(replace(SMALL, dropout=0.3)),
        X, Y, samples=1, dropout_key=(3, 4),
    )  # fmt: skip
    assert report.ok and report.worst < 1e-6
    assert len(report.rows) == 8 and all(row.name.endswith(ADAPTERS) for row in report.rows)
    assert all(row.gradient_norm > 0 for row in report.rows)


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ("all", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("attn", ["attn.c_attn", "attn.c_proj"]),
        ("mlp", ["mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_adapters_are_where_they_were_asked_for(layers, parts):
    model = adapted(lora_layers=layers, freeze=1)
    wanted = {f"h.1.{part}{end}" for part in parts for end in ADAPTERS[:2]}
    assert set(model.trainable()) == wanted


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_adapters_leaves_every_other_weight_as_it_is(accumulate):
    shape = replace(SMALL, dropout=0.2)
    settings = {"lora_rank": 2, "grad_accum_steps": accumulate, "weight_decay": 0.1}
    model, before, after, optimizer, losses = taught(shape, **settings)
    own = set(GPT(shape).parameters())
    assert same_bits(before, after) == own and set(after) - own == set(model.trainable())
    assert len(optimizer.m) == len(optimizer.v) == len(optimizer.params) == 2 * 4
    _, _, again, _, repeated = taught(shape, **settings)
    assert repeated == losses and same_bits(after, again) == set(after)


@pytest.mark.slow
def test_adapters_learn_another_text():
    """A model that counts by ones is taught to count by twos."""
    model, losses = GPT(SMALL), []
    for by, settings in (
        (1, {"learning_rate": 1e-2}),
        (2, {"learning_rate": 3e-2, "lora_rank": 4}),
    ):
        config = TrainConfig(
            max_iters=60, warmup_steps=0, batch_size=4, eval_interval=60, **settings
        )
        counting = (np.arange(600) * by % 13).astype(np.uint16)
        history = train(model, config, counting, show=False).history
        losses.append([row["train_loss"] for row in history])
    first, second = losses
    assert first[-1] < 1.0 and second[0] > 1.5 and second[-1] < 1.0


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_big_batch():
    _, _, one, _, big = taught(SMALL, batch_size=6, lora_rank=2)
    _, _, many, _, small = taught(SMALL, batch_size=2, grad_accum_steps=3, lora_rank=2)
    assert small == pytest.approx(big, abs=1e-5)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=2e-4)


def test_a_skipped_step_changes_no_adapter():
    config = TrainConfig(batch_size=2, lora_rank=2)
    model = GPT(SMALL)
    lora.prepare(model, config)
    step = make_train_step(model, make_optimizer(model.parameters(), config), config)
    x, y = ROWS[None, :, :-1], ROWS[None, :, 1:]
    before = values(model)
    assert not step(x, y, 1e-2, (0, 0), limits=(1.0, 1.0)).taken  # the loss is about 2.5
    assert same_bits(before, values(model)) == set(before)
    assert step(x, y, 1e-2, (0, 1)).taken
    assert not same_bits(before, values(model)) >= set(model.trainable())


# ---- frozen layers ----


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_layers_stay_bit_for_bit_and_have_no_moments(tied):
    shape = replace(SHAPE, tie_embeddings=tied)
    _, before, after, optimizer, _ = taught(shape, freeze=1, weight_decay=0.1)
    frozen = {name for name in before if name.startswith(("wte.", "wpe.", "h.0."))}
    assert same_bits(before, after) == frozen and len(frozen) == 2 + 12
    assert len(optimizer.m) == len(before) - len(frozen)


def test_freezing_everything_but_the_last_norm_trains_that():
    _, before, after, _, _ = taught(freeze=2)
    assert set(before) - same_bits(before, after) == {"ln_f.weight", "ln_f.bias"}


def test_freezing_nothing_but_the_embeddings():
    _, before, after, _, _ = taught(freeze=0)
    assert same_bits(before, after) == {"wte.weight", "wpe.weight"}


def test_what_is_frozen_is_not_computed():
    work = {}
    for freeze in (None, 0, 1, 2):
        model = GPT(SHAPE)
        lora.prepare(model, TrainConfig(freeze=freeze))
        GlobalCounters.reset()
        loss = model.loss(X, Y)
        Tensor.realize(loss, *loss.gradient(*model.trainable().values()))
        work[freeze] = GlobalCounters.global_ops
    assert work[None] > work[0] > work[1] > work[2]
    assert work[2] < work[None] / 2


def test_a_frozen_model_can_be_trained_whole_again():
    model = GPT(SHAPE)
    lora.prepare(model, TrainConfig(freeze=2))
    lora.prepare(model, TrainConfig())
    assert list(model.trainable()) == list(model.parameters())


# ---- how much there is of it ----


@pytest.mark.parametrize(
    "settings",
    [{}, {"freeze": 0}, {"freeze": 2}, {"lora_rank": 1}, {"lora_rank": 5, "lora_layers": "attn"},
     {"lora_rank": 16, "lora_layers": "mlp", "freeze": 1}],
)  # fmt: skip
@pytest.mark.parametrize("other", [{}, {"bias": False, "tie_embeddings": False}])
def test_what_learns_is_counted_without_a_model(settings, other):
    shape, config = replace(SHAPE, **other), TrainConfig(**settings)
    model = GPT(shape)
    plain = model.num_params()
    lora.prepare(model, config)
    learning = sum(p.numel() for p in model.trainable().values())
    assert lora.count_trainable(shape, config) == (learning, model.num_params() - plain)
    estimate = preflight.preflight(shape, config)
    assert estimate.parameters == model.num_params() and estimate.optimizer == 8 * learning
    size = checkpoint.state_size(model, make_optimizer(model.parameters(), config))
    assert 0 <= size - estimate.saving < 20  # the powers of the betas and the rate


def test_operations_are_those_of_what_is_differentiated():
    shape = GPTConfig(vocab_size=10, n_layer=2, n_embd=4, n_head=1, block_size=2, bias=False)
    block, head = 4 * 12 + 4 * 4 + 2 * 4 * 16 + 2 * 4, 10 * 4
    attention, norm = 4 * 2, 4
    whole = preflight.flops_per_token(shape)
    assert whole == 6 * (2 * (block + attention) + head + norm)
    frozen = preflight.flops_per_token(shape, TrainConfig(freeze=1))
    assert frozen == whole - 4 * (block + attention) - 2 * head
    adapters = 2 * 3 * (4 + 2 + 5 + 5) * 4
    wanted = whole - 2 * (2 * block + head + norm) + 6 * adapters
    assert preflight.flops_per_token(shape, TrainConfig(lora_rank=3)) == wanted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 0}, "lora_rank=0 is too small"),
        ({"lora_rank": -1}, "lora_rank=-1 is too small"),
        ({"lora_rank": 17}, "lora_rank=17 is larger than n_embd=16"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha=0.0 must be above 0"),
        ({"lora_rank": 2, "lora_layers": "head"}, "lora_layers='head' is not one of"),
        ({"lora_rank": 2.5}, "lora_rank=2.5 is of type float"),
        ({"freeze": -1}, "freeze=-1 is too small"),
        ({"freeze": 3}, "freeze=3 is more than the n_layer=2 blocks"),
        ({"freeze": 2, "lora_rank": 2}, "there is no layer left"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_made(settings, words):
    with pytest.raises(ConfigError, match=words):
        preflight.preflight(SHAPE, TrainConfig(**settings))
    model = GPT(SHAPE)
    names = list(model.parameters())
    with pytest.raises(ConfigError, match=words):
        lora.prepare(model, TrainConfig(**settings))
    assert list(model.parameters()) == names


# ---- runs ----

LORA = replace(
    TRAIN, lora_rank=4, grad_accum_steps=2, batch_size=2, checkpoint_interval=1, learning_rate=0.02
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of adapters that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert len(list(make_run(folder, config=LORA))) == 12
    return folder


def test_a_resumed_run_of_adapters_is_bit_identical(whole, tmp_path):
    for k in (1, 7):
        folder = stopped_at(whole, k, tmp_path / str(k))
        assert finish(folder, LORA) == list(range(k + 1, 13))
        assert differing(whole, folder) == []


@pytest.mark.slow
def test_a_resumed_run_with_frozen_layers_is_bit_identical(tmp_path):
    config = replace(TRAIN, freeze=0, checkpoint_interval=1)
    assert len(list(make_run(tmp_path / "whole", config=config))) == 12
    folder = stopped_at(tmp_path / "whole", 5, tmp_path / "run")
    assert finish(folder, config) == list(range(6, 13))
    assert differing(tmp_path / "whole", folder) == []
    names = checkpoint.describe(folder / "ckpt_12.safetensors")["tensors"]
    assert "model.wte.weight" in names and "optimizer.m.wte.weight" not in names


def test_a_checkpoint_of_adapters_is_loaded_as_the_merged_model(whole):
    path = whole / "ckpt_12.safetensors"
    tensors = checkpoint.describe(path)["tensors"]
    moments = {name for name in tensors if name.startswith(("optimizer.m.", "optimizer.v."))}
    assert moments and all(name.endswith(ADAPTERS) for name in moments)

    model, _ = load(path)
    assert list(model.parameters()) == list(GPT(MODEL).parameters())
    twin = GPT(MODEL).eval()
    lora.prepare(twin, LORA)
    assert twin.load_checkpoint(path) == 12
    tokens = Tensor(TOKENS[:16].reshape(2, 8).astype(np.int32))
    np.testing.assert_allclose(twin(tokens).numpy(), model(tokens).numpy(), rtol=0, atol=1e-5)
    assert np.abs(GPT(MODEL, seed=5).eval()(tokens).numpy() - model(tokens).numpy()).max() > 0.05
    lora.merge(twin)
    found, wanted = values(twin), values(model)
    assert same_bits(found, wanted) == set(wanted)
    # and what no adapter was for has never changed
    first = values(GPT(MODEL, seed=5))
    assert same_bits(first, wanted) == set(wanted) - {w.name for w in lora.linear(MODEL)}


# ---- half precision ----

HALF = replace(LORA, dtype="bfloat16")


def test_frozen_weights_of_16_bits_learn_what_rounded_float32_ones_would(monkeypatch):
    def losses(half):
        monkeypatch.setattr(lora, "half_of", lambda name: precision.half_of(name) if half else None)
        run = make_run(None, config=replace(HALF, max_iters=4))
        frozen = {n: p for n, p in run.model.parameters().items() if n.endswith("e.weight")}
        frozen |= {w.name: run.model.parameters()[w.name] for w in lora.linear(MODEL)}
        assert {p.dtype for p in frozen.values()} == {dtypes.bfloat16 if half else dtypes.float32}
        if not half:
            for p in frozen.values():
                write(p, from_bfloat16(to_bfloat16(read(p))))
        found = [(step.train_loss, step.val_loss, step.grad_norm) for step in run]
        lora.merge(run.model)
        assert {p.dtype for p in run.model.parameters().values()} == {dtypes.float32}
        return found, values(run.model)

    (rounded, one), (exact, other) = losses(half=True), losses(half=False)
    assert rounded == exact and len(exact) == 4
    assert same_bits(one, other) == set(other)


def test_a_resumed_run_in_half_precision_is_bit_identical_and_saves_float32(tmp_path):
    config = replace(HALF, max_iters=4)
    assert len(list(make_run(tmp_path / "whole", config=config))) == 4
    folder = stopped_at(tmp_path / "whole", 2, tmp_path / "run")
    assert finish(folder, config) == [3, 4]
    assert differing(tmp_path / "whole", folder) == []
    path = folder / "ckpt_4.safetensors"
    kinds = {kind["dtype"] for kind in checkpoint.describe(path)["tensors"].values()}
    assert "BF16" not in kinds and "F32" in kinds
    found, first = values(load(path)[0]), values(GPT(MODEL, seed=5))
    for name in ("wte.weight", "wpe.weight"):
        assert (found[name] == from_bfloat16(to_bfloat16(first[name]))).all()
    for name in ("h.0.ln_1.weight", "h.0.mlp.c_fc.bias"):
        assert (found[name] == first[name]).all()


def test_weights_that_float16_cannot_hold_are_not_frozen_in_it():
    model = GPT(SMALL)
    write(model.wte.weight, np.full(model.wte.weight.shape, 1e5))
    with pytest.raises(DataError, match=r"wte.weight holds values beyond 65504.*bfloat16"):
        lora.prepare(model, TrainConfig(lora_rank=2, dtype="float16"))


def test_half_of_the_frozen_weights_memory_is_foreseen():
    shape, train = GPTConfig(vocab_size=65), TrainConfig(lora_rank=4, dtype="bfloat16")
    found, plain = preflight.preflight(shape, train), shape.num_params()
    assert found.weights == 2 * plain + 4 * (found.parameters - plain)


def test_samples_are_those_of_the_adapted_model(whole):
    from tinygpt.runs.history import read

    run = make_run(None, config=LORA)
    checkpoint.load(whole / "ckpt_12.safetensors", run.model)
    *_, last = read(whole / "samples.jsonl")
    assert last["iter"] == 12 and run._sample(12) == last["text"]
    assert make_run(None, config=LORA)._sample(12) != last["text"]


@pytest.mark.parametrize("change", [{"lora_rank": 2}, {"lora_rank": None}, {"lora_alpha": 1.0},
                                    {"lora_layers": "mlp"}, {"freeze": 0}])  # fmt: skip
def test_other_weights_cannot_learn_in_a_run_that_goes_on(whole, change):
    config = replace(LORA, **change)
    [name] = change
    with pytest.raises(
        CheckpointError, match=rf"{name} \(was .* start a new one from it, with --i"
    ):
        make_run(whole, resume=True, config=config)
    with pytest.raises(UsageError, match=f"{name} cannot change within a run"):
        make_run(whole, resume=True, config=config, allow_change=[name])


def test_adapters_cannot_be_added_to_a_run_that_has_none(tmp_path):
    config = replace(LORA, lora_rank=None, max_iters=1)
    list(make_run(tmp_path, config=config))
    with pytest.raises(CheckpointError, match=r"lora_rank \(was None, now 4\)"):
        make_run(tmp_path, resume=True, config=replace(config, lora_rank=4))


@pytest.mark.parametrize("part", ["lora_a", "lora_b"])
def test_an_adapter_that_does_not_fit_is_refused(whole, tmp_path, part):
    path = stopped_at(whole, 12, tmp_path / "run") / "ckpt_12.safetensors"
    meta, arrays = checkpoint.read(path)
    name = f"model.h.0.attn.c_attn.{part}"
    for wrong in (None, arrays[name][:1], arrays[name][None]):
        made = {n: a for n, a in arrays.items() if n != name} | (
            {} if wrong is None else {name: wrong}
        )
        snapshot = Snapshot(arrange((n, a.dtype, a.shape) for n, a in made.items()))
        for n, array in made.items():
            snapshot.array(n)[...] = array
        checkpoint.write(path, snapshot, meta)
        with pytest.raises(CheckpointError, match=r"the adapter of model\.h\.0\.attn\.c_attn does"):
            load(path)
    rewrite(stopped_at(whole, 12, tmp_path / "other") / "ckpt_12.safetensors", train=TRAIN)
    with pytest.raises(CheckpointError, match="damaged or made up"):
        load(tmp_path / "other" / "ckpt_12.safetensors")


# ---- in Python ----

QUICK = TrainConfig(max_iters=2, warmup_steps=0, batch_size=2, eval_interval=2, lora_rank=2)


def test_training_hands_a_plain_model_back_that_has_learned():
    model = GPT(SMALL)
    before = values(model)
    result = train(model, QUICK, TEXT, show=False)
    assert result.iter_num == 2 and list(model.parameters()) == list(before)
    changed = set(before) - same_bits(before, values(model))
    assert len(changed) == 4 and all(p.is_param for p in model.parameters().values())
    train(model, replace(QUICK, lora_rank=None), TEXT, show=False)
    assert set(before) - same_bits(before, values(model)) == set(before)


def test_a_loaded_model_is_trained_in_training_mode_and_handed_back_as_it_was(tmp_path):
    shape = replace(SMALL, dropout=0.5)
    train(GPT(shape), QUICK, TEXT, out_dir=tmp_path / "first", show=False)
    model, _ = load(tmp_path / "first")
    assert not model.training and model.origin["iter_num"] == 2
    same = np.tile(TEXT[:9], 20)[:9]  # a text of one block: every batch is the same
    config = TrainConfig(max_iters=3, warmup_steps=0, learning_rate=1e-9, eval_interval=9)
    result = train(model, config, same, out_dir=tmp_path / "second", show=False)
    losses = [row["train_loss"] for row in result.history]
    assert len(set(losses)) == 3  # every step drops something else
    assert not model.training and model.origin is None
    meta = checkpoint.read_meta(tmp_path / "second" / "ckpt_3.safetensors")
    assert meta.init == checkpoint.origin(tmp_path / "first" / "ckpt_2.safetensors")
    assert meta.init["iter_num"] == 2 and len(meta.init["sha256"]) == 64


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"freeze": 1}])
def test_an_optimizer_of_other_weights_is_refused(settings):
    config = TrainConfig(max_iters=2, warmup_steps=0, batch_size=2, **settings)
    model = GPT(SHAPE)
    everything = nn.optim.SGD(list(model.parameters().values()), lr=0.1)
    with pytest.raises(UsageError, match=r"lora\.prepare"):
        train(model, config, TEXT, optimizer=everything, show=False)
    lora.prepare(model, config)
    before = values(model)
    own = nn.optim.SGD(list(model.trainable().values()), lr=0.1)
    learning = set(model.trainable())
    from tinygpt.runs.run import TrainingRun

    list(TrainingRun(model, config, TEXT, optimizer=own))
    assert set(before) - same_bits(before, values(model)) == learning


def test_a_model_with_adapters_is_not_saved_without_what_it_takes_to_read_them(tmp_path):
    model = adapted()
    with pytest.raises(UsageError, match=r"lora\.merge"):
        model.save_checkpoint(1, folder=tmp_path)
    lora.merge(model)
    assert model.save_checkpoint(1, folder=tmp_path).is_file()
