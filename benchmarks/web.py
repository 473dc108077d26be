"""The exported web page in headless Chromium: size, time to the first token, tokens per second.

    python benchmarks/web.py [--config baby | long | gpt2] [--weights KIND] [--rounds R]

Correctness comes first: the export compares logits and 100 greedy tokens with the model's before
it writes the page, and here the page's greedy text has to be that of ``generate_text``. Then the
page is opened anew R times in each of two ways. ``at once``: a link makes it write as soon as it
can, while the browser still starts; ``first token`` counts from the start of the navigation.
``pressed``: a visitor presses the button when the page has been open for a second; it counts from
the press. The pace is that of a text that fits into block_size; ``beyond`` is that of further
tokens, each of which takes a whole window, in the page that was pressed. Of ``long``, the time
from a press to the first token after a prompt of 500 is measured, too.

One thread computes, in the page's worker. Weights are random, which changes no time. But greedy
text then repeats one character, and a window of it slides without a change, so what is timed is
sampled.
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
    from tinygpt.generation.stream import generate_text

    greedy = SampleConfig(temperature=0)
    return prompt + "".join(generate_text(model, tokenizer, prompt, count, greedy))


def open_and_write(browser: Any, path: Path, **settings: object) -> dict[str, Any]:
    """Open the page with a link; -> what it wrote, and when."""
    page = browser.new_context(offline=True).new_page()
    link = urllib.parse.urlencode(settings, quote_via=urllib.parse.quote)
    page.goto(f"{path.as_uri()}#{link}", timeout=300_000)
    page.wait_for_selector("html[data-pace]", state="attached", timeout=300_000)
    told = page.evaluate("({...document.documentElement.dataset})")
    found = {"text": page.input_value("#text"), **{k: float(v) for k, v in told.items()}}
    page.context.close()
    return found


PRESS = """async ({text, count}) => {
  const find = (id) => document.getElementById(id);
  find("random").checked = false;
  find("max_tokens").value = count;
  find("text").value = text;
  find("text").dispatchEvent(new InputEvent("input"));
  const busy = () => find("text").readOnly;
  const began = performance.now();
  find("continue").click();
  const change = (done) => new Promise((resolve) => {
    const look = () => done() ? resolve(performance.now() - began) : setTimeout(look, 1);
    look();
  });
  const first = await change(() => find("text").value !== text || !busy());
  await change(() => !busy());
  const pace = Number(document.documentElement.dataset.pace);
  return {first, pace, text: find("text").value};
}"""


def open_and_press(browser: Any, path: Path, prompt: str, *counts: int) -> list[dict[str, Any]]:
    """Open the page, wait a second, and let it write so many tokens, and then so many more."""
    page = browser.new_context(offline=True).new_page()
    page.goto(path.as_uri(), timeout=300_000)
    page.wait_for_selector("html[data-ready]", state="attached", timeout=300_000)
    page.wait_for_timeout(1000)
    found: list[dict[str, Any]] = []
    for count in counts:
        found.append(page.evaluate(PRESS, {"text": prompt, "count": count}))
        prompt = found[-1]["text"]
    page.context.close()
    return found


def measure(name: str, kind: str, rounds: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        model, tokenizer, made, seconds = make(name, kind, Path(folder))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        within, beyond = WITHIN[name], BEYOND[name]
        link = {"prompt": "AB", "seed": 1, "count": within}
        wrote = open_and_write(browser, made.path, temperature=0, **link)
        assert wrote["text"] == expected_text(model, tokenizer, "AB", within), "another text"
        at_once, pressed, prompts = [], [], []
        for _ in range(rounds):
            at_once.append(open_and_write(browser, made.path, temperature=1, **link))
            counts = [within, beyond] if beyond else [within]
            pressed.append(open_and_press(browser, made.path, "AB", *counts))
            if name == "long":
                long_prompt = "ABCDEFGHIJ" * 50
                prompts.append(open_and_press(browser, made.path, long_prompt, 1)[0]["first"])
        browser.close()
    allowed = 1.1 * made.weights * 4 / 3 + KILOBYTES
    found: dict[str, Any] = {
        "bytes": made.size,
        "weights": made.weights,
        "module": made.module,
        "of_allowed": made.size / allowed,
        "difference": made.difference,
        "export_seconds": seconds,
        "first_token_ms": Spread.of([run["first"] for run in at_once]),
        "at_once": Spread.of([run["pace"] for run in at_once]),
        "pressed_first_ms": Spread.of([runs[0]["first"] for runs in pressed]),
        "pressed": Spread.of([runs[0]["pace"] for runs in pressed]),
    }
    if beyond:
        found["beyond"] = Spread.of([runs[1]["pace"] for runs in pressed])
    if prompts:
        found["prompt_ms"] = Spread.of(prompts)
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
    print(f"at once: first token {found['first_token_ms'].show('.0f')} ms after opening,")
    print(f"  {found['at_once'].show(',.0f')} tokens/s")
    print(f"pressed: first token {found['pressed_first_ms'].show('.0f')} ms after the press,")
    print(f"  {found['pressed'].show(',.0f')} tokens/s")
    if "prompt_ms" in found:
        print(f"500 prompt tokens in {found['prompt_ms'].show('.0f')} ms")
    if "beyond" in found:
        print(f"beyond block_size {found['beyond'].show(',.0f')} tokens/s")
    result = {"benchmark": "web", "machine": where, "config": options.config}
    write_json(options.json, result | {"weights_as": options.weights} | found)


if __name__ == "__main__":
    main()
