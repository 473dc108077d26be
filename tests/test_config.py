"""Settings are checked when they are made, and every refusal says what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.config import (
    PRESETS,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    field_docs,
    to_toml,
)
from tinygpt.errors import ConfigError


def test_the_defaults_are_the_interface():
    assert GPTConfig().to_dict() == {
        "block_size": 64, "vocab_size": 50257, "n_layer": 4, "n_head": 4, "n_embd": 128,
        "dropout": 0.0, "bias": True, "tie_embeddings": True, "attention": "auto",
    }  # fmt: skip
    train = TrainConfig()
    assert (train.batch_size, train.learning_rate, train.warmup_steps) == (8, 1e-3, 100)
    assert (train.max_iters, train.eval_interval, train.eval_iters) == (1000, 100, 20)
    assert train.weight_decay == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_embd": 130}, ["n_embd=130", "n_head=4", "n_embd=128", "n_head=5"]),
        ({"n_embd": 2, "n_head": 4}, ["n_embd=2", "n_head=2"]),
        ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
        ({"block_size": -3}, ["block_size=-3"]),
        ({"dropout": 1.0}, ["dropout=1.0", "less than 1"]),
        ({"dropout": float("nan")}, ["dropout=nan", "finite"]),
        ({"n_embd": 2**40}, ["parameters", "20,000,000,000"]),
        ({"vocab_size": "many"}, ["vocab_size='many'", "str", "int"]),
        ({"bias": 1}, ["bias=1", "bool"]),
        ({"n_layer": True}, ["n_layer=True", "bool", "int"]),
    ],
)
def test_impossible_models_are_refused_with_advice(settings, words):
    with pytest.raises(ConfigError) as error:
        GPTConfig(**settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.0}, ["learning_rate=0.0"]),
        ({"learning_rate": float("inf")}, ["finite"]),
        ({"learning_rate": 1e-4, "min_lr": 1e-3}, ["min_lr=0.001", "learning_rate=0.0001"]),
        ({"max_iters": 0}, ["max_iters=0"]),
        ({"max_iters": 10**12}, ["max_iters", "too large"]),
        ({"beta2": 1.0}, ["beta2=1.0"]),
        ({"eps": 0.0}, ["eps=0.0"]),
        ({"decay": "step"}, ["decay='step'", "'cosine'", "'linear'", "'constant'"]),
        ({"grad_accum_steps": 0}, ["grad_accum_steps=0"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_impossible_training_is_refused_with_advice(settings, words):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.5}, {"min_p": -1.0}, {"repetition_penalty": 0.0}],
)  # fmt: skip
def test_impossible_sampling_is_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SampleConfig(**settings)


def test_an_unknown_field_names_the_nearest_one():
    with pytest.raises(ConfigError, match="Did you mean 'n_layer'"):
        GPTConfig.from_dict({"n_layers": 3})


def test_whole_numbers_are_taken_for_floats_but_not_the_reverse():
    assert TrainConfig(learning_rate=1).learning_rate == 1.0
    with pytest.raises(ConfigError):
        TrainConfig(max_iters=10.0)


def test_configs_cannot_be_changed():
    with pytest.raises(AttributeError):
        GPTConfig().n_layer = 3


def test_every_field_is_documented():
    for config in (GPTConfig, TrainConfig, SampleConfig):
        docs = field_docs(config)
        assert set(docs) == set(config.__dataclass_fields__)


@given(
    st.builds(
        TrainConfig,
        learning_rate=st.floats(1e-6, 1),
        seed=st.integers(0, 2**63 - 1),
        sample_prompt=st.text(st.characters(codec="utf-8")),
        early_stop_patience=st.none() | st.integers(1, 99),
    )
)
def test_a_config_survives_toml(config):
    import tomllib

    read = tomllib.loads(to_toml({"train": config}, comments=True))["train"]
    assert TrainConfig.from_dict(read) == config


def test_gpt2_has_124_million_parameters():
    assert GPTConfig(1024, 50257, 12, 12, 768).num_params() == 124_439_808


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible(name):
    preset = PRESETS[name]
    GPTConfig.from_dict(preset.model)
    TrainConfig.from_dict(preset.train)


def test_a_choice_may_be_left_open():
    from tinygpt.cli.loading import Loading

    assert Loading.from_dict({"quantize": None, "kv": "int8"}).kv == "int8"
    for wrong in ("int3", 8):
        with pytest.raises(ConfigError, match=r"quantize=.* is not one of 'int8', 'int4'"):
            Loading.from_dict({"quantize": wrong})
