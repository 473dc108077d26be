"""C to WebAssembly, by the clang of the wheel ``ziglang`` or of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tinygpt.errors import KernelError, extras
from tinygpt.machine.device import bundled_zig

FLAGS = (
    *("-O3", "-msimd128", "-mbulk-memory", "-mnontrapping-fptoint", "-ffreestanding", "-nostdlib"),
    *("-fno-math-errno", "-fno-ident", "-Wno-everything"),
    # Sums may be taken in another order, which vectors need. Not -ffast-math: masks are infinite.
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-freciprocal-math"),
    *("-Wl,--no-entry", "-Wl,--strip-all", "-Wl,-z,stack-size=1048576"),
)


def compile_wasm(text: str) -> bytes:
    """The module that this C text is, which imports nothing; the same text gives the same bytes."""
    with tempfile.TemporaryDirectory(prefix="tinygpt-") as folder:
        source, module = Path(folder) / "model.c", Path(folder) / "model.wasm"
        source.write_text(text)
        done = subprocess.run(
            [*_compiler(), *FLAGS, source.name, "-o", module.name],
            cwd=folder,
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": folder},  # else it needs a home folder
            capture_output=True,
            check=False,
        )
        if done.returncode or not module.is_file():
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise KernelError(
                f"The model could not be compiled to WebAssembly: {' '.join(reason[:2])[:300]}"
            )
        return module.read_bytes()


def _compiler() -> list[str]:
    if zig := bundled_zig():
        return [str(zig), "cc", "-target", "wasm32-freestanding"]
    clang = shutil.which("clang")
    if clang and shutil.which("wasm-ld"):
        return [clang, "--target=wasm32"]
    raise extras.missing(
        "web",
        "There is no compiler for WebAssembly here: neither the wheel ziglang nor a clang with "
        "wasm-ld.",
    )
