"""The exported web page in headless Chromium: size, time to the first token, tokens per second.

    python benchmarks/web.py [--config baby | long | gpt2] [--weights KIND] [--rounds R]

Correctness comes first: the export compares logits and 100 greedy tokens with the model's before it
writes the page, and here the page's greedy text has to be that of ``generate_text``. Then the page
is opened anew R times with a link that makes it write at once, and R times by a visitor who looks
at it for a second before asking. ``first token`` counts from the start of the navigation; ``at
once`` and ``a second later`` are the two paces while the text fits into block_size; ``beyond`` is
that of further tokens, each of which takes a whole window; ``prompt`` is what a prompt of so many
tokens and one more take together. One thread computes, in the page's worker. Weights are random,
which changes no time.
"""

from __future__ import annotations

import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

from common import Spread, arguments, machine, show_machine, write_json

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
SHAPES = {
    "baby": {"block_size": 64, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128},
    "long": {"block_size": 1024, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128},
    "gpt2": {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768},
}
WITHIN = {"baby": 60, "long": 1000, "gpt2": 40}
"""Tokens after a prompt of two. ``long`` is ``baby`` with room for 1024."""
BEYOND = {"baby": 100, "long": 0, "gpt2": 0}
PROMPT = {"baby": 0, "long": 500, "gpt2": 0}
"""Tokens of a prompt that is timed by itself; 0: none."""
LOOKING = 1000
"""Milliseconds that a visitor takes before asking."""
KILOBYTES = 150_000
"""What a page may have besides its weights."""


def make(name: str, kind: Any, folder: Path) -> tuple[Any, Any, Any, float]:
    from tinygpt import GPT, BPETokenizer, CharTokenizer, GPTConfig
    from tinygpt.interop.web import export_web

    config = GPTConfig(**SHAPES[name])
    characters = (chr(c) for c in range(33, 33 + 65))
    tokenizer = BPETokenizer() if name == "gpt2" else CharTokenizer(characters)
    model = GPT(config).eval()
    began = time.perf_counter()
    made = export_web(model, tokenizer, folder / "page.html", kind=kind)
    return model, tokenizer, made, time.perf_counter() - began


def expected_text(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    from tinygpt import SampleConfig
    from tinygpt.generate import generate_text

    greedy = SampleConfig(temperature=0)
    return prompt + "".join(generate_text(model, tokenizer, prompt, count, greedy))


def open_and_write(
    browser: Any, path: Path, looking: int = 0, **settings: object
) -> dict[str, Any]:
    """Open the page with a link, or fill it in after a while; -> what it wrote, and when."""
    page = browser.new_context(offline=True).new_page()
    link = urllib.parse.urlencode(settings, quote_via=urllib.parse.quote)
    page.goto(path.as_uri() if looking else f"{path.as_uri()}#{link}", timeout=300_000)
    if looking:
        page.wait_for_selector("html[data-ready]", state="attached", timeout=300_000)
        page.evaluate("document.getElementById('settings').open = true")
        page.uncheck("#fresh")
        for name, value in settings.items():
            page.fill("#text" if name == "prompt" else f"#{name}", str(value))
        page.wait_for_timeout(looking)
        page.click("#go")
    page.wait_for_selector("html[data-pace]", state="attached", timeout=300_000)
    told = page.evaluate("({...document.documentElement.dataset})")
    found = {"text": page.input_value("#text"), **{k: float(v) for k, v in told.items()}}
    page.context.close()
    return found


def measure(name: str, kind: str, rounds: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        model, tokenizer, made, seconds = make(name, kind, Path(folder))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        within, beyond = WITHIN[name], BEYOND[name]
        short = {"prompt": "AB", "temperature": 0, "seed": 1, "count": within}
        long = {**short, "prompt": tokenizer.decode([5] * PROMPT[name]), "count": 1}
        for settings in (short, long) if PROMPT[name] else (short,):
            wanted = expected_text(model, tokenizer, settings["prompt"], settings["count"])
            assert open_and_write(browser, made.path, **settings)["text"] == wanted, "another text"
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ("once", "later", "on", "long")}
        for _ in range(rounds):
            runs["once"].append(open_and_write(browser, made.path, **short))
            runs["later"].append(open_and_write(browser, made.path, LOOKING, **short))
            if beyond:
                further = {**short, "count": within + beyond}
                runs["on"].append(open_and_write(browser, made.path, LOOKING, **further))
            if PROMPT[name]:
                runs["long"].append(open_and_write(browser, made.path, **long))
        browser.close()
    allowed = 1.1 * made.weights * 4 / 3 + KILOBYTES
    found: dict[str, Any] = {
        "bytes": made.size,
        "weights": made.weights,
        "module": made.module,
        "of_allowed": made.size / allowed,
        "difference": made.difference,
        "export_seconds": seconds,
        "first_token_ms": Spread.of([run["first"] for run in runs["once"]]),
        "at_once": Spread.of([run["pace"] for run in runs["once"]]),
        "a_second_later": Spread.of([run["pace"] for run in runs["later"]]),
    }
    if beyond:
        pairs = zip(runs["later"], runs["on"], strict=True)
        taken = [(within + beyond) / b["pace"] - within / a["pace"] for a, b in pairs]
        found["beyond"] = Spread.of([beyond / t for t in taken])
    if PROMPT[name]:
        found["prompt_ms"] = Spread.of([1e3 / run["pace"] for run in runs["long"]])
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", choices=SHAPES, default="baby")
    parser.add_argument("--weights", choices=("float16", "float32", "int8"), default="float16")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    where = machine()
    show_machine(where, 1)
    found = measure(options.config, options.weights, options.rounds)
    print(
        f"page {found['bytes'] / 1e6:.2f} MB, {found['of_allowed']:.0%} of 1.1 x base64 + 150 KB; "
        f"weights {found['weights'] / 1e6:.2f} MB before it, module {found['module'] / 1e3:.0f} KB"
    )
    print(f"exported in {found['export_seconds']:.1f} s, logits within {found['difference']:.1e}")
    print(f"first token {found['first_token_ms'].show('.0f')} ms after opening")
    print(f"within block_size at once {found['at_once'].show(',.0f')} tokens/s")
    print(f"within block_size a second later {found['a_second_later'].show(',.0f')} tokens/s")
    if "beyond" in found:
        print(f"beyond it {found['beyond'].show(',.0f')} tokens/s")
    if "prompt_ms" in found:
        tokens = PROMPT[options.config]
        print(f"a prompt of {tokens} tokens, at once {found['prompt_ms'].show('.0f')} ms")
    result = {"benchmark": "web", "machine": where, "config": options.config}
    write_json(options.json, result | {"weights_as": options.weights} | found)


if __name__ == "__main__":
    main()
