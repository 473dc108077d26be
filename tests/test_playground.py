"""The playground: what its endpoints answer, and what the page does in a browser.

The page is one, and so are its tests: `playground` is the page of a server, and then the exported
one, where the same model answers from a worker. `served` is the first of them alone.
"""

import contextlib
import http.client
import json
import re
import shlex
import urllib.parse
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from tinygrad import Tensor

from tests.browser import axe_violations, overflow
from tests.numpy_gpt2 import GPT2
from tests.serving import running, until
from tinygpt import GPT, GPTConfig, SampleConfig, TrainConfig
from tinygpt.cli.loading import beginnings
from tinygpt.config import MAX_TOKENS, to_toml
from tinygpt.generation.sample import filter_logits, softmax
from tinygpt.interop.web import export_web
from tinygpt.machine.transfer import write
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import checkpoint_path
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.http.limits import Limits
from tinygpt.server.openai.service import Service
from tinygpt.server.playground import introspection
from tinygpt.text.batches import split
from tinygpt.text.chat.window import ask as chat_prompt
from tinygpt.text.corpus import open_corpus
from tinygpt.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.text.tokens import data_fingerprint, tokens_of

HOSTILE = '<img src=x onerror="alert(1)"></script><b>run'
CONFIG = GPTConfig(block_size=48, vocab_size=256, n_layer=2, n_head=3, n_embd=24)
GREEDY = {"temperature": 0}
ENDLESS = 100_000
"""Tokens of a text that is still being written when a test stops it."""
BEGINNINGS = ["It was a dark and stormy night", "Once <b>upon</b> a time"]


def opinionated_model(config=CONFIG, seed=3):
    """A model that nobody has trained, but with large weights: it is sure of what it says.

    Of the bytes it prefers small letters, so that what it writes can be read.
    """
    model = GPT(config, seed)
    rng = np.random.default_rng(seed)
    for name, parameter in model.parameters().items():
        if name.endswith("weight") and ".ln_" not in f".{name}":
            write(parameter, rng.standard_normal(parameter.shape, np.float32) * 0.4)
    if config.vocab_size == 256:
        rows = model.wte.weight.numpy().copy()
        rows[:97] *= 0.1
        rows[123:] *= 0.1
        write(model.wte.weight, rows)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return opinionated_model()


@pytest.fixture(scope="module")
def service(model) -> Iterator[Service]:
    tokenizer = ByteTokenizer()
    with Engine(model, tokenizer, slots=2) as engine:
        limits = Limits(max_tokens=ENDLESS)
        yield Service(
            engine, model, tokenizer, HOSTILE, limits=limits, beginnings=lambda: BEGINNINGS
        )


@pytest.fixture(scope="module")
def address(service) -> Iterator[str]:
    with running(service) as address:
        yield address


