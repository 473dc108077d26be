"""Our kernels as WGSL, each judged by the compiler of a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import ARGUMENTS, CHROMIUM

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SOURCES = """
import json
from tinygpt.machine import start
start()
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Compiler
from tinygpt import kernels

class Recorder(Compiler):
    def compile(self, src):
        sources.append(src)
        return b""

sources = []
Device[Device.DEFAULT].renderer.compiler = Recorder(None)

def computed(result, *given):
    Tensor.realize(result, *result.gradient(*given, gradient=Tensor.empty(*result.shape)))

f = Tensor.empty
ids = lambda *shape: Tensor.empty(*shape, dtype=dtypes.int32)
qkv, w, b = f(2, 40, 96), f(11, 32), f(32)
computed(kernels.self_attention(qkv, 2), qkv)
computed(kernels.self_attention(qkv, 2, 0.1, Tensor.empty(2, dtype=dtypes.uint32)), qkv)
computed(kernels.layer_norm(x := f(20, 32), b, b), x, b)
computed(kernels.embedding(ids(2, 7), w), w)
computed(kernels.cross_entropy(x := f(8, 11), ids(8)), x)
computed(kernels.gelu(x := f(8, 32)), x)
cache = f(2, 2, 20, 16), f(2, 2, 20, 16)
kernels.rows_attention(f(2, 96), *cache, ids(2), ids(2)).realize()
Tensor.realize(*kernels.keep(f(7, 96), *cache, ids(1)))
state = [f(3, 5)], [f(3, 5)], [f(3, 5)], [f(3, 5)]
rates = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": [0.1], "clip": 1.0}
kernels.adamw_update(*state, f(1), f(1), f(1), **rates).realize()
print(json.dumps(sources))
"""

JUDGE = """async sources => {
  const adapter = navigator.gpu && await navigator.gpu.requestAdapter();
  if (!adapter) return null;
  const device = await adapter.requestDevice(), found = [];
  for (const code of sources) {
    const information = await device.createShaderModule({code}).getCompilationInfo();
    found.push(information.messages.filter(m => m.type === "error").map(m => m.message));
  }
  return found;
}"""

SOFTWARE_CARD = [
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"),
    *("--use-vulkan=swiftshader", "--disable-vulkan-surface"),
]


def test_a_browser_takes_every_kernel(browser: Browser, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # kernels that are stored are not written again
        done = subprocess.run(
            [sys.executable, "-c", SOURCES],
            env=os.environ | {"DEV": "NULL:WGSL", "CACHEDB": str(Path(folder, "kernels.db"))},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.returncode == 0, done.stderr
    sources = json.loads(done.stdout)
    assert len(sources) >= 20 and sum("attention_" in source for source in sources) >= 9
    (tmp_path / "empty.html").write_text("<!doctype html><title>WGSL</title>")
    given = [*(a for a in ARGUMENTS if a != "--disable-gpu"), *SOFTWARE_CARD]
    chromium = browser.browser_type.launch(executable_path=CHROMIUM, args=given)
    try:
        page = chromium.new_page()
        page.goto((tmp_path / "empty.html").as_uri())
        found = page.evaluate(JUDGE, [*sources, "fn broken() { let x: u32 = 1.5; }"])
    finally:
        chromium.close()
    if found is None:
        pytest.skip("this Chromium has no emulated graphics card")
    *errors, broken = found
    assert broken and not [told for told in errors if told]
