"""Pictures of the pages for the README: `screenshots.py RUN docs`, with the run's model.

Those of the dashboard show two short trainings on the text that comes with TinyGPT.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.browser import ARGUMENTS, CHROMIUM

PROMPT = "ROMEO:\nWhat shall I say to "
PROGRAM = (sys.executable, "-P", "-m", "tinygpt")
WINDOW = {"width": 1180, "height": 940}
TRAININGS = {"rate-3e-3": "3e-3", "rate-1e-3": "1e-3"}
"""The runs of the dashboard's pictures: names and learning rates."""


@contextlib.contextmanager
def answering(command: str, place: str, address: str = r"http[^\s#]+") -> Iterator[str]:
    """The address that `tinygpt serve` or `tinygpt dashboard` says first, by its pattern."""
    words = [*PROGRAM, command, place, "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = server.stderr.readline()
            found = re.search(address, said)
            if found is None:
                sys.exit(f"{place} cannot be shown: {said}{server.stderr.read()}")
            yield found[0]
        finally:
            server.terminate()


def write_some(page: Page, address: str) -> None:
    """The same text each time: the seed is held."""
    page.goto(address)
    page.get_by_label("Text to continue").fill(PROMPT)
    page.locator(".more summary").click()
    page.locator("#random").uncheck()
    for name, value in {"seed": 12, "max_tokens": 56, "temperature": 0.8}.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator(".more summary").click()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#status")).to_have_text("56 tokens written.", timeout=60_000)


def open_a_token(page: Page) -> None:
    """Go back to a token of the middle."""
    title = page.locator("#candidates h3")
    for _ in range(12):
        before = title.inner_text()
        page.get_by_role("button", name="Token before").click()
        expect(title).not_to_have_text(before)
    expect(page.locator("#candidates [aria-current]")).to_be_visible(timeout=60_000)
    expect(page.locator(".candidates")).to_have_attribute("aria-busy", "false", timeout=60_000)
    page.mouse.move(0, 0)


def open_attention(page: Page) -> None:
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#pair")).to_contain_text("looks at", timeout=60_000)
    page.locator("#window").select_option("24")
    expect(page.locator("#attention")).to_contain_text("Layer")
    page.get_by_role("button", name="Head 1").click()


def take(run: str, folder: Path) -> None:
    with answering("serve", run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for scheme, name in (("light", "playground.png"), ("dark", "playground-dark.png")):
            profile: dict[str, Any] = {"viewport": WINDOW, "color_scheme": scheme}
            page = browser.new_page(**profile, reduced_motion="reduce")
            for _ in range(2):  # the first time kernels are compiled, and the speed is not theirs
                write_some(page, address)
            open_a_token(page)
            page.screenshot(path=folder / name)
            if scheme == "light":
                open_attention(page)
                page.wait_for_timeout(3000)  # for the shorter map
                page.locator("section.inside").screenshot(path=folder / "attention.png")
            page.close()
        take_trained(folder, browser)
        take_exported(run, folder / "web.png", browser)
        browser.close()


def take_trained(folder: Path, browser: Browser) -> None:
    """Two runs on the dashboard, with the pointer on a step."""
    with tempfile.TemporaryDirectory() as runs:
        for name, rate in TRAININGS.items():
            train_briefly(Path(runs) / name, rate)
        with answering("dashboard", runs, r"http\S+") as address:  # with the key
            for scheme, name in (("light", "dashboard.png"), ("dark", "dashboard-dark.png")):
                profile: dict[str, Any] = {"viewport": WINDOW, "color_scheme": scheme}
                page = browser.new_page(**profile, reduced_motion="reduce")
                page.goto(address)
                page.get_by_role("button", name=next(iter(TRAININGS))).click()
                expect(page.locator("#name")).to_have_text(next(iter(TRAININGS)))
                expect(page.locator("#link")).to_have_text("live")
                page.locator("#loss > canvas").hover(position={"x": 360, "y": 120})
                expect(page.locator("#loss .tip")).to_contain_text("validation")
                page.screenshot(path=folder / name)
                page.close()


def train_briefly(out: Path, rate: str) -> None:
    words = ["train", "auto", "--preset", "baby", "--out", str(out), "--max-iters", "500"]
    words += ["--learning-rate", rate, "--eval-interval", "50"]
    subprocess.run([*PROGRAM, *words], check=True, stderr=subprocess.PIPE)


def take_exported(run: str, picture: Path, browser: Browser) -> None:
    """The run as one web page, which a link has set to write."""
    with tempfile.TemporaryDirectory() as name:
        page_file = Path(name) / "page.html"
        command = [*PROGRAM, "export", "web", run, "--out", str(page_file)]
        subprocess.run([*command, "--title", "A very small GPT"], check=True)
        page = browser.new_page(viewport=WINDOW, reduced_motion="reduce")
        settings = {"prompt": "The ", "seed": 4, "max_tokens": 120, "temperature": 0.8}
        query = urllib.parse.urlencode(settings, quote_via=urllib.parse.quote)
        page.goto(f"{page_file.as_uri()}#{query}")
        page.wait_for_selector("html[data-pace]", state="attached", timeout=60_000)
        page.screenshot(path=picture)
        page.close()


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
