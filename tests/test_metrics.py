import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygpt.errors import DataError
from tinygpt.metrics import History, bits_per_byte, perplexity, read, smooth

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8)
)
rows = st.lists(
    st.dictionaries(st.text(max_size=6).filter(lambda k: k != "nonfinite"), values, max_size=5),
    max_size=6,
)


def same(left, right):
    return repr(left) == repr(right)  # repr, because NaN differs from itself


def test_perplexity_is_exp_of_the_loss_and_never_overflows():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(65)) == pytest.approx(65)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), tokens=1000, n_bytes=1000) == pytest.approx(8)
    with pytest.raises(DataError, match="n_bytes=0"):
        bits_per_byte(1.0, tokens=0, n_bytes=0)


def test_smoothing_keeps_a_constant_and_bridges_gaps():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([3.0, math.nan, None, 3.0]) == pytest.approx([3.0] * 4)
    assert smooth([1.0, 5.0, 2.0], weight=0.0) == [1.0, 5.0, 2.0]
    assert math.isnan(smooth([None])[0])
    assert smooth([]) == []


@quick
@given(rows)
def test_rows_come_back_as_they_were_written(tmp_path, written):
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    with History(path) as history:
        for row in written:
            history.append(row)
        assert same(history.rows, written)
    assert same(list(read(path)), written)


@quick
@given(rows, st.data())
def test_a_torn_last_line_costs_only_that_line(tmp_path, written, data):
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    with History(path) as history:
        for row in written:
            history.append(row)
    whole = path.read_bytes() if written else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    survived = list(read(path))
    assert same(survived, written[: len(survived)])
    assert len(survived) >= whole[:cut].count(b"\n")
    with History(path) as history:
        history.append({"iter": 99})
    assert same(list(read(path)), [*survived, {"iter": 99}])


def test_every_line_is_strict_json_also_for_a_loss_that_is_not_a_number(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "m.jsonl"
    with History(path) as history:
        history.append({"iter": 1, "train_loss": math.nan, "grad_norm": -math.inf, "lr": 0.1})
    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["train_loss"] is None
    assert line["nonfinite"] == {"train_loss": "nan", "grad_norm": "-inf"}
    row = next(read(path))
    assert math.isnan(row["train_loss"]) and row["grad_norm"] == -math.inf and row["lr"] == 0.1


def test_each_row_is_in_the_file_before_the_next_step(tmp_path):
    path = tmp_path / "run" / "m.jsonl"
    history = History(path)
    for step in range(3):
        history.append({"iter": step})
        assert path.read_text().count("\n") == step + 1
    history.close()


def test_numpy_numbers_are_written_as_plain_ones(tmp_path):
    with History(tmp_path / "m.jsonl") as history:
        history.append({"train_loss": np.float32(0.5), "iter": np.int64(3)})
    assert history.rows == [{"train_loss": 0.5, "iter": 3}]


@pytest.mark.parametrize("in_memory", [True, False])
def test_truncating_drops_the_steps_beyond_a_checkpoint(tmp_path, in_memory):
    history = History(None if in_memory else tmp_path / "m.jsonl")
    for step in range(5):
        history.append({"iter": step})
    history.truncate_after(2)
    assert [row["iter"] for row in history] == [0, 1, 2]
    history.append({"iter": 3})
    assert [row["iter"] for row in history.rows] == [0, 1, 2, 3]
    history.close()
    assert [path.name for path in tmp_path.iterdir()] == ([] if in_memory else ["m.jsonl"])


def test_a_history_that_was_never_written_is_empty(tmp_path):
    history = History(tmp_path / "none.jsonl")
    assert history.rows == []
    history.truncate_after(0)
    assert not (tmp_path / "none.jsonl").exists()


def test_damage_in_the_middle_names_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1}\n{"iter": \n{"iter": 3}\n')
    with pytest.raises(DataError, match=r"line 2: not a JSON object.*delete"):
        list(read(path))


def test_a_very_long_torn_line_is_mended(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1}\n{"text": "' + "x" * 20_000)
    with History(path) as history:
        history.append({"iter": 2})
    assert history.rows == [{"iter": 1}, {"iter": 2}]