def ask(address, path, body, headers=None):
    """-> status and text of an answer to POST; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **(headers or {})}
    connection.request("POST", path, content, headers)
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


def post(address, path, **body):
    """The JSON of an answer that is right."""
    status, text = ask(address, path, body)
    assert status == 200, text
    return json.loads(text)


def events(address, **body):
    """The events of a stream of tokens."""
    status, text = ask(address, "/api/generate", body)
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def ids_of(tokens):
    return [token["id"] for token in tokens]


# ---- a look inside ----


class Attending(GPT2):
    """The oracle, which attends by the weights it is given instead of its own."""

    def __init__(self, model, maps):
        parameters = {name: p.numpy() for name, p in model.parameters().items()}
        super().__init__(parameters, model.config.n_layer, model.config.n_head)
        self.maps = maps

    def _attention(self, x, name):
        qkv, _ = self._linear(x, f"{name}.c_attn")
        B, T, C = x.shape
        v = qkv[..., 2 * C :].reshape(B, T, self.n_head, -1)
        y = np.einsum("hqk,bkhd->bqhd", self.maps[int(name.split(".")[1])], v)
        return self._linear(y.reshape(B, T, C), f"{name}.c_proj")


def test_a_forward_pass_by_the_maps_is_the_models_own():
    model = opinionated_model(GPTConfig(block_size=24, vocab_size=50, n_layer=3, n_embd=32))
    ids = np.random.default_rng(1).integers(0, 50, 21).tolist()
    look = introspection.AttentionLook(model)
    maps = [look.weights(ids, layer, 24) for layer in range(3)]
    assert np.abs(np.diff(maps[2], axis=0)).max() > 0.1, "the heads differ"
    found = Attending(model, maps).logits([ids])
    expected = model(Tensor([ids], dtype="int32")).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_only_the_last_positions_are_told_of_all_that_the_model_sees(model):
    ids = np.random.default_rng(1).integers(0, 256, 100).tolist()
    look = introspection.AttentionLook(model)
    whole = look.weights(ids[-48:], 1, 48)
    part = look.weights(ids, 1, 7)
    assert part.shape == (3, 7, 48)
    np.testing.assert_allclose(part, whole[:, -7:], atol=1e-6)
    assert (part[:, 0, 42:] == 0).all() and (part.sum(-1) - 1 < 1e-5).all()


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(),
        SampleConfig(0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
        SampleConfig(0),
    ],
)
def test_candidates_have_the_probabilities_of_the_model_and_of_the_sampler(model, config):
    ids = list(b"and when")
    found = introspection.next_token(model.decoder, ids, config, 250)
    logits = model(Tensor([ids], dtype="int32")).numpy()[0, -1, :250].astype(np.float64)
    np.testing.assert_allclose(found.model, softmax(logits), atol=1e-5)
    assert found.sampled.sum() == pytest.approx(1)
    filtered = filter_logits(logits, np.array(ids), config)
    if config.temperature:
        np.testing.assert_allclose(found.sampled, softmax(filtered), atol=1e-4)
        assert found.kept == np.isfinite(filtered).sum()
    else:
        assert found.sampled[filtered.argmax()] == 1 and found.kept == 1


def test_the_likeliest_come_in_order_and_of_equals_the_lower_id():
    found = introspection.NextToken(np.array([0.1, 0.3, 0.1, 0.4, 0.1]), np.ones(5) / 5)
    assert found.likeliest(4) == [3, 1, 0, 2]
    assert found.likeliest(99) == [3, 1, 0, 2, 4]
    assert [found.rank(token) for token in (3, 1, 4)] == [1, 2, 3]


# ---- the endpoints ----


TEXTS = ["plain words", "naïve 語 \U0001f642", "<img src=x onerror=alert(1)>\0\r\n\t "]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_the_cuts_of_every_tokenizer_give_the_text_back_byte_by_byte(model, kind, text):
    tokenizer = {
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer("".join(TEXTS)),
        "bpe": lambda: BPETokenizer.train("plain words and naïve ones, 語語語 " * 9, 300),
    }[kind]()
    with running(Service(Engine(model, tokenizer), model, tokenizer, "tiny")) as address:
        tokens = post(address, "/api/tokens", text=text)["tokens"]
    assert ids_of(tokens) == tokenizer.encode(text)
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == text


def test_a_stream_tells_the_cuts_of_the_prompt_and_then_every_token(address, service):
    told = events(address, ids=list(b"to "), text="be", max_tokens=5, seed=4, temperature=0.9)
    assert ids_of(told[0]["prompt"]) == list(b"be")
    assert told[-1] == {"finish_reason": "length"}
    tokens = [token for event in told[1:-1] for token in event["tokens"]]
    prompt = Tensor([list(b"to be")], dtype="int32")
    work = service.engine.run(
        lambda: service.model.generate(prompt, 5, temperature=0.9, seed=4).tolist()
    )
    assert ids_of(tokens) == work.result()[0][5:]
    after = list(b"to be")
    for token in tokens:
        found = post(address, "/api/candidates", ids=after, token=token["id"])["chosen"]
        assert token["logprob"] == pytest.approx(np.log(found["probability"]), abs=1e-3)
        after.append(token["id"])


@pytest.mark.parametrize(
    "asked, written", [({}, MAX_TOKENS), ({"max_tokens": None}, MAX_TOKENS), ({"max_tokens": 0}, 0)]
)
def test_no_tokens_are_none_and_only_what_is_not_said_has_a_default(address, asked, written):
    told = events(address, text="So", **asked, **GREEDY)
    assert sum(len(event.get("tokens", ())) for event in told) == written
    assert told[-1] == {"finish_reason": "length"}


def test_of_a_text_that_is_too_long_the_end_is_taken_from_a_whole_character_on(address):
    text = "語" * 5000 + "x"  # three bytes each, in a server that takes 8,192 tokens
    tokens = post(address, "/api/tokens", text=text)["tokens"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == text[-2731:]
    told = events(address, ids=list(b"So"), text=text, max_tokens=2, **GREEDY)
    assert ids_of(told[0]["prompt"]) == ids_of(tokens)
    found = post(address, "/api/candidates", ids=[1] * 8192, text="x", count=1)
    assert found["kept"] == 256


def test_what_was_written_can_be_handed_back_and_gone_on_from(address):
    def tokens(told):
        return [t for event in told[1:-1] for t in event["tokens"]]

    whole = tokens(events(address, text="So", max_tokens=8, **GREEDY))
    begun = tokens(events(address, text="So", max_tokens=3, **GREEDY))
    ids = [*b"So", *ids_of(begun)]
    rest = events(address, ids=ids, max_tokens=5, **GREEDY)
    assert rest[0] == {"prompt": []}
    assert ids_of(begun + tokens(rest)) == ids_of(whole)


def test_candidates_tell_both_distributions_and_the_rank_of_a_token(address):
    found = post(address, "/api/candidates", text="he", token=7, count=4, top_k=2, temperature=1)
    assert len(found["candidates"]) == 4 and found["kept"] == 2 and found["vocabulary"] == 256
    own = [each["probability"] for each in found["candidates"]]
    sampled = [each["sampled"] for each in found["candidates"]]
    assert own == sorted(own, reverse=True)
    assert sampled[2:] == [0, 0] and sum(sampled) == pytest.approx(1)
    assert found["chosen"]["id"] == 7 and found["chosen"]["rank"] > 4
    assert post(address, "/api/candidates", text="he")["chosen"] is None


def test_attention_is_told_in_rows_that_end_at_their_own_token(address, service):
    text = "x" * 40 + "the end of a long text"
    told = post(address, "/api/attention", text=text, layer=1, last=20)
    assert (told["start"], told["position"]) == (42, 14)
    assert ids_of(told["tokens"]) == list(text[-20:].encode())
    look = introspection.AttentionLook(service.model)
    work = service.engine.run(lambda: look.weights(list(text.encode()), 1, 20))
    expected = work.result()
    for head, rows in enumerate(told["weights"]):
        assert [len(row) for row in rows] == list(range(1, 21))
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, expected[head, i, 28 : 29 + i], atol=1e-4)
            assert sum(row) + told["before"][head][i] == pytest.approx(1, abs=5e-3)


def test_the_card_says_what_the_checkpoint_knows(tmp_path, model):
    folder = tmp_path / "a run"
    folder.mkdir()
    train, source = TrainConfig(max_iters=2), {"source": "/somewhere/secret/book.txt"}
    progress = {"best_val_loss": 1.25, "best_iter": 1, "train_loss": float("inf")}
    meta = checkpoint.Meta(2, CONFIG, train, progress=progress)
    checkpoint.save(checkpoint_path(folder, 2), model, None, meta)
    (folder / "config.toml").write_text(to_toml({"model": CONFIG, "train": train, "data": source}))
    service = Service(Engine(model, ByteTokenizer()), model, ByteTokenizer(), "a run", folder)
    with running(service) as address:
        card = post(address, "/api/model")
    assert card["name"] == "a run" and card["step"] == 2 and card["data"] == "book.txt"
    assert (card["best_val_loss"], card["best_iter"]) == (1.25, 1)
    assert card["parameters"] == model.num_params() and card["config"] == CONFIG.to_dict()
    assert card["train"]["max_iters"] == 2
    assert "secret" not in json.dumps(card)


def test_beginnings_are_of_the_run_s_own_text_as_long_as_it_is_the_same(tmp_path, model, address):
    text = "".join(f"This is line {i} of a text.\n" for i in range(400))
    source, tokenizer = tmp_path / "text.txt", ByteTokenizer()
    source.write_text(text)
    (tmp_path / "config.toml").write_text(to_toml({"data": {"source": str(source)}}))
    _, held_out = split(tokens_of(open_corpus(str(source)), tokenizer, 256), 0.1, 48)
    meta = checkpoint.Meta(2, CONFIG, data={"val": data_fingerprint(held_out)})
    checkpoint.save(checkpoint_path(tmp_path, 2), model, None, meta)
    found = beginnings(tmp_path, model, tokenizer)
    assert len(found) == 3
    for lines in found:
        assert lines in text and text.index(lines) > 0.9 * len(text)
    source.write_text(text.replace("text", "tale"))  # which the run has never seen
    assert beginnings(tmp_path, model, tokenizer) == []
    assert post(address, "/api/beginnings")["beginnings"] == BEGINNINGS


def test_a_model_without_a_folder_has_a_card_too(address):
    card = post(address, "/api/model")
    assert card["name"] == HOSTILE and card.get("step") is None and card.get("data") is None
    assert card["dashboard"] is False


WRONG = [
    ("/api/tokens", b"", 400),
    ("/api/tokens", b"[", 400),
    ("/api/tokens", b'"text"', 400),
    ("/api/tokens", b"[" * 100_000, 400),
    ("/api/tokens", {}, 400),
    ("/api/tokens", {"text": 5}, 400),
    ("/api/tokens", {"text": "\ud800"}, 400),
    ("/api/tokens", b'{"text": "' + b"x" * (1 << 21) + b'"}', 413),
    ("/api/tokens", {"text": "x", "more": 1}, 400),
    ("/api/generate", {}, 400),
    ("/api/generate", {"text": ""}, 400),
    ("/api/generate", {"ids": [256]}, 400),
    ("/api/generate", {"ids": [-1]}, 400),
    ("/api/generate", {"ids": [1.5]}, 400),
    ("/api/generate", {"ids": [10**30]}, 400),
    ("/api/generate", {"ids": [1] * 8193}, 400),
    ("/api/generate", {"text": "x", "max_tokens": 10**9}, 400),
    ("/api/generate", {"text": "x", "temperature": -1}, 400),
    ("/api/generate", {"text": "x", "top_p": 0}, 400),
    ("/api/generate", b'{"text": "x", "temperature": NaN}', 400),
    ("/api/generate", {"text": "x", "seed": -1}, 400),
    ("/api/candidates", {"ids": [], "text": ""}, 400),
    ("/api/candidates", {"text": "x", "count": 0}, 400),
    ("/api/candidates", {"text": "x", "count": 51}, 400),
    ("/api/candidates", {"text": "x", "token": 256}, 400),
    ("/api/attention", {"text": "x"}, 400),
    ("/api/attention", {"text": "x", "layer": 2}, 400),
    ("/api/attention", {"text": "x", "layer": 0, "last": 129}, 400),
    ("/api/model", b"{", 400),
]


@pytest.mark.parametrize(
    "path, body, wanted", WRONG, ids=[f"{p}-{i}" for i, (p, *_) in enumerate(WRONG)]
)
def test_what_cannot_be_answered_is_refused_in_one_shape(address, path, body, wanted):
    status, text = ask(address, path, body)
    assert status == wanted, text
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_a_character_that_the_vocabulary_lacks_is_a_refusal_not_a_failure(model):
    tokenizer = CharTokenizer("abc")
    with running(Service(Engine(model, tokenizer), model, tokenizer, "tiny")) as address:
        status, text = ask(address, "/api/tokens", {"text": "abd"})
    assert status == 400 and "vocabulary" in json.loads(text)["error"]["message"]


def test_only_so_many_looks_wait_for_the_engine(address, service, monkeypatch):
    monkeypatch.setattr("tinygpt.server.playground.page_api.LOOKS", 0)
    status, text = ask(address, "/api/candidates", {"text": "x"})
    assert status == 429 and json.loads(text)["error"]["code"] == "queue_full"
    monkeypatch.undo()
    assert post(address, "/api/candidates", text="x")["kept"] > 0


def test_a_page_of_another_origin_gets_nothing(address):
    for path in ("/api/model", "/api/generate", "/api/tokens"):
        status, _ = ask(address, path, {"text": "x"}, {"origin": "http://evil.example"})
        assert status == 403


# ---- the page ----


class Playground:
    """The page as somebody uses it."""

    def __init__(self, page):
        from playwright.sync_api import expect

        self.page, self.expect = page, expect
        self.text = page.get_by_label("Text to continue")
        self.status = page.locator("#status")
        self.title = page.locator("#candidates h3")

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=False)

    def ready(self):
        """Wait until the model has started."""
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self

    def highlights(self):
        """Tokens that are coloured as the model's."""
        script = (
            "[...Array(5).keys()].reduce((n, i) => n + CSS.highlights.get(`model-${i}`).size, 0)"
        )
        return self.page.evaluate(script)

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def set(self, **fields):
        """Settings by the ids of their fields."""
        self.page.evaluate(
            "document.querySelectorAll('#settings, .more').forEach((e) => { e.open = true; })"
        )
        for name, value in fields.items():
            self.page.locator(f"#{name}").fill(str(value))

    def write(self, count, prompt=None):
        """Let the model write so many tokens, greedily; -> the text."""
        self.set(temperature=0, max_tokens=count)
        if prompt is not None:
            self.text.fill(prompt)
        self.button("Continue").click()
        self.expect(self.status).to_have_text(f"{count} tokens written.")
        return self.value()

    def value(self):
        return self.text.input_value()

    def candidates(self):
        """The rows, when they belong to the place that is looked at."""
        self.expect(self.page.locator(".candidates")).to_have_attribute("aria-busy", "false")
        return self.page.locator("#candidates li button")


