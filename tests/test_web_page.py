"""What is the exported page's own, in a real browser, from a file, with the network off.

What it shares with the served one is tested for both in test_playground.py.
"""

from __future__ import annotations

import base64
import re
import urllib.parse
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.browser import (
    ARGUMENTS,
    CHROMIUM,
    OpenPage,
)
from tests.mixed_text import mixed_text
from tests.test_web import make
from tinygpt import GPT, BPETokenizer, ByteTokenizer, CharTokenizer, GPTConfig
from tinygpt.config import SampleConfig
from tinygpt.generation.stream import generate_text
from tinygpt.interop.web import export_web
from tinygpt.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TEXT = mixed_text(40_000)
HOSTILE = "</textarea></script><img src=x onerror=alert(1)>"
CARD = {
    "data": HOSTILE,
    "steps": 40,
    "curves": {"train": [[i, 5 - i / 20] for i in range(1, 41)], "val": [[20, 4.1], [40, 3.2]]},
}
TOKENIZERS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer(TEXT + HOSTILE),
    "bpe": BPETokenizer.train(TEXT, 400),
    "gpt2": BPETokenizer("gpt2"),
}


class Made(NamedTuple):
    model: GPT
    tokenizer: Tokenizer
    path: Path

    def text(self, prompt: str, count: int) -> str:
        """What ``tinygpt generate`` writes, greedily."""
        greedy = SampleConfig(temperature=0)
        pieces = generate_text(self.model, self.tokenizer, prompt, count, greedy)
        return prompt + "".join(pieces)


_made: dict[str, Made] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A page with the tokenizer that the test is parametrized with, or else bytes."""
    name = getattr(request, "param", "byte")
    if name not in _made:
        tokenizer = TOKENIZERS[name]
        model = make(GPTConfig(32, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32))
        path = tmp_path_factory.mktemp(name) / f"{name}.html"
        export_web(model, tokenizer, path, title=HOSTILE, description=HOSTILE, card=CARD)
        _made[name] = Made(model, tokenizer, path)
    return _made[name]


def link(path: Path, prompt: str, **settings: object) -> str:
    query = urllib.parse.urlencode({"prompt": prompt, **settings}, quote_via=urllib.parse.quote)
    return f"{path.as_uri()}#{query}"


def with_worker(text: str, before: str, after: str) -> str:
    """A page with something else in the script of its worker."""
    found = re.search(r'id="worker">(.*?)</script>', text)
    assert found is not None
    script = zlib.decompress(base64.b64decode(found[1])).decode()
    assert script.count(before) == 1
    changed = zlib.compress(script.replace(before, after).encode())
    return text.replace(found[1], base64.b64encode(changed).decode())


def ready(page: Page) -> Page:
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


def done(page: Page) -> str:
    """The text, once the page has finished to write."""
    page.wait_for_selector("#text[aria-busy=false]")
    return page.input_value("#text")


def write(page: Page) -> str:
    """Let the page go on; -> the text when it is done."""
    page.click("#continue")
    return done(page)


def set_up(page: Page, **settings: object) -> None:
    page.evaluate(
        "document.querySelectorAll('#settings, .more').forEach((e) => { e.open = true; })"
    )
    page.uncheck("#random")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))


@pytest.mark.parametrize("made", TOKENIZERS, indirect=True)
def test_greedy_text_is_that_of_generate(made: Made, open_page: OpenPage) -> None:
    prompt = "".join(c for c in "诗和远方 🙂 Größe: ROMEO" if c in TEXT or made.path.stem != "char")
    address = link(made.path, prompt, temperature=0, max_tokens=60)
    page = open_page(address, offline=True)
    page.wait_for_selector("html[data-pace]", state="attached")
    assert page.input_value("#text") == made.text(prompt, 60)


def test_hostile_prompts_and_names_are_text(made: Made, open_page: OpenPage) -> None:
    page = open_page(link(made.path, HOSTILE, temperature=0, max_tokens=5), offline=True)
    page.wait_for_selector("html[data-pace]", state="attached")
    assert page.input_value("#text") == made.text(HOSTILE, 5)
    assert page.title() == page.text_content("h1") == HOSTILE
    assert HOSTILE in (page.text_content("#card") or "")
    page.get_by_role("tab", name="Tokens").click()
    page.wait_for_selector(".cut")
    assert page.query_selector("img") is None


PRESS_STOP = """() => new Promise((resolve) => {
    const shown = document.getElementById('text').value.length;
    const look = () => {
        if (document.getElementById('text').value.length < shown + 10) return setTimeout(look);
        document.getElementById('continue').click();
        resolve();
    };
    look();
})"""
"""In the page itself, once it shows more: a small model would be done before a click from here.

