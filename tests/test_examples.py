"""The programs that define the interface run as they stand, under both names, on a small scale."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALLER = {"max_iters=2000": "max_iters=2", "max_tokens=100": "max_tokens=3"}


def run(name, folder):
    text = (EXAMPLES / name).read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("seed", ["gpt", "minimiggy"])
def test_train_generate_and_checkpoint_as_printed(seed, tmp_path):
    pytest.importorskip("ziglang", reason="the GPT-2 vocabulary comes with the extra 'offline'")
    run(f"{seed}_train.py", tmp_path)
    assert (tmp_path / "checkpoints" / "ckpt_2.safetensors").is_file()
    assert run(f"{seed}_generate.py", tmp_path).startswith("ROMEO:")
    assert "step 1000" in run(f"{seed}_checkpoint.py", tmp_path)


def test_both_names_export_the_whole_interface():
    import gpt
    import minimiggy
    import tinygpt

    for name in tinygpt.__all__:
        assert getattr(gpt, name) is getattr(minimiggy, name) is getattr(tinygpt, name)
    wanted = re.findall(r"\w+", "GPT GPTConfig TrainConfig BPETokenizer train load gradcheck")
    assert set(wanted) <= set(tinygpt.__all__)


def test_train_and_gradcheck_are_functions_whatever_was_imported_before():
    import tinygpt
    import tinygpt.training.gradcheck
    from tinygpt import api

    assert tinygpt.train is api.train
    assert tinygpt.gradcheck is tinygpt.training.gradcheck.gradcheck
    assert callable(tinygpt.train) and callable(tinygpt.gradcheck)
