"""Sampling: filters against their plain definitions, draws against probabilities, seeds, rows."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.config import SampleConfig
from tinygpt.errors import ConfigError, TinyGPTError, UsageError
from tinygpt.generation.sample import (
    Penalties,
    choose,
    draw,
    filter_logits,
    first_choice,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
    penalise_repetition,
    scale_by_temperature,
    softmax,
)

# Few different values, so that ties are common.
LOGITS = st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float64)
)
NOTHING_SEEN = np.array([[0]])


def likeliest_first(logits):
    """Ids in the order of preference: a larger logit, then a lower id."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def kept(logits):
    return np.flatnonzero(np.isfinite(logits)).tolist()


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_the_k_likeliest(logits, k):
    out = keep_top_k(logits, k)
    assert kept(out) == sorted(likeliest_first(logits)[:k])
    assert (out[kept(out)] == logits[kept(out)]).all()


@given(LOGITS, st.floats(0.001, 0.999))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    probabilities, wanted, total = softmax(logits), [], 0.0
    for i in likeliest_first(logits):
        if total >= p:
            break
        wanted.append(i)
        total += probabilities[i]
    assert kept(keep_top_p(logits, p)) == sorted(wanted)


def test_top_p_finds_a_nucleus_of_any_size():
    flat = np.zeros(5000)
    assert kept(keep_top_p(flat, 0.4999)) == list(range(2500))
    assert len(kept(keep_top_p(flat, 1 - 1e-16))) == 5000
    assert len(kept(keep_top_p(flat, 1.0))) == 5000


@given(LOGITS, st.floats(0.001, 1.0))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, fraction):
    ratios = np.exp(logits - logits.max())
    unclear = np.isclose(ratios, fraction, rtol=1e-12)  # rounding may decide either way
    out = np.isfinite(keep_min_p(logits, fraction))
    assert (out == (ratios >= fraction))[~unclear].all()
    assert out[logits.argmax()]


@given(LOGITS, st.floats(0.1, 10))
def test_temperature_divides_the_logits(logits, temperature):
    out = softmax(scale_by_temperature(logits, temperature))
    np.testing.assert_allclose(out, softmax(logits / temperature), rtol=1e-12)


@given(LOGITS, st.lists(st.integers(0, 200)), st.floats(0.5, 2))
def test_repetition_penalty_is_ctrls(logits, seen, penalty):
    seen = [i % len(logits) for i in seen]
    wanted = [
        (x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)
    ]
    out = penalise_repetition(logits, np.array(seen, np.int32), penalty)
    np.testing.assert_array_equal(out, wanted)


def test_filters_leave_their_argument_alone():
    logits = np.array([1.0, 3.0, 2.0, 3.0])
    before = logits.copy()
    config = SampleConfig(0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    filter_logits(logits, np.array([1, 2]), config)
    np.testing.assert_array_equal(logits, before)


def test_filters_apply_in_the_documented_order():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    # Top-k first leaves 0.625 and 0.375, of which the first alone reaches 0.6.
    assert kept(filter_logits(logits, [], SampleConfig(top_k=2, top_p=0.6))) == [0]
    assert kept(filter_logits(logits, [], SampleConfig(top_p=0.6))) == [0, 1]
    # Temperature before top-p: a flat distribution has a large nucleus.
    assert kept(filter_logits(logits, [], SampleConfig(temperature=100, top_p=0.6))) == [0, 1, 2]


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(),
        SampleConfig(temperature=0.7, top_k=5),
        SampleConfig(top_p=0.8),
        SampleConfig(temperature=1.5, min_p=0.2),
        SampleConfig(temperature=0.9, top_k=6, top_p=0.95, min_p=0.05, repetition_penalty=1.3),
    ],
)
def test_frequencies_match_probabilities(config):
    n = 6_000
    logits = np.random.default_rng(3).normal(0, 1.5, 10)
    expected = n * softmax(filter_logits(logits, np.array([4, 7]), config))
    pick = make_sampler(config, seed=11)
    drawn = [pick(logits[None], np.array([[4, 7]]))[0] for _ in range(n)]
    counts = np.bincount(drawn, minlength=10)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * max(freedom, 1)) + 4


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = np.log([0.25, 0.5, 1e-300, 0.25])
    assert [draw(logits, u) for u in (0.0, 0.2499, 0.2501, 0.7499, 0.7501)] == [0, 0, 1, 1, 3]
    assert draw(logits, np.nextafter(1, 0)) == 3
    assert draw(np.array([-np.inf, 0.0, -np.inf]), 0.0) == 1


@given(LOGITS)
def test_temperature_0_takes_the_likeliest_and_of_equals_the_lowest_id(logits):
    pick = make_sampler(SampleConfig(temperature=0))
    assert pick(logits[None], NOTHING_SEEN).tolist() == [likeliest_first(logits)[0]]