def asks_for_candidates(answer, behind):
    """Whether a response is that to the question what comes behind so many tokens."""
    request = answer.request
    if not request.url.endswith("/api/candidates"):
        return False
    return len(request.post_data_json["ids"]) == behind


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The address of a page that holds the model."""
    path = tmp_path_factory.mktemp("exported") / "page.html"
    points = [[step, 5 - step / 20] for step in range(1, 41)]
    card = {"curves": {"train": points, "val": points[9::10]}, "beginnings": BEGINNINGS}
    export_web(model, ByteTokenizer(), path, kind="float32", title=HOSTILE, card=card)
    return path.as_uri()


@pytest.fixture(params=["address", "exported"])
def place(request):
    """The address of the page, with the one engine and with the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def playground(open_page, place):
    return Playground(open_page(place)).ready()


@pytest.fixture
def served(open_page, address):
    return Playground(open_page(address)).ready()


def continuation(address, prompt, count):
    """What the model writes greedily."""
    told = events(address, text=prompt, max_tokens=count, **GREEDY)
    tokens = [token for event in told[1:-1] for token in event["tokens"]]
    return b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")


def test_the_continuation_streams_in_after_the_prompt(playground, address):
    prompt = f"<img src=x onerror=alert(1)> {HOSTILE} "
    text = playground.write(12, prompt)
    assert text == prompt + continuation(address, prompt, 12)
    assert playground.page.locator("img, b").count() == 0
    assert playground.highlights() == 12
    playground.expect(playground.page.locator("#meter")).to_contain_text(
        f"{len(prompt) + 12} tokens"
    )


