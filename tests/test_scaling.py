"""The model of what ranks and devices cost, and benchmarks/scale.py end to end in tiny sizes."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.test_benchmarks import FOLDER, benchmark
from tests.test_ranks import Threads, mpiexec
from tinygpt.machine.flat_buffer import FlatBuffer
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.ranks.tree import TreeSum
from tinygpt.machine.transfer import read
from tinygpt.training.accumulation import PartialSums
from tinygpt.training.meeting import Meeting
from tinygpt.training.optim import AdamW

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from benchmark("cost", monkeypatch)


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from benchmark("scale", monkeypatch)


# ---- the model's arithmetic ----


@pytest.mark.parametrize("name", ["cost", "scale_past"])
def test_examples_of_the_model_are_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in benchmark(name, monkeypatch):
        result = doctest.testmod(found)
        assert result.attempted and not result.failed


def host(cost: ModuleType, cores: int) -> Any:
    alone, together = cost.Parts(1.0, 0.1, 0.2, 0.01, 0.5, {2: 1.5}), cost.Parts(2, 0.1, 0.2, 0.01)
    links = {2: cost.Link(0.001, 1000), 4: cost.Link(0.002, 500)}
    return cost.Host(cores, 100, 7, {1: alone, 2: together}, links, cost.Link(0.003, 400))


def test_a_step_is_the_sum_of_its_parts(cost: ModuleType) -> None:
    foresee, two_cores = cost.foresee, host(cost, 2)
    one = foresee(two_cores, cost.Plan(4))
    assert one.seconds == pytest.approx(4 * 1.0 + 2 * 0.1 + 0.2 + 0.01) and one.exchange == 0
    devices = foresee(two_cores, cost.Plan(4, devices=2))
    copies = 2 * 7 * 0.003 + 2 * 100 / 400  # there and back, each Tensor by itself
    assert devices.seconds == pytest.approx(4 * 1.5 + 2 * 0.1 + 0.21 + copies)
    ranks = foresee(two_cores, cost.Plan(4, ranks=2))
    assert ranks.seconds == pytest.approx(2 * 2.0 + 0.21 + 2 * 0.001 + 100 / 1000)
    away = foresee(two_cores, cost.Plan(4, ranks=2, delay=0.05))
    assert away.seconds - ranks.seconds == pytest.approx(0.1)
    assert ranks.efficiency == pytest.approx(4 / ranks.seconds)


def test_more_ranks_than_cores_take_turns(cost: ModuleType) -> None:
    plan = cost.Plan(4, ranks=4)
    crowded, roomy = cost.foresee(host(cost, 2), plan), cost.foresee(host(cost, 4), plan)
    assert crowded.compute == 2 * roomy.compute == 2 * 2.0
    assert crowded.update == 2 * roomy.update == pytest.approx(2 * 0.21)
    assert crowded.exchange == roomy.exchange == pytest.approx(6 * 0.002 + 150 / 500)


def test_a_meeting_costs_one_exchange_in_so_many_steps(cost: ModuleType) -> None:
    found = host(cost, 2)
    often = cost.foresee(found, cost.Plan(4, ranks=2, delay=0.05))
    rare = cost.foresee(found, cost.Plan(4, ranks=2, delay=0.05, sync_every=10))
    assert rare.compute == often.compute
    assert rare.exchange == pytest.approx(often.exchange / 10)  # the parts' meeting is free
    assert cost.sent(cost.Plan(4, ranks=4, sync_every=10), 100) == 15


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_found_again_in_its_times(cost: ModuleType, ranks: int) -> None:
    link = cost.Link(2e-5, 3e9)
    seconds = {size: link.exchange(ranks, size) for size in (1 << 14, 1 << 18, 1 << 22)}
    found = cost.Link.of_ranks(ranks, seconds)
    assert found.latency == pytest.approx(2e-5) and found.bandwidth == pytest.approx(3e9)
    noisy = {size: t * (1.05 if i % 2 else 0.95) for i, (size, t) in enumerate(seconds.items())}
    assert cost.Link.of_ranks(ranks, noisy).exchange(ranks, 1 << 20) == pytest.approx(
        link.exchange(ranks, 1 << 20), rel=0.1
    )


def test_noise_gives_no_negative_link(cost: ModuleType) -> None:
    steep = cost.Link.fit(1, 1, {100: 1.0, 1000: 20.0})
    assert steep.latency == 0 and steep.bandwidth > 0
    falling = cost.Link.fit(1, 1, {100: 5.0, 1000: 1.0})
    assert falling.latency > 0 and falling.carry(0, 1000) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 40])
def test_carries_are_those_that_are_made(cost: ModuleType, count: int) -> None:
    sums, made = PartialSums([((3,), "CPU")]), list[int]()
    sums._add_level = lambda: (  # type: ignore[method-assign]
        sums.levels.append(FlatBuffer([((3,), "CPU")])), sums._carries.append(made.append)
    )  # fmt: skip
    sums.sum(count, lambda i, first: None)
    assert len(made) == cost.carries(count)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sync_every", [None, 5])
def test_memory_is_that_of_the_buffers(
    cost: ModuleType, ranks: int, sync_every: int | None
) -> None:
    """Weights and moments, and what sums, exchanges and meetings have allocated."""
    from tinygrad import Tensor

    kinds, plan = [((3000,), "CPU")], cost.Plan(4, ranks=ranks, sync_every=sync_every)
    sums = PartialSums(kinds)
    sums._add_level = lambda: sums.levels.append(FlatBuffer(kinds))  # type: ignore[method-assign]
    sums._carry = lambda group, top: None  # type: ignore[method-assign]
    sums.sum(plan.own, lambda i, first: None)
    size = sums.levels[0].array.nbytes
    buffers = [level.array for level in sums.levels]

    def exchange(comm: Any) -> Any:
        total, array = TreeSum(comm, ranks), np.ones(size // 4, np.float32)
        total(array, array)
        return total._buffer

    if ranks > 1:
        buffers.append(Threads(ranks).run(exchange)[0])
    if sync_every:
        weights = Tensor.zeros(3000).contiguous().realize().is_param_(True)
        made = Meeting(AdamW({"weight": weights}), Alone())
        buffers += [made._moved.array, made._start.array, *map(read, made._velocity)]
    held = sum(array.nbytes for array in buffers) + 3 * size
    assert cost.memory(plan, size) == pytest.approx(held, rel=0.01)


def test_where_a_cluster_bends(cost: ModuleType) -> None:
    """Ranks by latency, devices by the first one's link; sharing it out moves that away."""
    link, size = cost.Link(1e-3, 1e9), 1e8
    ranks = cost.Cluster(2, 1.0, 0.0, link, size)
    assert ranks.where_it_bends() == 512  # 2 · 511 ms + 0.2 s
    assert cost.Cluster(2, 0.1, 0.0, link, size, micro_batches=10).where_it_bends() == 512
    first = cost.Cluster(2, 1.0, 0.0, link, size, tensors=1)
    assert first.where_it_bends() == 8  # 14 · 0.1 s
    assert cost.Cluster(2, 1.0, 0.0, link, size, tensors=1, shared=True).where_it_bends() is None
    assert cost.Cluster(2, 0.1, 0.0, link, size, sync_every=10).where_it_bends() == 512


