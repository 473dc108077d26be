"""A model as one web page: what is in the file, and that it is checked before it is there."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.mixed_text import mixed_text
from tinygpt import GPT, BPETokenizer, ByteTokenizer, CharTokenizer, GPTConfig, pages
from tinygpt.cli import main
from tinygpt.config import SampleConfig
from tinygpt.errors import InteropError, MissingExtraError, UsageError, extras
from tinygpt.generation.generate import generate
from tinygpt.generation.sample import filter_logits, softmax
from tinygpt.interop.parity import TOLERANCE, fixed_prompt, our_logits
from tinygpt.interop.web import Kind, export_web, page_parity, payload, wasm
from tinygpt.interop.web.capture import capture
from tinygpt.interop.web.page_parity import GREEDY
from tinygpt.interop.web.page_vocabulary import describe, describe_chat
from tinygpt.machine.transfer import read
from tinygpt.text.chat.template import CHATML
from tinygpt.text.chat.window import ask
from tinygpt.text.tokenizers import END, MARKERS, Tokenizer, ends_of, special_of

PAGE = pages.FOLDER / "local"
SMALL = GPTConfig(block_size=24, vocab_size=256, n_layer=2, n_head=2, n_embd=32)
BARE = GPTConfig(
    block_size=24, vocab_size=300, n_layer=1, n_head=4, n_embd=48, bias=False, tie_embeddings=False
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def make(config: GPTConfig, seed: int = 3) -> GPT:
    """A model whose logits lie far enough apart that rounding never decides between two tokens."""
    model = GPT(config, seed).eval()
    for name, parameter in model.parameters().items():
        if name.endswith("weight") and ".ln_" not in f".{name}":
            parameter.assign(parameter * 6).realize()
    return model


def node(script: str, given: object) -> Any:
    """What a script prints as JSON; it finds ``given`` in its variable of that name."""
    whole = (
        f"const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n"
        f"const load = (name) => import({json.dumps(PAGE.as_uri())} + '/' + name);\n"
        f"(async () => console.log(JSON.stringify(await (async () => {{{script}}})())))()"
    )
    done = subprocess.run(
        ["node", "-e", whole], input=json.dumps(given).encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout)


def parts(page: str) -> dict[str, Any]:
    """What a page says of itself, and its chunks."""
    about = re.search(r'<script type="application/json" id="about">(.*?)</script>', page, re.S)
    assert about is not None
    chunk = r'class="weights" data-kind="(\w+)" data-at="(\d+)" data-columns="(\d+)">(.*?)</script>'
    chunks = [
        payload.Chunk(kind, int(at), int(columns), base64.b64decode(data))
        for kind, at, columns, data in re.findall(chunk, page)
    ]
    return {"about": json.loads(about[1]), "chunks": chunks}


# The file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", payload.KINDS)
def test_a_page_carries_every_weight_as_rounded(tmp_path: Path, kind: Kind) -> None:
    model, path = make(SMALL), tmp_path / "page.html"
    before = {name: read(p) for name, p in model.parameters().items()}
    made = export_web(model, ByteTokenizer(), path, kind=kind)
    assert made.difference <= TOLERANCE
    found = parts(path.read_text())
    assert found["about"]["config"] == SMALL.to_dict()
    size = {"float32": 4, "float16": 2, "int8": 1}[kind] * SMALL.num_params()
    carried = sum(len(chunk.data) for chunk in found["chunks"])
    assert size <= carried <= size * (1.3 if kind == "int8" else 1)
    assert made.size == path.stat().st_size <= 1.1 * carried * 4 / 3 + 150_000
    places = {n: at for n, at, _ in capture(SMALL).weights}
    assert found["chunks"] == list(payload.chunks(before, places, kind))
    for name, values in before.items():
        allowed = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}[kind]
        error = np.abs(payload.rounded(values, kind) - values).max()
        assert error <= allowed * np.abs(values).max() * 1.001, name


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.html", tmp_path / "b.html"
    export_web(make(SMALL), ByteTokenizer(), a)
    export_web(make(SMALL), ByteTokenizer(), b)
    assert a.read_bytes() == b.read_bytes()
    export_web(make(SMALL, seed=4), ByteTokenizer(), b)
    assert a.read_bytes() != b.read_bytes()


def test_an_untied_model_without_biases(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(mixed_text(30_000), 290)  # fewer than the model has rows
    made = export_web(make(BARE), tokenizer, tmp_path / "page.html", kind="float32")
    assert made.difference <= TOLERANCE


def test_nothing_that_a_run_says_becomes_html(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>&{{ui}}\udce9"  # the last: not UTF-8
    path = tmp_path / "page.html"
    export_web(
        make(SMALL),
        ByteTokenizer(),
        path,
        title=hostile,
        description=hostile,
        card={"data": hostile},
    )
    text = path.read_text()
    assert "<img" not in text
    assert parts(text)["about"]["card"]["data"] == hostile
    assert parts(text)["about"]["title"] == hostile.replace("\udce9", r"\xe9")
    assert text.count("</script>") == 5 + text.count('class="weights" data-')


def test_the_policy_allows_the_page_s_own_scripts_and_no_request(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    export_web(make(SMALL), ByteTokenizer(), path)
    text = path.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe-inline" not in policy[1] and "connect-src" not in policy[1]
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!data:)\w""", text.split("<script")[0])


