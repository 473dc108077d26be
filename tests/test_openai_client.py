"""OpenAI's own client works with the server as it is: every parameter, streams, and errors."""

import json
import shutil
import subprocess
import threading

import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("openai", reason="needs the extra 'test'")

import openai

from tests.serving import ALPHABET, PATIENCE, FakeEngine, fake_service, running, until

KEY = "a-key-for-the-tests"
HELLO = [{"role": "user", "content": "Hello"}]


def make_client(address, **options):
    given = {"api_key": KEY, "max_retries": 0, "timeout": PATIENCE} | options
    return openai.OpenAI(base_url=f"{address}/v1", **given)


@pytest.fixture(scope="module")
def service():
    return fake_service()


@pytest.fixture(scope="module")
def client(service):
    with running(service, api_key=KEY) as address, make_client(address) as made:
        yield made


def last_request(service):
    return service.engine.streams[-1].request


def test_models(client):
    [model] = client.models.list()
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_completion_with_every_parameter(client, service):
    answer = client.completions.create(
        model="tiny", prompt=["Once", "Hello"], best_of=2, n=2, echo=True, frequency_penalty=0,
        logit_bias={}, logprobs=1, max_tokens=3, presence_penalty=0, seed=7, stop=["x", "y"],
        stream=False, suffix="", temperature=0.7, top_p=0.9, user="me",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert [choice.text for choice in answer.choices] == ["Onceabc"] * 2 + ["Helloabc"] * 2
    assert answer.choices[0].logprobs.tokens == [*"Onceabc"]
    assert answer.choices[0].logprobs.token_logprobs[-1] == -0.5
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 12)
    request = last_request(service)
    assert (request.config.top_k, request.config.min_p) == (5, 0.1)
    assert (request.seed, request.stop) == (10, ("x", "y"))


def test_a_completion_of_token_ids(client, service):
    answer = client.completions.create(model="tiny", prompt=[72, 105], max_tokens=1)
    assert answer.choices[0].text == "a" and last_request(service).ids == (72, 105)


def test_a_streamed_completion(client):
    options = {"include_usage": True}
    with client.completions.create(
        model="tiny", prompt="Once", n=2, max_tokens=30, stream=True, stream_options=options
    ) as stream:
        *chunks, last = list(stream)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [(ALPHABET * 2)[:30]] * 2
    assert last.usage.total_tokens == 4 + 60


def test_a_chat_with_every_parameter(client, service):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "developer", "content": "Be brief."}, *HELLO], n=2,
        frequency_penalty=0, logit_bias={}, logprobs=True, top_logprobs=2, max_tokens=4,
        presence_penalty=0, response_format={"type": "text"}, seed=3, stop="x", store=False,
        temperature=0.2, top_p=0.5, user="me", tools=[], tool_choice="none",
    )  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == ["abcd"] * 2
    told = answer.choices[1].logprobs.content
    assert [token.token for token in told] == [*"abcd"] and len(told[0].top_logprobs) == 2
    assert last_request(service).seed == 4
    assert bytes(last_request(service).ids).startswith(b"Be brief.\n\nUser: Hello")


def test_a_streamed_chat(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=5, stream=True, stream_options=options
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "abcde"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert last.usage.completion_tokens == 5


def test_the_clients_own_helper_for_streams(client):
    with client.chat.completions.stream(model="tiny", messages=HELLO, max_tokens=5) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert deltas[0] == "" and "".join(deltas) == "abcde"


def test_a_stream_that_is_closed_early_frees_its_place(client, service):
    service.engine.pace = 0.01
    try:
        with client.completions.create(
            model="tiny", prompt="Once", max_tokens=4000, stream=True
        ) as stream:
            next(iter(stream))
        until(lambda: not service.engine.open())
    finally:
        service.engine.pace = 0
    assert service.engine.streams[-1].finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (openai.NotFoundError, {"model": "gpt-5"}),
        (openai.BadRequestError, {"presence_penalty": 3.0}),
        (openai.BadRequestError, {"temperature": 3}),
        (openai.BadRequestError, {"suffix": "the end"}),
        (openai.BadRequestError, {"extra_body": {"typical_p": 0.5}}),
    ],
)
def test_errors_are_the_clients_own(client, kind, fields):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "Once"} | fields)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"]


def test_other_errors_are_the_clients_own():
    service = fake_service(FakeEngine(queue=0))
    with running(service, api_key=KEY) as address:
        with make_client(address) as client, pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert caught.value.code == "queue_full"
        with make_client(address, api_key="wrong") as client:  # noqa: SIM117
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    failing = fake_service(FakeEngine(error=RuntimeError("broken")))
    with running(failing) as address, make_client(address) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="Once")
        with pytest.raises(openai.APIError, match="The server failed"):
            list(client.completions.create(model="tiny", prompt="Once", stream=True))


def test_a_client_that_retries_gets_its_turn():
    service = fake_service(FakeEngine(queue=1))
    service.engine.go.clear()

    def go_on_after_a_refusal():
        until(lambda: any(status == 429 for _, status in service.counts.requests))
        service.engine.go.set()

    late = threading.Thread(target=go_on_after_a_refusal)
    with running(service) as address, make_client(address, max_retries=5) as client:
        first = client.completions.create(model="tiny", prompt="Once", stream=True)
        late.start()
        answer = client.completions.create(model="tiny", prompt="Once", max_tokens=2)
        late.join()
        assert answer.choices[0].text == "ab"
        assert "".join(chunk.choices[0].text for chunk in first) == "abcdefghijklmnop"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams(service):
    with running(service) as address:
        body = '{"prompt": "Once", "max_tokens": 2, "stream": true}'
        command = ["curl", "-sN", f"{address}/v1/completions", "-d", body]
        command += ["-H", "Content-Type: application/json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    *lines, last = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == "ab"
    assert last == "[DONE]" and done.stdout.count("data: ") == len(lines) + 1