Ten characters more, of which some are whole: the first bytes may all be parts of characters."""


REASONS = {
    "this browser has no WebAssembly": ("delete globalThis.WebAssembly", "", ""),
    "is not valid JSON": ("", '"card":{', '"card":{"x":NaN,'),
    "weights are missing at its end": ("", 'class="weights"', 'class="lost"'),
    "The scripts of this page have not run": ("", "const byId = ", "const ="),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_page_that_cannot_start_says_why(
    made: Made, browser: Browser, tmp_path: Path, reason: str
) -> None:
    before, good, bad = REASONS[reason]
    path, context = tmp_path / "page.html", browser.new_context()
    path.write_text(made.path.read_text().replace(good, bad, 1 if good else 0))
    page = context.new_page()
    if before:
        page.add_init_script(before)
    page.goto(path.as_uri())
    page.wait_for_selector(f"main >> text={reason}")
    assert not page.is_visible("#loading")
    context.close()


def test_writing_stops_and_goes_on(made: Made, open_page: OpenPage) -> None:
    page = ready(open_page(made.path.as_uri(), offline=True))
    set_up(page, temperature=0, max_tokens=100000)
    page.fill("#text", "Once")
    page.click("#continue")
    page.evaluate(PRESS_STOP)
    stopped = done(page)
    written = len(made.tokenizer.encode(stopped.rstrip("\ufffd"))) - 4
    assert 0 < written < 100000
    page.fill("#max_tokens", "20")
    longer = write(page)
    # as if it had never been stopped, within a character too
    assert made.text("Once", written + 40).startswith(longer.rstrip("\ufffd"))
    assert len(longer) > len(stopped)
    page.click("#undo")
    assert page.input_value("#text") == stopped
    page.click("#undo")
    assert page.input_value("#text") == "Once"
    page.click("#undo")
    assert page.input_value("#text") == "" and page.is_disabled("#undo")


@pytest.mark.parametrize("looking", [0, 300])
def test_warming_up_leaves_no_trace(
    made: Made, open_page: OpenPage, tmp_path: Path, looking: int
) -> None:
    """With a page that never stops by itself to run its model for nobody."""
    path = tmp_path / "page.html"
    path.write_text(with_worker(made.path.read_text(), "const WARM = 400;", "const WARM = 1e9;"))
    page = ready(open_page(path.as_uri(), offline=True))
    set_up(page, temperature=0, max_tokens=12)
    page.fill("#text", "Once")
    for count in (12, 24, 36):  # the last is beyond block_size
        page.wait_for_timeout(looking)
        assert write(page) == made.text("Once", count)


def test_the_text_can_be_changed_and_continued(made: Made, open_page: OpenPage) -> None:
    page = ready(open_page(made.path.as_uri(), offline=True))
    set_up(page, temperature=0, max_tokens=8)
    for prompt in ("Ein Anfang", "ein anderer", "e"):
        page.fill("#text", prompt)
        page.press("#text", "Control+Enter")
        assert done(page) == made.text(prompt, 8)


def test_a_page_that_is_slow_to_show_a_text_is_not_buried_in_messages(
    made: Made, open_page: OpenPage, tmp_path: Path
) -> None:
    """Of a model that tells each token by itself, where to lay out the text takes long."""
    path = tmp_path / "page.html"
    path.write_text(with_worker(made.path.read_text(), "const PAUSE = 16;", "const PAUSE = 0;"))
    page = ready(open_page(path.as_uri(), offline=True))
    page.evaluate("""() => {
        window.shown = 0;
        const { get } = Object.getOwnPropertyDescriptor(Element.prototype, 'scrollHeight');
        Object.defineProperty(document.getElementById('scroller'), 'scrollHeight', { get() {
            window.shown++;
            for (const began = performance.now(); performance.now() - began < 100; );
            return get.call(this);
        } });
    }""")
    set_up(page, temperature=0, max_tokens=300)
    page.fill("#text", "Once")
    assert write(page) == made.text("Once", 300)
    assert 0 < page.evaluate("window.shown") < 150  # it was 300


def test_a_link_is_of_the_text_that_is_there(made: Made, open_page: OpenPage) -> None:
    page = ready(open_page(made.path.as_uri(), offline=True))
    set_up(page, temperature=0, max_tokens=5)
    page.fill("#text", "abc")
    for _ in range(2):
        write(page)
    page.click("#undo")
    once = page.input_value("#text")

    def link_text() -> str:
        page.click("#share")
        page.wait_for_selector("#status:has-text('link')")
        again = open_page(page.evaluate("location.href"), offline=True)
        again.wait_for_selector("html[data-pace]", state="attached")
        return again.input_value("#text")

    page.fill("#temperature", "2")  # for the next text, not for the one that is there
    assert link_text() == once == made.text("abc", 5)
    page.fill("#temperature", "0")
    page.fill("#text", "abcd")  # nobody wrote that: it is what is gone on from
    assert link_text() == made.text("abcd", 5)


def test_the_text_outlives_a_reload_and_a_link_does_not_take_it_back(
    made: Made, open_page: OpenPage
) -> None:
    address = link(made.path, "Once", temperature=0, max_tokens=5)
    page = open_page(address, offline=True)
    page.wait_for_selector("html[data-pace]", state="attached")
    page.fill("#text", "Another text")
    for place in (None, "about:blank"):
        page.reload() if place is None else (page.goto(place), page.go_back())
        ready(page)
        assert page.input_value("#text") == "Another text"
        assert page.get_attribute("html", "data-pace") is None  # nothing was written
    page.fill("#text", "")
    page.evaluate(
        "(hash) => { location.hash = hash; }", link(made.path, "More", max_tokens=3).split("#")[1]
    )
    page.wait_for_selector("html[data-pace]", state="attached")
    assert done(page).startswith("More")


def test_a_link_of_an_earlier_page_is_understood(made: Made, open_page: OpenPage) -> None:
    address = link(made.path, "Once", temperature=99, **{"count": 5, "topK": 7, "topP": 1})
    page = open_page(address, offline=True)
    page.wait_for_selector("html[data-pace]", state="attached")
    assert page.input_value("#max_tokens") == "5" and page.input_value("#top_k") == "7"
    assert page.input_value("#temperature") == "2"  # the most that there is
    assert page.text_content("#top_p-value") == "off"


@pytest.mark.parametrize("made", ["char"], indirect=True)
def test_what_cannot_be_is_said(made: Made, open_page: OpenPage) -> None:
    page = ready(open_page(made.path.as_uri(), offline=True))
    page.fill("#text", "a\U0001f9ff")
    page.click("#continue")
    page.wait_for_selector("#error:has-text('never seen the character')")
    page.fill("#text", "a")
    set_up(page, temperature=0, max_tokens=3)
    assert write(page) == made.text("a", 3)
    assert page.is_hidden("#error")


def test_a_file_that_is_cut_short_is_said(made: Made, open_page: OpenPage, tmp_path: Path) -> None:
    text = made.path.read_text()
    cut = tmp_path / "cut.html"
    cut.write_text(text[: text.rindex('<script type="text/plain" class="weights"')])
    page = open_page(cut.as_uri(), offline=True)
    page.wait_for_selector("#error:has-text('not whole')")
    assert page.is_disabled("#continue")


def test_it_works_by_keyboard_alone(made: Made, open_page: OpenPage) -> None:
    page = ready(open_page(made.path.as_uri(), offline=True))
    for _ in range(5):  # past the way to the text, the name, the theme and the tabs
        page.keyboard.press("Tab")
    page.keyboard.type("With keys")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert done(page) != "With keys"
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"undo", "share", "SUMMARY", "temperature"} <= seen


SOFTWARE_CARD = [
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"),
    *("--use-vulkan=swiftshader", "--disable-vulkan-surface"),
]


def test_a_graphics_card_writes_the_same_text(browser: Browser, tmp_path: Path) -> None:
    """On one that is emulated, which the page would rightly not choose for its speed."""
    model = make(GPTConfig(32, 256, n_layer=2, n_head=2, n_embd=32))
    path, tokenizer = tmp_path / "page.html", ByteTokenizer()
    export_web(model, tokenizer, path, webgpu=True)
    by_speed, always = "const quicker = !differ && (await", "const quicker = !differ || (await"
    path.write_text(with_worker(path.read_text(), by_speed, always))
    expected = Made(model, tokenizer, path).text("诗 ab", 60)

    arguments = [a for a in ARGUMENTS if a != "--disable-gpu"]
    chromium = browser.browser_type.launch(
        executable_path=CHROMIUM, args=[*arguments, *SOFTWARE_CARD]
    )
    try:
        page = chromium.new_page()
        page.goto(link(path, "诗 ab", temperature=0, max_tokens=60))
        page.wait_for_selector("html[data-pace]", state="attached")
        if "graphics card" not in (page.text_content("#card") or ""):
            pytest.skip("this Chromium has no emulated graphics card")
        assert page.input_value("#text") == expected
    finally:
        chromium.close()