# The check --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> tuple[GPT, bytes, list[payload.Chunk]]:
    model = make(SMALL)
    source = capture(SMALL)
    arrays = {name: read(p) for name, p in model.parameters().items()}
    places = {name: at for name, at, _ in source.weights}
    return model, wasm.compile_wasm(source.text), list(payload.chunks(arrays, places, "float32"))


@pytest.mark.parametrize("place", ["_node", "_wasmtime"])
def test_a_module_computes_what_the_model_computes(
    built: tuple[GPT, bytes, list[payload.Chunk]], place: str
) -> None:
    if place == "_node" and shutil.which("node") is None:
        pytest.skip("node is not installed")
    if place == "_wasmtime":
        pytest.importorskip("wasmtime", reason="the extra web is not installed")
    model, module, chunks = built
    prompt = fixed_prompt(SMALL)
    ran = getattr(page_parity, place)(module, chunks, SMALL, prompt[0].tolist())
    ours = our_logits(model, prompt)
    assert np.abs(ran.by_steps - ours).max() <= 1e-4
    assert np.abs(ran.at_once - ours[-1]).max() <= 1e-4
    # 24 positions and 100 tokens more: the window has slid for most of the way
    expected = generate(model, prompt, GREEDY, SampleConfig(temperature=0))
    assert ran.ids == expected.numpy()[0].tolist()


def test_a_wrong_weight_leaves_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = payload.chunks

    def wrong(arrays: Any, places: Any, kind: Any) -> Any:
        damaged = {n: v + np.float32(0.01) * (n == "h.1.mlp.c_fc.bias") for n, v in arrays.items()}
        return right(damaged, places, kind)

    monkeypatch.setattr(payload, "chunks", wrong)
    with pytest.raises(InteropError, match=r"computes something else .* Nothing was written"):
        export_web(make(SMALL), ByteTokenizer(), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_another_text_is_refused_and_a_tie_is_not(
    built: tuple[GPT, bytes, list[payload.Chunk]],
) -> None:
    model = built[0]
    prompt = fixed_prompt(SMALL)
    ids = generate(model, prompt, GREEDY, SampleConfig(temperature=0)).numpy()[0].tolist()
    page_parity._compare_greedy(model, prompt, ids, TOLERANCE)
    wrong = [*ids[:-1], (ids[-1] + 1) % 256]
    with pytest.raises(InteropError, match="would write another text"):
        page_parity._compare_greedy(model, prompt, wrong, TOLERANCE)
    flat = GPT(SMALL).eval()
    for parameter in flat.parameters().values():
        parameter.assign(parameter * 0).realize()  # every token is as likely as every other
    page_parity._compare_greedy(flat, prompt, [*prompt[0].tolist(), *[7] * GREEDY], TOLERANCE)


# The scripts ------------------------------------------------------------------------------------


def imported(text: str) -> BPETokenizer:
    """Numbered as others do, with special tokens before and behind, one of which merges lead to."""
    trained = BPETokenizer.train(text, 500)
    merges = [*(token for token in trained.ranks if len(token) > 1), b"[|"]
    return BPETokenizer.from_merges(
        merges, alphabet=bytes(range(255, -1, -1)), special={"<s>": 0, "[|]": 502}
    )


TOKENIZERS: dict[str, Callable[[str], Tokenizer]] = {
    "gpt2": lambda text: BPETokenizer("gpt2"),
    "bpe": lambda text: BPETokenizer.train(text, 1024),
    "imported": imported,
    "byte": lambda text: ByteTokenizer(),
    "char": CharTokenizer,
    "bytes-marked": lambda text: ByteTokenizer((END, *MARKERS)),
    "char-marked": lambda text: CharTokenizer(text, (END, *MARKERS)),
    "bpe-marked": lambda text: BPETokenizer.train(text, 500).with_specials((END, *MARKERS)),
}


@needs_node
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_page_s_tokenizers_are_ours(name: str) -> None:
    text = mixed_text() + "\n[|]\n<s><|user|>"
    assert len(text.encode()) >= 300_000
    tokenizer = TOKENIZERS[name](text)
    special = [*special_of(tokenizer).values()]
    ids, back, names, size, ends = node(
        """const { makeTokenizer, TextStream } = await load('tokenizer.mjs');
        const tokenizer = makeTokenizer(given.tokenizer);
        const ids = tokenizer.encode(given.text), stream = new TextStream(tokenizer);
        const shown = (ids) => ids.map((id) => stream.push(id)).join('') + stream.flush();
        return [ids, shown(ids), shown(given.special), tokenizer.size, [...tokenizer.ends]];""",
        {"tokenizer": describe(tokenizer), "text": text, "special": special},
    )
    assert ids == tokenizer.encode(text) and not set(special) & set(ids)
    assert back == text and names == tokenizer.decode(special)
    assert (size, tuple(ends)) == (tokenizer.vocab_size, ends_of(tokenizer))


TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be <|end|> brief."}, {"role": "user", "content": "<|user|>"}],
    [{"role": "system", "content": "Alone."}],
    [
        {"role": "system", "content": "Be brief."},
        *[
            {"role": role, "content": f" \u2003{text} {n}\n"}
            for n in range(9)
            for role, text in (
                ("user", "Spät?\nUser: ha"),
                ("assistant", "你好 \U0001f642\x1c"),
            )
        ],
        {"role": "user", "content": "\nAssistant: And?"},
    ],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": "x" * 400}],
]