def test_the_run_is_named_in_text_wherever_it_stands(playground):
    assert playground.page.title().removesuffix(" · TinyGPT") == HOSTILE
    assert playground.page.locator("#run").text_content() == HOSTILE
    playground.tab("Model")
    card = playground.page.locator("#card")
    playground.expect(card.get_by_text(HOSTILE, exact=True)).to_be_visible()
    playground.expect(card).to_contain_text("48 tokens")


def test_the_mirror_behind_the_text_breaks_its_lines_where_the_text_does(playground):
    for text in (
        "AVAVA fi fl office " * 40,
        "word\n\n\nword\n",
        "x" * 999,
        "語" * 300 + "  " * 200,
    ):
        playground.text.fill(text)
        heights = playground.page.evaluate(
            "[text.scrollHeight, text.clientHeight, mirror.clientHeight]"
        )
        assert len(set(heights)) == 1, text[:20]


def test_keyboard_alone_writes_stops_and_undoes(playground):
    page, keys = playground.page, playground.page.keyboard
    playground.set(max_tokens=ENDLESS)
    playground.text.focus()
    keys.type("once")
    keys.press("Control+Enter")
    playground.expect(playground.button("Stop")).to_be_visible()
    playground.expect(playground.text).not_to_have_value("once")
    assert playground.text.get_attribute("readonly") is not None
    keys.press("Escape")
    playground.expect(playground.status).to_contain_text("Stopped after")
    written = playground.value()
    assert written.startswith("once") and 4 < len(written) < ENDLESS
    keys.type("!")
    assert playground.value() == written + "!"
    keys.press("Control+z")
    assert playground.value() == written
    keys.press("Control+z")
    assert playground.value() == "once"
    page.keyboard.press("Control+z")
    assert playground.value() == ""
    playground.expect(playground.button("Undo")).to_be_disabled()


def test_one_seed_writes_one_text_and_another_one_another(playground):
    playground.set(temperature=2, max_tokens=20, top_p=1)
    playground.page.get_by_label("New each time").uncheck()
    playground.set(seed=5)
    playground.text.fill("then")
    playground.button("Continue").click()
    playground.expect(playground.status).to_have_text("20 tokens written.")
    first = playground.value()
    playground.button("Regenerate").click()
    playground.expect(playground.status).to_contain_text("The same seed wrote the same text again.")
    assert playground.value() == first
    playground.set(seed=6)
    playground.button("Regenerate").click()
    playground.expect(playground.status).to_have_text("20 tokens written.")
    assert playground.value() != first and playground.value().startswith("then")
    playground.button("Undo").click()
    assert playground.value() == first
    playground.page.get_by_label("New each time").check()
    playground.button("Regenerate").click()
    playground.expect(playground.page.locator("#seed")).not_to_have_value("6")


def test_a_token_can_be_opened_and_another_one_taken_in_its_place(playground, address):
    text = playground.write(10, "a tree")
    before, after = playground.button("Token before"), playground.button("Token after")
    for _ in range(6):
        before.click()
    playground.expect(playground.title).to_contain_text("Token 11 of 16")
    playground.expect(playground.page.locator("#candidates [aria-current]")).to_have_count(1)
    found = post(address, "/api/candidates", text=text[:10], token=ord(text[10]), **GREEDY)
    rows = playground.candidates()
    expected = f"{100 * found['candidates'][0]['probability']:.1f} %"
    playground.expect(rows.first).to_contain_text(expected)
    assert rows.count() == 10
    after.click()
    playground.expect(playground.title).to_contain_text("Token 12 of 16")
    before.click()
    playground.expect(playground.title).to_contain_text("Token 11 of 16")
    other = found["candidates"][3]
    assert other["id"] != ord(text[10])
    playground.candidates().nth(3).focus()
    playground.page.keyboard.press("Enter")
    branch = text[:10] + other["text"]
    playground.expect(playground.text).to_have_value(branch)
    playground.expect(playground.title).to_have_text("The next token")
    assert playground.write(4) == branch + continuation(address, branch, 4)
    playground.button("Undo").click()
    playground.button("Undo").click()
    assert playground.value() == text


def test_a_candidate_of_the_place_before_cannot_be_chosen_on_the_way(playground):
    text = playground.write(6, "a tree")
    playground.expect(playground.candidates()).to_have_count(10)
    both = "['[aria-label=\"Token before\"]', '#candidates li button']"
    playground.page.evaluate(f"{both}.forEach((each) => document.querySelector(each).click())")
    playground.expect(playground.title).to_contain_text("Token 12 of 12")
    assert playground.value() == text


def test_a_click_in_the_text_opens_the_token_under_it(playground):
    playground.write(8, "m" * 20)
    box = playground.page.evaluate(
        """() => {
          const range = document.createRange();
          range.setStart(mirror.firstChild, 22);
          range.setEnd(mirror.firstChild, 23);
          const { right, top, height } = range.getBoundingClientRect();
          return [right - 1, top + height / 2];
        }"""
    )
    playground.page.mouse.click(*box)  # in the last pixel of the letter
    playground.expect(playground.title).to_contain_text("Token 23 of 28")
    playground.page.keyboard.press("ArrowLeft")
    playground.page.keyboard.press("ArrowLeft")
    playground.expect(playground.title).to_contain_text("Token 22 of 28")


def test_an_edit_keeps_the_tokens_before_it_and_cuts_what_follows_anew(playground):
    text = playground.write(6, "ab")
    playground.text.focus()
    playground.text.evaluate("(area) => area.setSelectionRange(5, 6)")
    playground.page.keyboard.type("é")
    assert playground.value() == text[:5] + "é" + text[6:]
    playground.tab("Tokens")
    cuts = playground.page.locator(".cut")
    playground.expect(cuts).to_have_count(9)  # é has two bytes
    pieces = cuts.locator(".piece").all_text_contents()
    assert pieces == [*text[:5], r"\xC3", r"\xA9", *text[6:]]
    assert playground.highlights() == 3


