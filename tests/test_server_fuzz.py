"""Whatever is sent to the server, it answers, as its own document says, and never with a 5xx."""

import json

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx2", reason="the tests' HTTP client is not installed")
pytest.importorskip("schemathesis", reason="needs the extra 'test'")

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from tests.serving import fake_service
from tinygpt.server.app import make_app

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
APP = make_app(fake_service(max_tokens=40), hosts=["testserver"])
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CLIENT = TestClient(APP, raise_server_exceptions=False)


def settings(examples):
    return hypothesis.settings(
        max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None
    )


def check_conformance(case):
    """Statuses, media types, bodies and refusals of wrong data: all as the document says.

    What the document lets through is accepted, unless fields that are right do not go together, or
    one that nobody knows holds what no JSON of ours may hold.
    """
    response = case.call()
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    assert response.status_code < 500
    mode = case.meta.generation.mode
    if mode.is_positive and response.status_code == 400:
        codes = ("conflicting_fields", "bad_text", "invalid_json")
        assert response.json()["error"]["code"] in codes


@SCHEMA.parametrize()
@settings(15)
def test_every_answer_is_as_the_document_says(case):
    check_conformance(case)


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(300)
def test_every_answer_is_as_the_document_says_for_long(case):
    check_conformance(case)


NAMES = [
    "prompt", "messages", "model", "max_tokens", "n", "stop", "logprobs", "stream", "seed", "echo",
    "temperature", "top_p", "top_k", "logit_bias", "stream_options", "role", "content",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=20,
)
FIELDS = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6)


def check_answer(path, content):
    """An answer in time, in one of two shapes."""
    answer = CLIENT.post(path, content=content, headers={"content-type": "application/json"})
    if answer.status_code == 200:
        assert answer.text.endswith("data: [DONE]\n\n") or answer.json()["choices"]
        return
    assert 400 <= answer.status_code < 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def any_json(value, examples):
    """A test of the given value sent as JSON to both endpoints; some of it will be right."""
    right = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}

    @settings(examples)
    @given(value, st.sampled_from([(COMPLETIONS, "messages"), (CHATS, "prompt")]), st.booleans())
    def run(value, target, mended):
        path, other = target
        if mended and isinstance(value, dict):
            value = {name: v for name, v in (right | value).items() if name != other}
        check_answer(path, json.dumps(value).encode())

    return run


def test_any_json_is_answered():
    any_json(JSON | FIELDS, 150)()


@pytest.mark.slow
def test_any_json_is_answered_for_long():
    any_json(JSON | FIELDS, 3000)()


@settings(60)
@given(st.binary(max_size=60))
def test_any_bytes_are_answered(content):
    check_answer(COMPLETIONS, content)
    check_answer(COMPLETIONS, b'{"prompt": "' + content + b'"}')


@settings(60)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=20))
def test_any_header_is_answered(text):
    value = text.encode("latin-1")
    for name in (b"host", b"origin", b"authorization", b"content-type", b"content-length"):
        answer = CLIENT.get("/v1/models", headers=[(name, value)])
        assert answer.status_code in (200, 403)
    answer = CLIENT.get(f"/v1/models/{text.replace('%', '%25')}")
    assert answer.status_code in (200, 404)