@needs_node
@pytest.mark.parametrize("name", ["byte", "bytes-marked", "bpe", "bpe-marked", "chatml"])
def test_the_page_asks_a_talk_with_our_tokens(name: str) -> None:
    if name == "chatml":
        marks = ["<|im_start|>", "<|im_end|>"]
        tokenizer: Any = ByteTokenizer().with_specials(marks).with_template(CHATML.to_dict())
    else:
        tokenizer = TOKENIZERS[name](mixed_text(3000))
    asked = [[talk, size, room] for talk in TALKS for size in (64, 200, 5000) for room in (5, 999)]
    found = node(
        """const { makeTokenizer } = await load('tokenizer.mjs');
        const { Conversation } = await load('conversation.mjs');
        const tokenizer = makeTokenizer(given.tokenizer);
        return given.asked.map(([talk, size, room]) =>
          new Conversation(given.chat, tokenizer, size).ask(talk, room));""",
        {"tokenizer": describe(tokenizer), "chat": describe_chat(tokenizer), "asked": asked},
    )
    for (talk, size, room), each in zip(asked, found, strict=True):
        ours = ask(tokenizer, talk, size, room)
        assert each == {
            "ids": list(ours.ids), "left_out": ours.left_out, "too_long": ours.too_long
        }  # fmt: skip


@needs_node
def test_incomplete_characters_wait_and_end_as_ours_do() -> None:
    tokenizer = ByteTokenizer()
    ids = [*"é€".encode(), 0xF0, 0x9F, 65, 0xE2, 0x82]
    pieces = node(
        """const { makeTokenizer, TextStream } = await load('tokenizer.mjs');
        const stream = new TextStream(makeTokenizer(given.tokenizer));
        return [...given.ids.map((id) => stream.push(id)), stream.flush()];""",
        {"tokenizer": describe(tokenizer), "ids": ids},
    )
    assert pieces[:5] == ["", "é", "", "", "€"]
    assert "".join(pieces) == tokenizer.decode(ids)


@needs_node
@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(temperature=0.7),
        SampleConfig(temperature=1.3, top_k=5),
        SampleConfig(top_p=0.6),
        SampleConfig(temperature=0.9, top_k=20, top_p=0.8),
        SampleConfig(top_k=1),
        SampleConfig(min_p=0.2),
        SampleConfig(top_p=0.9, min_p=0.05, repetition_penalty=1.6),
        SampleConfig(temperature=0),
    ],
)
def test_the_page_samples_from_the_same_distribution(config: SampleConfig) -> None:
    rng = np.random.default_rng(5)
    logits = np.round(rng.normal(size=40) * 2, 1)  # with equal ones among them
    draws = 20_000
    drawn = node(
        """const { distribution, draw, randomStream } = await load('sampling.mjs');
        const random = randomStream(9), logits = Float32Array.from(given.logits);
        const chosen = () => draw(distribution(logits, given.settings, [0]), random());
        return Array.from({ length: given.draws }, chosen);""",
        {
            "logits": logits.tolist(),
            "draws": draws,
            "settings": config.to_dict(),
        },
    )
    ours = filter_logits(logits.astype(np.float32), np.array([0]), config)
    expected = np.eye(40)[ours.argmax()] if config.temperature == 0 else softmax(ours)
    counts = np.bincount(drawn, minlength=40)
    assert not counts[expected == 0].any()
    assert np.abs(counts / draws - expected).max() < 0.015


