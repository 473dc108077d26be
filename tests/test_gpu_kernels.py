"""Every kernel of training and decoding compiles for CUDA, and takes no more than it did."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RENEW = "renew the table with: python benchmarks/gpu_kernels.py --write"
MORE = 8
"""Registers that a kernel may take more than in the table: a card gives them out in eights."""
MOST_REGISTERS, MOST_SHARED = 255, 48 << 10


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu_kernels")
    del sys.modules["gpu_kernels"]


@pytest.fixture
def compiler(program: ModuleType) -> object:
    try:
        return program.Nvrtc()
    except OSError as error:
        pytest.skip(f"no compiler for CUDA: {error}")


def worse(program: ModuleType, row: object, before: object, registers: bool) -> Iterator[str]:
    """What a kernel takes more of than it did, or than it may if it is new."""
    known = before or program.Compiled("", "", "", MOST_REGISTERS, 0, 0, MOST_SHARED, False)
    limits = {"spilled": 0, "stack": 0, "shared": 0} | ({"registers": MORE} if registers else {})
    for what, more in limits.items():
        found, most = getattr(row, what), getattr(known, what) + more
        if found > most:
            yield f"{row.kernel} ({row.plan}) on {row.card}: {what} {found} > {most}; {RENEW}"
    if known.tensor_cores and not row.tensor_cores:
        yield f"{row.kernel} ({row.plan}) is computed without tensor cores now"


def compared(program: ModuleType, compiler: object, plan: str, cards: tuple[str, ...]) -> list[str]:
    """What became worse in a plan."""
    table, same = program.read_table(), compiler.version == program.SEEN_WITH
    rows = program.compiled(compiler, plan, program.capture(plan), cards)
    found = {row.key: row for row in rows}
    new = [key for key in found if key not in table]
    assert len(new) < len(found) / 2, f"{new} are new; {RENEW}"
    return [
        text for row in found.values() for text in worse(program, row, table.get(row.key), same)
    ]


def test_training_in_bfloat16_on_an_h100(program: ModuleType, compiler: object) -> None:
    assert not compared(program, compiler, "train-bf16", ("sm_90",))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["train", "train-bf16", "muon", "decode", "decode-bf16"])
def test_every_kernel_on_every_card(program: ModuleType, compiler: object, plan: str) -> None:
    assert not compared(program, compiler, plan, program.CARDS)


def test_the_table_has_every_plan_and_card(program: ModuleType) -> None:
    rows = program.read_table().values()
    assert {(row.plan, row.card) for row in rows} == {
        (plan, card) for plan in program.PLANS for card in program.CARDS
    }
    assert all(row.shared <= MOST_SHARED for row in rows)
    attention = [row for row in rows if "attention" in row.kernel]
    assert attention and not [row for row in attention if row.spilled]
    ours = [row for row in rows if row.plan == "train-bf16" and "attention" in row.kernel]
    assert len(ours) == 3 * len(program.CARDS) and all(row.tensor_cores for row in ours)


def test_products_of_training_in_bfloat16_are_on_tensor_cores(program: ModuleType) -> None:
    """Three of each linear layer, and of the output projection, whose 50257 rows are padded."""
    rows = [r for r in program.read_table().values() if (r.plan, r.card) == ("train-bf16", "sm_90")]
    assert sum(row.tensor_cores for row in rows if row.kernel.startswith("r_")) >= 14


def test_what_became_worse_is_said(program: ModuleType) -> None:
    before = program.Compiled("train", "f", "sm_90", 96, 0, 0, 0, True)
    after = program.Compiled("train", "f", "sm_90", 105, 8, 8, 0, False)
    told = list(worse(program, after, before, registers=True))
    assert len(told) == 4 and "registers 105 > 104" in told[-2] and RENEW in told[0]
    assert not list(worse(program, before, before, registers=True))
    assert list(worse(program, after, None, registers=False)) == [
        t for t in told if "spilled" in t or "stack" in t
    ]


def test_a_kernel_that_does_not_compile_is_an_error(program: ModuleType, compiler: object) -> None:
    with pytest.raises(ValueError, match="undefined"):
        compiler.compile('extern "C" __global__ void f() { g(); }', "sm_90")