def test_the_cuts_show_what_cannot_be_seen_and_can_be_walked_through(playground):
    playground.text.fill("a b\n\t語\0")
    playground.tab("Tokens")
    cuts = playground.page.locator(".cut")
    playground.expect(cuts).to_have_count(9)
    assert cuts.locator(".piece").all_text_contents() == [
        *("a", "␣", "b", "↵", "⇥", r"\xE8", r"\xAA", r"\x9E", r"\x00"),
    ]
    assert cuts.locator(".id").all_text_contents()[:3] == ["97", "32", "98"]
    playground.page.get_by_role("listbox").focus()
    playground.page.keyboard.press("Home")
    playground.page.keyboard.press("ArrowRight")
    playground.expect(cuts.nth(1)).to_have_attribute("aria-selected", "true")
    playground.expect(playground.page.locator("#cuts")).to_contain_text("id 32, 1 byte: 20")
    playground.page.keyboard.press("Enter")
    playground.expect(playground.title).to_contain_text("Token 2 of 9: ␣")


def test_the_attention_picture_has_the_weights_that_the_model_has(served, address):
    text = served.write(6, "the cat sat")
    served.tab("Attention")
    page, picture = served.page, served.page.locator(".map canvas")
    named = page.locator("#pair")
    served.expect(named).to_contain_text("looks at")
    page.get_by_label("Layer").select_option("0")
    told = post(address, "/api/attention", text=text, layer=0, last=48)
    for head in (1, 2):  # nobody has pointed at a pair: each head shows its own strongest
        page.get_by_role("button", name=f"Head {head}").click()
        row = told["weights"][head][-1]
        served.expect(page.locator("#attention")).to_contain_text(f"Layer 0, head {head}.")
        served.expect(named).to_have_text(expected_pair(text, row, int(np.argmax(row))))
    page.locator(".map").focus()
    page.keyboard.press("ArrowUp")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    row = told["weights"][2][-2]
    served.expect(named).to_have_text(expected_pair(text[:-1], row, 0))
    shades = page.evaluate(
        """() => {
          const canvas = document.querySelector(".map canvas");
          const { width } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, width);
          const cell = 26, margin = width - 17 * cell;
          const middle = (n) => margin + n * cell + 13;
          const at = (i, j) => [...data.slice(4 * (middle(i) * width + middle(j))).slice(0, 4)];
          return { margin, column: [...Array(17).keys()].map((i) => at(i, 0)), future: at(3, 9) };
        }"""
    )
    assert shades["margin"] > 0 and shades["future"][3] == 0, "nothing looks ahead"
    green = [shade[1] for shade in shades["column"]]
    weights = [told["weights"][2][i][0] for i in range(17)]
    order = np.argsort(weights)
    assert (np.diff(np.array(green)[order]) <= 1).all(), "the more weight, the darker"
    assert max(green) - min(green) > 50
    box = picture.bounding_box()
    page.mouse.move(
        box["x"] + shades["margin"] + 5 * 26 + 9, box["y"] + shades["margin"] + 9 * 26 + 9
    )
    row = told["weights"][2][9]
    served.expect(named).to_have_text(expected_pair(text[:10], row, 5))


def expected_pair(text, row, column):
    def shown(character):
        return character.replace(" ", "␣")

    p = row[column]
    percent = (
        "<0.01 %" if 0 < p < 1e-4 else "0 %" if p == 0 else f"{100 * p:.{1 if p >= 0.01 else 2}f} %"
    )
    return f"{shown(text[-1])} looks at {shown(text[column])}: {percent}"


def test_a_refusal_is_told_in_words(served):
    served.page.route(
        "**/api/tokens",
        lambda route: route.fulfill(status=400, json={"error": {"message": "No such character."}}),
        times=1,
    )
    served.text.fill("x")
    error = served.page.get_by_role("alert")
    served.expect(error).to_have_text("No such character.")
    served.text.fill("y")
    served.expect(error).to_be_hidden()


LONG = ["x" * 9000, "語" * 3000 + "é", "word " * 24_000 + "\U0001f642"]


def test_a_text_that_is_too_long_stays_whole_and_the_model_is_given_its_end(playground, address):
    page = playground.page
    for text in LONG:
        playground.text.fill(text)
        playground.expect(playground.status).to_contain_text("the model is given its end")
        playground.expect(page.locator("#meter")).to_contain_text("the last 8,1")
        playground.expect(page.locator("#meter")).to_contain_text("the model sees the last 48")
        assert playground.write(3) == text + continuation(address, text[-60:], 3)
    playground.expect(page.get_by_role("alert")).to_be_hidden()
    playground.tab("Tokens")
    playground.expect(page.locator("#cuts")).to_contain_text("The text begins before them.")
    if page.get_by_role("tab", name="Attention").is_visible():
        playground.tab("Attention")
        playground.expect(page.locator("#pair")).to_contain_text("looks at")
    playground.tab("Candidates")
    playground.text.press("Control+Home")
    playground.expect(playground.title).to_contain_text("Token 1 of")
    playground.expect(page.locator("#candidates")).to_contain_text("further back than the model")
    playground.text.fill("short")
    playground.expect(page.locator("#meter")).to_have_text("5 tokens")


def test_the_text_outlives_a_reload_and_the_way_back(playground, address):
    page = playground.page
    text = playground.write(6, "Once 語")
    playground.tab("Tokens")
    for place in (None, "about:blank"):
        page.reload() if place is None else (page.goto(place), page.go_back())
        playground.expect(playground.text).to_have_value(text)
        playground.ready()
        playground.expect(page.locator("#meter")).to_contain_text(f"{len(text.encode())} tokens")
        assert playground.highlights() == 6  # what the model wrote is still the model's
    assert playground.write(2) == text + continuation(address, text, 2)
    playground.text.fill("")
    page.reload()
    playground.ready()
    assert playground.value() == ""


def test_of_another_model_only_the_text_is_taken_over(playground):
    page = playground.page
    text = playground.write(6, "Once")
    until(lambda: page.evaluate("sessionStorage.getItem(sessionStorage.key(0))?.includes('model')"))
    page.add_init_script(
        "const key = sessionStorage.key(0), kept = JSON.parse(sessionStorage.getItem(key));"
        "sessionStorage.setItem(key, JSON.stringify({ ...kept, model: 'another' }));"
    )
    page.reload()
    playground.expect(page.locator("#meter")).to_have_text("10 tokens")
    assert playground.value() == text
    until(lambda: playground.highlights() == 0)