def test_a_repetition_penalty_moves_the_greedy_choice():
    pick = make_sampler(SampleConfig(temperature=0, repetition_penalty=2.0))
    logits = np.array([[2.0, 1.5, -1.0]])
    assert pick(logits, np.array([[2, 2]])).tolist() == [0]
    assert pick(logits, np.array([[0, 2]])).tolist() == [1]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform():
    logits = np.array([[1.0, 1.0 + 1e-9, -5.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_sampler(SampleConfig(5e-324), seed=0)(logits, NOTHING_SEEN).tolist() == [1]
    np.testing.assert_allclose(softmax(scale_by_temperature(logits[0], 1e300)), 1 / 3)


def test_top_k_beyond_the_vocabulary_means_all():
    logits = np.random.default_rng(0).normal(size=(1, 7))
    some, all_ = (make_sampler(SampleConfig(top_k=k), seed=5) for k in (1000, None))
    for _ in range(50):
        assert some(logits, NOTHING_SEEN) == all_(logits, NOTHING_SEEN)


def draws(seed, rows, n=30):
    logits = np.tile(np.random.default_rng(0).normal(size=50), (rows, 1))
    pick = make_sampler(SampleConfig(), seed)
    return np.stack([pick(logits, np.zeros((rows, 1), int)) for _ in range(n)])


def test_the_same_seed_draws_the_same():
    np.testing.assert_array_equal(draws(1, 3), draws(1, 3))
    assert (draws(1, 3) != draws(2, 3)).any()
    assert (draws(None, 3) != draws(None, 3)).any()


def test_the_stream_of_a_seed_is_fixed():
    assert draws(42, 2, 6).T.tolist() == [[17, 33, 11, 32, 25, 24], [46, 29, 1, 26, 35, 5]]


def test_a_row_does_not_depend_on_the_others():
    alone, among = draws(9, 1), draws(9, 4)
    np.testing.assert_array_equal(among[:, :1], alone)
    assert all((among[:, 0] != among[:, i]).any() for i in range(1, 4))
    assert (draws(2**32 + 9, 1) != alone).any()  # long seeds are not cut off


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error_that_says_so(bad):
    for config in (SampleConfig(), SampleConfig(temperature=0)):
        with pytest.raises(TinyGPTError, match=r"of 3 values .* diverged"):
            make_sampler(config)(np.array([[0.0, bad, 1.0]]), NOTHING_SEEN)
    with pytest.raises(TinyGPTError, match="3 are infinite"):
        make_sampler(SampleConfig())(np.full((1, 3), -np.inf), NOTHING_SEEN)


@pytest.mark.parametrize("seed", [-1, 1.5, "7"])
def test_a_wrong_seed_is_an_error(seed):
    with pytest.raises(UsageError, match="seed"):
        make_sampler(SampleConfig(), seed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_settings_that_cannot_work_are_errors_that_name_them(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SampleConfig(**wrong)


@pytest.mark.parametrize("seed", range(4))
def test_penalties_are_those_of_a_naive_oracle(seed):
    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(size=20), rng.integers(0, 20, 30)
    bias = {int(i): float(rng.uniform(-100, 100)) for i in rng.integers(0, 25, 4)}
    penalties, prompt = Penalties(0.7, -0.3, bias), 12
    wanted = [float(x) for x in logits]
    for token in range(20):
        count = sum(1 for each in seen[prompt:] if each == token)
        wanted[token] -= count * -0.3 + (0.7 if count else 0.0)
        wanted[token] += bias.get(token, 0.0)
    np.testing.assert_allclose(penalties.apply(logits, seen[prompt:]), wanted)
    greedy = first_choice(SampleConfig(temperature=0), 0, penalties, prompt)
    assert greedy.pick(logits, seen) == int(np.argmax(wanted))
    config = SampleConfig(temperature=0.8, top_k=7, top_p=0.9)
    drawn = choose([logits], [seen], [first_choice(config, seed, penalties, prompt)])
    plain = choose([wanted], [seen], [first_choice(config, seed)])
    assert drawn.tolist() == plain.tolist()


def test_a_bias_decides_and_a_penalty_is_for_what_was_written_not_for_the_prompt():
    logits = np.array([3.0, 2.0, 1.0])
    pick = first_choice(SampleConfig(temperature=0), 0, Penalties(bias={2: 100.0})).pick
    assert pick(logits, np.array([0])) == 2
    once = first_choice(SampleConfig(temperature=0), 0, Penalties(presence=1.5), prompt=2)
    assert once.pick(logits, np.array([0, 0])) == 0
    assert once.pick(logits, np.array([0, 0, 0])) == 1
