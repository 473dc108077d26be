"""Every test runs in the same small world: own caches, no network, fixed terminal, fixed seeds."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest

from tests.browser import browser, open_page
from tinygpt import machine
from tinygpt.machine.pool import recorded

__all__ = ["browser", "open_page"]

# The kernel cache that this chooses stays the user's own: kernels compiled in the last run are used
# again. Everything else is cached in a folder of this run.
machine.start()

CUTS = (1, 2, 5)
"""For ``cut``: numbers of pieces that must not matter."""
LOCAL = ("127.0.0.1", "::1", "localhost")

hypothesis.settings.register_profile("tinygpt", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tinygpt")


SLOW = 3600
"""Seconds for a test that is known to take minutes; pyproject.toml has those for all others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW))


@pytest.fixture(scope="session", autouse=True)
def foreground() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and so would its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def no_event_loop_is_left() -> Iterator[None]:
    """A file that leaves one running makes every ``asyncio.run`` after it fail."""
    yield
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


@pytest.fixture(scope="module")
def only_what_is_new_is_counted() -> Iterator[None]:
    """A collection leaves out the objects of the tests before, through which it goes for seconds:
    for files that count objects or memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``cut(n)``: kernels come in up to n pieces from now on, however little they have to do."""
    from tinygpt.kernels import phases

    def into(pieces: int) -> None:
        phases.build.cache_clear()
        for name, value in (("MOST_PIECES", pieces), ("PIECE_OPS", 1), ("PIECE_BYTES", 1)):
            monkeypatch.setattr(phases, name, value)

    yield into
    phases.build.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Tests replace functions that a captured one calls, which a recording would not notice.
        patch.setenv(recorded.SWITCH, "0")
        # On a machine with several devices, doctor would take a step on each.
        patch.setattr("tinygpt.machine.pace.candidates", lambda: ["CPU"])
        patch.setenv("COLUMNS", "100")
        patch.setenv("LINES", "40")
        patch.setenv("NO_COLOR", "1")
        patch.delenv("FORCE_COLOR", raising=False)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")  # for child processes: nobody listens there
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, ",".join(LOCAL))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


def connect_locally(sock: socket.socket, address: object) -> None:
    """Stands in for ``socket.connect``: what leaves this machine is a mistake in the test."""
    if isinstance(address, tuple) and address[0] not in LOCAL:
        raise OSError(f"tests do not use the network, and this one asked for {address[0]}")
    connect(sock, address)


connect = socket.socket.connect


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(1337)
    np.random.seed(1337)
    if "tinygrad" in sys.modules:
        from tinygrad import Tensor

        Tensor.manual_seed(1337)


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment for a Python process that is to set itself up from nothing."""
    ours = ("CC", "CACHEDB", "PARALLEL", "DEV", "COV_CORE_SOURCE")
    return {name: value for name, value in os.environ.items() if name not in ours}