def test_without_storage_the_page_works_as_long_as_it_is_open(open_page, place):
    page = open_page(place)
    page.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new Error('no'); } });"
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } });"
    )
    page.reload()
    playground = Playground(page)
    playground.ready()
    text = playground.write(3, "if")
    playground.button("Undo").click()
    playground.button("Redo").click()
    assert playground.value() == text


def test_what_was_undone_can_be_done_again_by_key_and_button(playground):
    keys = playground.page.keyboard
    text = playground.write(4, "once")
    playground.text.focus()
    undo, redo = playground.button("Undo"), playground.button("Redo")
    playground.expect(redo).to_be_disabled()
    for again in ("Control+Shift+Z", "Control+y"):
        keys.press("Control+z")
        assert playground.value() == "once"
        playground.expect(redo).to_be_enabled()
        keys.press(again)
        assert playground.value() == text
        playground.expect(redo).to_be_disabled()
    undo.click()
    undo.click()
    assert playground.value() == ""
    keys.press("Control+y")  # from the button, too
    redo.click()
    assert playground.value() == text
    undo.click()
    playground.text.press_sequentially("!")  # which makes another text of it
    playground.expect(redo).to_be_disabled()


def test_reset_gives_every_field_its_first_value(playground):
    first = (
        "[...document.querySelectorAll('#sampling input')].map((i) => [i.id, i.value, i.checked])"
    )
    before = playground.page.evaluate(first)
    playground.set()
    playground.page.get_by_label("New each time").uncheck()
    playground.set(
        temperature=1.5, top_k=7, top_p=0.5, min_p=0.1, repetition_penalty=1.3, max_tokens=7, seed=9
    )
    playground.set(**{"sample-count": 3})
    pairs = zip(before, playground.page.evaluate(first), strict=True)
    assert all(a != b for a, b in pairs if a[0] != "ignore_eos")
    playground.button("Reset").click()
    playground.expect(playground.page.locator("#temperature-value")).to_have_text("1.00")
    assert playground.page.evaluate(first) == before
    assert playground.page.locator("#seed").get_attribute("readonly") is not None


def test_an_empty_page_offers_beginnings(playground):
    page = playground.page
    offered = page.locator("#beginnings button")
    playground.expect(offered).to_have_text(BEGINNINGS)
    offered.nth(1).click()
    assert playground.value() == BEGINNINGS[1] and page.locator("b").count() == 0
    playground.expect(offered.first).to_be_hidden()
    playground.button("Undo").click()
    playground.expect(offered.first).to_be_visible()


def test_a_text_ends_before_a_stop_string(playground, address):
    whole = continuation(address, "a tree", 12)
    at = 5
    assert whole.index(whole[at : at + 2]) == at, "the test needs one that occurs once"
    playground.set(temperature=0, max_tokens=12, stop=f"nowhere\n{whole[at : at + 2]}")
    playground.text.fill("a tree")
    playground.button("Continue").click()
    playground.expect(playground.status).to_have_text("5 tokens written. The text ends here.")
    assert playground.value() == "a tree" + whole[:at]


def test_several_samples_stand_side_by_side_and_one_is_taken(playground):
    page = playground.page
    playground.set()
    page.get_by_label("New each time").uncheck()
    playground.set(temperature=2, max_tokens=9, seed=3, **{"sample-count": 3})
    playground.text.fill("then")
    playground.button("Continue").click()
    playground.expect(playground.status).to_contain_text("3 samples written.")
    assert playground.value() == "then"
    texts = page.locator(".sample-text").all_text_contents()
    assert len(set(texts)) == 3
    playground.button("Take sample 2").click()
    taken = playground.value()
    assert taken == "then" + texts[1] and page.locator("#samples").is_hidden()
    playground.button("Undo").click()
    assert playground.value() == "then"
    playground.set(seed=4, **{"sample-count": 1})  # the seed of the second of them
    playground.button("Continue").click()
    playground.expect(playground.text).to_have_value(taken)


def test_colours_can_be_switched_off_and_new_tokens_fade_in_where_motion_is_wanted(
    open_page, place
):
    playground = Playground(open_page(place, reduced_motion="no-preference")).ready()
    page = playground.page
    playground.write(6, "once")
    assert playground.highlights() == 6
    playground.set(max_tokens=ENDLESS)
    playground.button("Continue").click()
    until(lambda: playground.highlights() > 6)
    page.keyboard.press("Escape")
    assert page.evaluate("CSS.highlights.has('fresh')")
    page.get_by_label("Colours").uncheck()
    assert playground.highlights() == 0
    page.get_by_label("Colours").check()
    assert playground.highlights() > 6


def test_the_story_says_how_a_token_comes_about(playground):
    page, story = playground.page, playground.page.locator("#story")
    playground.write(3, "once")
    assert re.sub(r"\s+", " ", story.inner_text()).startswith("Text 7 characters Tokens 7 Layers")
    playground.expect(story).to_contain_text("2 layers, 3 heads")
    playground.expect(story).to_contain_text("1 of 256")  # greedily
    story.get_by_role("button", name="Draw").click()
    playground.expect(playground.status).to_have_text("1 token written.")
    assert len(playground.value()) == 8
    story.get_by_role("button", name="Tokens").click()
    playground.expect(page.locator(".cut")).to_have_count(8)


def test_a_text_can_be_copied_saved_and_linked_to(open_page, place):
    playground = Playground(
        open_page(place, permissions=["clipboard-read", "clipboard-write"])
    ).ready()
    page = playground.page
    playground.set(temperature=1, max_tokens=20, top_k=50)
    playground.text.fill("诗 & <b>")
    playground.button("Continue").click()
    playground.expect(playground.status).to_have_text("20 tokens written.")
    text = playground.value()
    playground.button("Copy").click()
    playground.expect(playground.status).to_have_text("Text copied.")
    with page.expect_download() as saving:
        playground.button("Download").click()
    assert saving.value.path().read_text(encoding="utf-8") == text
    playground.set(temperature=2)  # for the next text, not for the one that is there
    page.get_by_role("button", name="Link", exact=True).click()
    playground.expect(playground.status).to_contain_text("ink")
    link = page.evaluate("location.href")
    again = Playground(open_page(link)).ready()
    again.expect(again.status).to_have_text("20 tokens written.")
    assert again.value() == text
    seed = urllib.parse.parse_qs(link.split("#")[1])["seed"][0]
    other = Playground(open_page(link.replace(f"seed={seed}", f"seed={int(seed) ^ 1}"))).ready()
    other.expect(other.status).to_have_text("20 tokens written.")
    assert other.value() != text
    playground.text.fill("abcd")  # was typed, not written: the link goes on from it
    page.get_by_role("button", name="Link", exact=True).click()
    until(lambda: page.evaluate("location.hash").startswith("#prompt=abcd"))