# ---- the benchmark ----


def test_tables_replace_what_is_between_their_lines(scale: ModuleType) -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    filled = scale.fill(text, "x", ["| new \\1 |"])
    assert filled == "a\n<!-- x -->\n| new \\1 |\n<!-- /x -->\nb\n"
    assert scale.fill(filled, "x", ["| new \\1 |"]) == filled
    with pytest.raises(SystemExit, match="no place for y"):
        scale.fill(text, "y", [])


def test_rows_say_how_far_off_they_are(scale: ModuleType, cost: ModuleType) -> None:
    parts = dict.fromkeys(scale.PARTS, 0.0) | {"micro_batch": 0.1}
    plans = {cost.Plan(4): 0.4, cost.Plan(4, ranks=2): 0.5}
    found = scale.Round({1: parts, 2: parts}, {2: {100: 0.2, 200: 0.2}}, {100: 1.0}, plans)
    lines, far = scale.table_of_rows([found, found], 100, 7)
    assert lines[2].startswith("| 1 device | 400.0 (400.0-400.0) ms | 400.0 ms | 400.0 | 0.0 |")
    assert lines[2].endswith("| +0% |") and lines[3].endswith("| -20% |") and far == 1


def test_a_small_run_of_the_benchmark_fills_a_document(tmp_path: Path) -> None:
    """Every row is checked for its losses, weights and traffic before it is timed."""
    out, document = tmp_path / "found.json", tmp_path / "scaling.md"
    document.write_text(DOCUMENT.read_text("utf-8"), "utf-8")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "scale.py"), "--smoke", "--json", str(out), "--write",
         str(document)],
        env=os.environ | {"DEV": "CPU"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = json.loads(out.read_text("utf-8"))["rounds"]
    rows = ["1 device", "2 devices"]
    if mpiexec():
        rows += ["2 ranks", "2 ranks, 1 ms away", "2 ranks, meeting every 2 steps"]
        rows += ["2 ranks, 1 ms away, meeting every 2 steps"]
    assert list(found["steps"]) == rows
    assert min(*found["steps"].values(), *found["parts"]["1"].values()) > 0
    filled = document.read_text("utf-8")
    assert all(f"| {row} |" in filled for row in [*rows, "between two devices"])
    assert "1024 laptops at home" in filled and "Not yet measured" not in filled
