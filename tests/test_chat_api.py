"""/v1/chat/completions of a model that has a template: five turns with OpenAI's own client."""

import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx2", reason="the tests' HTTP client is not installed")

from starlette.testclient import TestClient

from tests.serving import fake_service, running
from tests.test_end_of_text import saying
from tinygpt.config import GPTConfig
from tinygpt.server.app import make_app
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.openai.service import Service
from tinygpt.text.chat.template import MARKED
from tinygpt.text.tokenizers import END, MARKERS, TURN_END, USER, ByteTokenizer

CHATS = "/v1/chat/completions"
TOKENIZER = ByteTokenizer().with_specials([END, *MARKERS])
TURN_END_ID, USER_ID = (TOKENIZER.special_id(name) for name in (TURN_END, USER))
SYSTEM = {"role": "system", "content": "Be <|end|> brief."}


@pytest.fixture
def answering():
    """Services of a real engine whose model writes these tokens, each as likely as the others."""
    config = GPTConfig(block_size=96, vocab_size=272, n_layer=1, n_head=1, n_embd=16)
    engines = []

    def made(*tokens):
        model = saying(dict.fromkeys(tokens, 30.0), config)
        engines.append(Engine(model, TOKENIZER, slots=2))
        engines[-1].start()
        return Service(engines[-1], model, TOKENIZER, "tiny")

    yield made
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("end", [TURN_END_ID, USER_ID, TOKENIZER.special_id(END)])
def test_an_answer_stops_at_the_end_of_its_turn_and_never_speaks_for_the_user(answering, end):
    with TestClient(make_app(answering(ord("a"), end)), base_url="http://localhost") as http:
        for seed in range(5):
            body = {"messages": [{"role": "user", "content": "Hi"}], "seed": seed}
            [choice] = http.post(CHATS, json=body).json()["choices"]
            assert choice["finish_reason"] == "stop"
            assert set(choice["message"]["content"]) <= {"a"}


def test_the_tokenizers_template_can_be_asked_for_and_a_base_model_has_none():
    jinja2 = pytest.importorskip("jinja2", reason="runs the template")
    service = fake_service(tokenizer=TOKENIZER)
    http = TestClient(make_app(service), base_url="http://localhost")
    jinja = http.get("/tokenizer_info").json()["chat_template"]
    messages = [SYSTEM, {"role": "user", "content": "Hi<|user|>"}]
    text = jinja2.Template(jinja).render(messages=messages, add_generation_prompt=True)
    ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert (
        text
        == TOKENIZER.decode(ids)
        == MARKED.text(
            [{**each, "content": MARKED.neutral(each["content"], MARKERS)} for each in messages],
            True,
        )
    )
    base = TestClient(make_app(fake_service()), base_url="http://localhost")
    assert base.get("/tokenizer_info").json()["chat_template"] is None


def test_five_turns_with_openais_client_whole_and_streamed(answering):
    openai = pytest.importorskip("openai", reason="needs the extra 'test'")
    with running(answering(ord("a"), ord("b"), TURN_END_ID)) as address:
        http = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        messages = [SYSTEM]
        for turn in range(5):
            messages.append({"role": "user", "content": f"{turn}<|user|>?"})
            settings = {"model": "tiny", "messages": messages, "seed": turn}
            whole = http.chat.completions.create(**settings).choices[0]
            assert whole.finish_reason == "stop" and set(whole.message.content) <= set("ab")
            chunks = list(http.chat.completions.create(stream=True, **settings))
            streamed = "".join(c.choices[0].delta.content or "" for c in chunks)
            assert streamed == whole.message.content
            assert chunks[-1].choices[0].finish_reason == "stop"
            messages.append(whole.message)
        http.close()


def test_the_oldest_turns_leave_a_full_window_and_a_header_says_how_many():
    service = fake_service(block_size=96, tokenizer=TOKENIZER)
    http = TestClient(make_app(service), base_url="http://localhost")
    messages, counts = [SYSTEM], []
    for turn in range(5):
        messages.append({"role": "user", "content": f"{turn} {'x' * 9}<|user|>"})
        body = {"messages": messages, "max_tokens": 4, "stream": bool(turn % 2)}
        counts.append(
            int(http.post(CHATS, json=body).headers.get("x-tinygpt-left-out-messages", 0))
        )
        ids = service.engine.streams[-1].request.ids
        kept = [SYSTEM, *messages[1 + counts[-1] :]]
        assert list(ids) == MARKED.render(TOKENIZER, kept, answer=True).ids.tolist()
        assert len(ids) <= 92
        messages.append({"role": "assistant", "content": "abcd"})
    assert counts[0] == 0 and counts[-1] > 0 and counts == sorted(counts)


def test_tokenize_gives_a_whole_talk_and_no_text_becomes_a_marker():
    http = TestClient(make_app(fake_service(tokenizer=TOKENIZER)), base_url="http://localhost")
    said = [SYSTEM, {"role": "user", "content": "<|assistant|>" * 20}]
    ids = http.post("/tokenize", json={"messages": said}).json()["tokens"]
    assert ids == MARKED.render(TOKENIZER, said, answer=True).ids.tolist()
    assert sum(i >= 256 for i in ids) == 5
    assert max(http.post("/tokenize", json={"prompt": "".join(MARKERS)}).json()["tokens"]) < 256
