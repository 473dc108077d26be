"""Chromium for the tests of pages: one browser for each file, a fresh profile for each test.

Playwright keeps an event loop running in the thread that it was started in, where no other can then
be run. So a browser ends with its file, and leaves the next one a thread without a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 60_000
"""Milliseconds until something is given up: a kernel may have to be compiled first."""
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; tests that need it are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


OpenPage = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens addresses, each in a profile of its own; keywords are those of ``new_context``.

    At the end of the test nothing may have gone wrong in any of them: no error in the console and
    no request to another server.
    """
    opened: list[Watched] = []

    def open_(address: str, **profile: Any) -> Page:
        watched = Watched(browser, address, profile)
        opened.append(watched)
        return watched.page

    yield open_
    for watched in opened:
        watched.page.context.close()
        assert not watched.problems, watched.problems


class Watched:
    """A page, and what it should not have done."""

    def __init__(self, browser: Browser, address: str, profile: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.address = address
        context = browser.new_context(**{"reduced_motion": "reduce", **profile})
        context.set_default_timeout(PATIENCE)
        self.page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._request)
        self.page.goto(address)

    def _console(self, message: Any) -> None:
        refused = "Failed to load resource" in message.text  # a refusal that the page deals with
        if message.type in ("error", "warning") and not refused:
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        origin = "/".join(self.address.split("/")[:3])
        if not request.url.startswith((origin, "data:", "blob:")):
            self.problems.append(f"request: {request.url}")


def axe_violations(page: Page) -> list[str]:
    """What axe finds wrong with a page for people who see, hear or move otherwise."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe").Axe()
    page.evaluate("document.getAnimations().forEach((animation) => animation.finish())")
    return [
        f"{violation['id']}: {node['html'][:120]} {node['failureSummary']}"
        for violation in axe.run(page).response["violations"]
        for node in violation["nodes"]
    ]


def overflow(page: Page) -> int:
    """Pixels by which a page is wider than its window."""
    script = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    width: int = page.evaluate(script)
    return width
