"""The register tiles of the products stay in the registers, whatever the processor.

The products are compiled for it with tinygrad's own flags, and nothing is run.
"""

from __future__ import annotations

import subprocess
from functools import cache

import pytest
from tinygrad import Device

from tests.assembly import KINDS, innermost_blocks, product_source
from tinygpt.kernels.matmul import tiles_of
from tinygpt.kernels.phases import build

pytestmark = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="needs the CPU's compiler")

INTEL = "vendor_id : GenuineIntel flags : sse2 avx2 fma avx512f"
AMD = "vendor_id : AuthenticAMD flags : sse2 avx2 fma avx512f"
X86 = ("x86_64", ["--target=x86_64-none-unknown-elf"])
ARM = ("arm64", ["--target=arm64-none-unknown-elf", "-ffixed-x18"])
PROCESSORS = {
    "skylake-avx512": (X86, INTEL, 8),
    "icelake-server": (X86, INTEL, 8),
    "sapphirerapids": (X86, INTEL, 8),
    "graniterapids": (X86, INTEL, 8),
    "haswell": (X86, "vendor_id : GenuineIntel flags : sse2 avx avx2 fma", 8),
    "znver3": (X86, "vendor_id : AuthenticAMD flags : sse2 avx avx2 fma", 8),
    "znver4": (X86, AMD, 16),
    "znver5": (X86, AMD, 16),
    "x86-64-v2": (X86, "vendor_id : GenuineIntel flags : sse2 ssse3 sse4_2", 4),
    "sandybridge": (X86, "vendor_id : GenuineIntel flags : sse2 sse4_2 avx", 8),
    "apple-m1": (ARM, "", 4),
    "neoverse-n1": (ARM, "Features : fp asimd", 4),
    "neoverse-v2": (ARM, "Features : fp asimd sve sve2", 4),
}
"""Machine and compiler's target, what Linux says, and how many floats its vectors take."""


@cache
def source(lanes: int, rows: int) -> str:
    build.cache_clear()
    return "\n".join(product_source(lanes, rows, kind) for kind in KINDS)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_tile_of_a_product_stays_in_the_registers(processor: str) -> None:
    (machine, target), described, floats = PROCESSORS[processor]
    tiles = tiles_of(machine, described)
    flag = "-mcpu" if machine == "arm64" else "-march"
    try:
        blocks = innermost_blocks(
            "\n".join(source(*tile) for tile in tiles.items()),
            [*target, f"{flag}={processor}"],
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this compiler cannot compile for {processor}: {error.stderr[:200]}")
    assert len(blocks) == len(tiles) * len(KINDS)
    for lanes, rows in tiles.items():
        for kind in KINDS:
            block = blocks[f"product_{lanes}_{rows}_{kind}"]
            assert block.spills == 0, (lanes, rows, kind)
            assert block.multiplications >= lanes * rows // floats, (lanes, rows, kind)


def test_every_processor_has_a_tile_for_few_columns_and_for_attention() -> None:
    for (machine, _), described, _ in PROCESSORS.values():
        tiles = tiles_of(machine, described)
        assert min(tiles) <= 16
        assert any(rows in (4, 8) for rows in tiles.values())  # of which head sizes are multiples