def test_the_same_text_as_a_program(served, address, service):
    page = served.page
    served.set(temperature=0, max_tokens=7, stop="zz")
    served.text.fill("it's 诗")
    served.button("curl").click()
    curl, python = page.locator("dialog pre").all_inner_texts()
    assert axe_violations(page) == []
    words = shlex.split(curl.replace("\\\n", " "))
    assert words[1] == f"{address}/v1/completions"
    status, answer = ask(address, "/v1/completions", words[-1].encode())
    assert status == 200, answer
    assert json.loads(answer)["choices"][0]["text"] == continuation(address, "it's 诗", 7)
    compile(python, "program", "exec")
    assert "base_url=" in python and "max_tokens=7" in python
    page.get_by_role("button", name="Close").click()


def test_what_the_page_says_is_so(playground):
    """Each text at a moment at which it was wrong once."""
    page = playground.page
    panel = page.locator("#candidates")
    playground.expect(panel).to_contain_text("Write something")  # nothing: no text of a first token
    legend = page.locator("#legend")
    assert "Point at" not in legend.inner_text() and "cursor" in legend.inner_text()
    playground.text.fill("ab")
    playground.text.press("Control+Home")
    playground.expect(panel).to_contain_text("Nothing comes before the first token")
    playground.text.fill("")
    playground.set(max_tokens=ENDLESS)
    playground.button("Continue").click()
    for tab, said in (("Candidates", "its candidates"), ("Attention", "where it looks"),
                      ("Tokens", "its tokens")):  # fmt: skip
        if page.get_by_role("tab", name=tab).is_hidden():
            continue
        playground.tab(tab)
        playground.expect(page.locator(".panel:visible")).to_contain_text(
            f"is writing; {said} come"
        )
    playground.tab("Candidates")
    assert "Nothing comes before" not in panel.inner_text() and playground.value()
    playground.expect(playground.text).to_have_value(re.compile(r"[\s\S]{9}"))
    playground.button("Stop").click()
    playground.expect(panel).to_contain_text("Sampling leaves")
    playground.candidates().first.click()
    playground.expect(playground.status).to_have_text("Chosen.")  # at the end nothing is lost
    for _ in range(2):
        playground.button("Token before").click()
    playground.expect(page.locator("#candidates [aria-current]")).to_have_count(1)
    playground.candidates().last.click()
    playground.expect(playground.status).to_contain_text("Undo brings it back")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_a_phone_or_a_desk_in_light_or_dark(open_page, place, scheme):
    width = 360 if scheme == "dark" else 1200
    size = {"width": width, "height": 740}
    page = open_page(place, color_scheme=scheme, viewport=size, device_scale_factor=1)
    playground = Playground(page).ready()
    assert axe_violations(page) == [], "with beginnings"
    page.evaluate("document.querySelector('#pages')?.removeAttribute('hidden')")  # with a dashboard
    playground.write(20, "It was")
    playground.expect(playground.candidates()).to_have_count(10)
    playground.expect(page.locator("#story")).to_contain_text("1 of 256")
    assert overflow(page) <= 0
    assert axe_violations(page) == []
    for tab in ("Attention", "Tokens", "Model"):
        if page.get_by_role("tab", name=tab).is_hidden():
            continue
        playground.tab(tab)
        if tab == "Attention":
            playground.expect(page.locator("#pair")).to_contain_text("looks at")
        assert axe_violations(page) == [], tab
        assert overflow(page) <= 0, tab
    playground.set(max_tokens=9, **{"sample-count": 3})
    playground.button("Continue").click()
    playground.expect(playground.status).to_contain_text("3 samples written.")
    assert axe_violations(page) == [], "with samples"
    assert overflow(page) <= 0, "with samples"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_candidates_stay_legible_while_others_are_asked_for(open_page, address, scheme):
    page = open_page(address, color_scheme=scheme)
    playground = Playground(page)
    with page.expect_response(lambda answer: asks_for_candidates(answer, behind=11)):
        playground.write(5, "It was")
    playground.expect(playground.candidates()).to_have_count(10)
    held = []
    page.route("**/api/candidates", lambda route: held.append(route))
    playground.button("Token before").click()
    playground.expect(page.locator(".candidates")).to_have_attribute("aria-busy", "true")
    playground.expect(page.locator(".candidates .bars").first).to_have_css("opacity", "0.3")
    assert axe_violations(page) == []
    held.pop().continue_()
    playground.expect(page.locator("#candidates [aria-current]")).to_have_count(1)
    playground.expect(page.locator(".candidates .bars").first).to_have_css("opacity", "1")


def test_the_theme_can_be_chosen_and_is_kept(open_page, place):
    page = open_page(place, color_scheme="light")
    theme = page.get_by_role("button", name="Theme")

    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    theme.click()
    assert paper() == light
    theme.click()
    assert theme.text_content() == "Dark" and paper() != light
    page.reload()
    assert paper() != light
    theme.click()
    assert theme.text_content() == "Auto" and paper() == light


def test_a_server_with_a_key_is_asked_for_it_once(open_page, service):
    key = "correct horse".replace(" ", "-")
    with running(service, api_key=key) as address:
        page = open_page(address)
        for wrong in ("not-that-one", key):
            page.get_by_label("Key", exact=True).fill(wrong)
            page.get_by_role("dialog").get_by_role("button", name="Continue").click()
        playground = Playground(page).ready()
        assert page.evaluate("sessionStorage.length") == 1
        page.reload()
        playground.ready()
        assert len(playground.write(3, "if")) == 5
        page.goto("about:blank")