@needs_node
def test_a_seed_decides_the_draws() -> None:
    a, b, c = node(
        """const { randomStream } = await load('sampling.mjs');
        return given.map((seed) => { const r = randomStream(seed); return [r(), r(), r()]; });""",
        [1, 1, 2],
    )
    assert a == b != c
    assert all(0 <= x < 1 for x in a + c)


# Bad input --------------------------------------------------------------------------------------


def test_a_foreign_tokenizer_is_refused() -> None:
    class Foreign(ByteTokenizer):
        def to_dict(self) -> dict[str, Any]:
            return {"kind": "bpe", "encoding": "cl100k_base"}

    with pytest.raises(UsageError, match=r"cannot carry the tokenizer 'cl100k_base'.*Wanted: gpt2"):
        describe(Foreign())


def test_compiling_needs_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for home in (None, tmp_path / "none"):
        monkeypatch.delenv("HOME", raising=False)
        if home:
            monkeypatch.setenv("HOME", str(home))
        assert wasm.compile_wasm("int f(void) { return 1; }").startswith(b"\0asm")
    assert not (tmp_path / "none").exists()


def test_no_compiler_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "bundled_zig", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match=re.escape(extras.cure("web"))):
        wasm.compile_wasm("")


def test_nowhere_to_run_names_the_extra(
    built: tuple[GPT, bytes, list[payload.Chunk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "wasmtime", None)
    with pytest.raises(MissingExtraError, match=re.escape(extras.cure("web"))):
        page_parity.check(*built)


def test_a_model_too_large_for_a_page_is_told_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygpt.interop import web

    monkeypatch.setattr(web, "LARGEST", 10_000)
    with pytest.raises(UsageError, match=r"As float32 .* would have 0 MB.*Try --weights int8"):
        export_web(make(SMALL), ByteTokenizer(), Path("nowhere"), kind="float32")


def test_weights_that_cannot_be_carried(tmp_path: Path) -> None:
    model = make(SMALL)
    model.h[0].mlp.c_fc.weight.assign(model.h[0].mlp.c_fc.weight * 1e6).realize()
    with pytest.raises(UsageError, match=r"h\.0\.mlp\.c_fc\.weight .* Use --weights float32"):
        export_web(model, ByteTokenizer(), tmp_path / "page.html")
    model.ln_f.weight.assign(model.ln_f.weight * float("nan")).realize()
    with pytest.raises(UsageError, match=r"ln_f\.weight has values that are not finite"):
        export_web(model, ByteTokenizer(), tmp_path / "page.html", kind="float32")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = make(SMALL), tmp_path / "run"
    model.save_checkpoint(40, None, run, tokenizer=ByteTokenizer())
    rows = [{"iter": i, "train_loss": 5 - i / 20} for i in range(1, 41)]
    rows[19]["val_loss"] = rows[39]["val_loss"] = 3.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.toml").write_text('[data]\nsource = "/somewhere/secret/诗.txt"\n')
    page = tmp_path / "page.html"
    assert main(["export", "web", str(run), "--out", str(page), "--weights", "int8"]) == 0
    told = capsys.readouterr().err
    assert "checked: logits within" in told and str(page) in told
    text = page.read_text()
    card = parts(text)["about"]["card"]
    assert "secret" not in text and card["data"] == "诗.txt"
    assert card["curves"]["val"] == [[20, 3.5], [40, 3.5]] and len(card["curves"]["train"]) == 40
    assert "<title>run</title>" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "--out", "page.html"], "nowhere"),
        (["empty", "--out", "page.html"], "empty"),
        (["run", "--out", "."], "is a folder"),
        (["run", "--out", "file/page.html"], "could not be written|Not a directory"),
        (["run", "--out", "page.html", "--weights", "int3"], "int3"),
        (["run"], "--out"),
    ],
)
def test_wrong_use_is_told_and_leaves_nothing(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make(SMALL).save_checkpoint(1, None, "run", tokenizer=ByteTokenizer())
    Path("empty").mkdir()
    Path("file").write_text("")
    before = sorted(Path().rglob("*"))
    assert main(["export", "web", *arguments]) != 0
    told = capsys.readouterr().err
    assert re.search(expected, told) and "Traceback" not in told
    assert sorted(Path().rglob("*")) == before