def test_a_half_written_character_can_be_gone_on_from(served):
    page = served.page
    served.text.fill("caf")
    for byte, expected in ((0xC3, "caf\ufffd"), (0xA9, "café")):
        only = {"id": byte, "bytes": [byte], "probability": 0.5, "sampled": 0.5}
        answer = {"candidates": [only], "chosen": None, "kept": 1, "vocabulary": 256}
        with offering(page, answer):
            page.locator("#candidates li button", has_text=f"\\x{byte:X}").click()
        served.expect(served.text).to_have_value(expected)
    served.tab("Tokens")
    ids = page.locator(".cut .id")
    served.expect(ids).to_have_text(["99", "97", "102", "195", "169"])
    text = served.write(2)
    assert text.startswith("café") and len(text) == 6


@contextlib.contextmanager
def offering(page, answer):
    """The candidates of a server that has only this answer."""
    page.route("**/api/candidates", lambda route: route.fulfill(json=answer))
    page.locator("#temperature").fill(
        "1.5" if page.locator("#temperature").input_value() == "1" else "1"
    )
    yield
    page.unroute("**/api/candidates")


# ---- the talk ----


def asked(playground, question):
    """Ask in the Chat tab; -> the text of the answer, when it is whole."""
    page = playground.page
    rows = page.locator(".turn.assistant").count()
    page.locator("#question").fill(question)
    playground.button("Send").click()
    playground.expect(page.locator(".turn.assistant")).to_have_count(rows + 1)
    playground.expect(page.locator("#turns")).to_have_attribute("aria-busy", "false")
    return page.locator(".turn.assistant").last.locator(".said").all_text_contents()


def in_an_answer(playground):
    """The page with an answer that is being written, and has no end, in the Chat tab."""
    playground.ready().set(temperature=0, max_tokens=ENDLESS)
    page = playground.page
    playground.tab("Chat")
    page.locator("#question").fill("Hi")
    page.locator("#question").press("Enter")
    playground.expect(page.locator(".said").nth(30)).to_be_attached()
    return page


def test_a_talk_is_held_and_each_answer_s_tokens_open(playground, service):
    playground.ready().set(temperature=0, max_tokens=6)
    page, expect = playground.page, playground.expect
    playground.tab("Chat")
    first = asked(playground, "Hi <b>")
    said = [{"role": "user", "content": "Hi <b>"}]
    prompt = chat_prompt(ByteTokenizer(), said, 48, 6).ids
    given = Tensor([prompt], dtype="int32")
    work = service.engine.run(lambda: service.model.generate(given, 6, temperature=0).tolist())
    written = work.result()[0]
    assert "".join(first) == bytes(written[len(prompt) :]).decode(errors="replace")
    expect(page.locator(".turn.user")).to_contain_text("Hi <b>")
    page.locator(".turn.assistant .said").nth(2).click()
    expect(playground.title).to_have_text(
        f"Token {len(prompt) + 3} of {len(prompt) + 6}: {first[2]}"
    )
    assert playground.candidates().count() >= 10
    page.get_by_role("button", name="Token after").click()
    expect(playground.title).to_contain_text(f"Token {len(prompt) + 4} of")
    playground.candidates().nth(3).click()  # another token: the answer goes on from it
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".said.level-chosen")).to_have_count(1)
    branched = page.locator(".turn.assistant .said").all_text_contents()
    assert branched[:3] == first[:3] and branched[3] != first[3]
    asked(playground, "And?")
    expect(page.locator(".turn")).to_have_count(4)
    playground.button("Take back").click()
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#question")).to_have_value("And?")
    playground.button("Answer anew").click()
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".turn")).to_have_count(2)
    assert overflow(page) <= 0
    assert axe_violations(page) == []
    playground.button("New talk").click()
    expect(page.locator(".turn")).to_have_count(0)
    playground.tab("Text")
    assert playground.value() == ""  # the text is another one


def test_a_talk_can_be_stopped_and_what_was_written_stays(playground):
    page, expect = in_an_answer(playground), playground.expect
    page.locator("#send").dispatch_event("click")
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false")
    expect(playground.status).to_contain_text("Stopped after")
    expect(page.locator(".turn")).to_have_count(2)


def test_a_talk_outlives_a_reload_until_another_is_begun(playground):
    playground.ready().set(temperature=0, max_tokens=6)
    page, expect = playground.page, playground.expect
    playground.tab("Chat")
    page.locator("summary", has_text="System").click()
    page.locator("#system").fill("Be brief.")
    asked(playground, "Hi 語")
    asked(playground, "And?")
    rows, said = (page.locator(place).all_text_contents() for place in (".turn", ".said"))
    page.locator("#question").fill("not asked yet")
    page.reload()
    playground.ready()
    expect(page.locator(".turn")).to_have_text(rows)
    assert page.locator(".said").all_text_contents() == said
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#question")).to_have_value("not asked yet")
    expect(page.locator("#system")).to_have_value("Be brief.")
    page.locator(".turn.assistant").last.locator(".said").nth(1).click()
    expect(playground.title).to_contain_text(f": {said[len(said) // 2 + 1]}")
    page.locator("#system").fill("")
    page.locator("#question").fill("")
    playground.button("New talk").click()
    page.reload()
    playground.ready()
    expect(page.get_by_role("tab", name="Text")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".turn")).to_have_count(0)


def test_of_another_models_talk_the_words_are_taken_over(playground):
    playground.ready().set(temperature=0, max_tokens=6)
    page, expect = playground.page, playground.expect
    playground.tab("Chat")
    answer = "".join(asked(playground, "Hi"))
    page.add_init_script(
        "const key = Object.keys(sessionStorage).find((key) => key.includes('talk'));"
        "const kept = JSON.parse(sessionStorage.getItem(key));"
        "sessionStorage.setItem(key, JSON.stringify({ ...kept, model: 'another' }));"
    )
    page.reload()
    playground.ready()
    expect(page.locator(".said")).to_have_count(0)
    expect(page.locator(".turn.assistant")).to_have_text(f"Model: {answer}")
    assert asked(playground, "And?")
    expect(page.locator(".turn")).to_have_count(4)


def test_of_an_answer_in_progress_what_is_there_outlives_a_reload(playground):
    page, expect = in_an_answer(playground), playground.expect
    page.reload()
    playground.ready()
    expect(page.locator(".turn")).to_have_count(2)
    assert page.locator(".said").count() > 30
    expect(page.locator("#send")).to_have_text("Send")
