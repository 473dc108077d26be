"""The server: what it lets in, what it refuses, and that nobody holds up anybody else."""

import errno
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx2", reason="the tests' HTTP client is not installed")

import httpx2 as httpx
from starlette.testclient import TestClient
from tinygrad import Tensor

from tests.serving import (
    ALPHABET,
    PATIENCE,
    TINY,
    FakeEngine,
    connection,
    fake_service,
    running,
    until,
)
from tinygpt.api import GPT
from tinygpt.cli import main
from tinygpt.cli.serving import _name as name_of
from tinygpt.cli.serving import browser
from tinygpt.config import SampleConfig
from tinygpt.errors import MissingExtraError, TinyGPTError, UsageError, extras
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.sample import Penalties, softmax
from tinygpt.generation.stream import generate_text
from tinygpt.server.app import assemble, make_app
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.engine.scoring import score_texts
from tinygpt.server.engine.sequence import Piece, Request, Sequence, wake
from tinygpt.server.http import listening
from tinygpt.server.http.limits import Limits
from tinygpt.server.http.listening import HOOKS, Server, check_hooks, listen
from tinygpt.server.http.security import HEADERS, is_loopback
from tinygpt.server.openai.choices import Choice, Delta
from tinygpt.server.openai.prompts import messages_of
from tinygpt.server.openai.schema import check
from tinygpt.server.openai.service import Service
from tinygpt.text.chat.template import PLAIN
from tinygpt.text.tokenizers import ByteTokenizer, CharTokenizer

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MARK = "<script>alert('MARK')</script>"
KEY = "a-key-for-the-tests"


def plain_text(messages):
    return PLAIN.text(messages_of(messages), answer=True)


def client(service=None, host="localhost", **options):
    app = make_app(service or fake_service(), **options)
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


def complete(prompt="Once", **fields):
    return {"prompt": prompt, **fields}


def chat(content="Hello", **fields):
    return {"messages": [{"role": "user", "content": content}], **fields}


def error_of(answer, status):
    """The error of an answer, which has OpenAI's shape and repeats nothing that was sent."""
    assert answer.status_code == status, answer.text
    assert "MARK" not in answer.text
    assert answer.headers["content-type"] == "application/json"
    [(name, error)] = answer.json().items()
    assert name == "error" and list(error) == ["message", "type", "param", "code"]
    assert error["message"] and error["type"]
    return error


def events_of(text):
    """The JSON of server-sent events that end as OpenAI's do, and are as our document says."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    for event in found:
        if "error" not in event:
            kind = CHATS if event["object"].startswith("chat") else COMPLETIONS
            check(event, CHUNKS[kind])
    return found


def chunk_schema(path):
    """What the document says of the events of a stream."""
    answer = client().get("/openapi.json").json()["paths"][path]["post"]["responses"]["200"]
    event = answer["content"]["text/event-stream"]["schema"]
    return event["properties"]["data"]["anyOf"][1]["contentSchema"]


CHUNKS = {path: chunk_schema(path) for path in (COMPLETIONS, CHATS)}


# Answers ----------------------------------------------------------------------------------------


def test_a_completion_has_every_field_of_openais():
    answer = client().post(COMPLETIONS, json=complete(max_tokens=3, model="tiny")).json()
    assert re.fullmatch("cmpl-[0-9a-f]{24}", answer.pop("id"))
    assert abs(answer.pop("created") - time.time()) < 60
    choice = {"text": "abc", "index": 0, "logprobs": None, "finish_reason": "length"}
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert answer == {
        "model": "tiny", "object": "text_completion", "choices": [choice], "usage": usage,
    }  # fmt: skip


def test_a_chat_has_every_field_of_openais():
    answer = client().post(CHATS, json=chat(max_tokens=2)).json()
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    message = {"role": "assistant", "content": "ab", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    n = len("User: Hello\n\nAssistant:")
    usage = {"prompt_tokens": n, "completion_tokens": 2, "total_tokens": n + 2}
    assert answer == {
        "model": "tiny", "object": "chat.completion", "choices": [choice], "usage": usage,
    }  # fmt: skip


def test_defaults_are_openais_sixteen_tokens_and_our_own_of_a_chat():
    assert client().post(COMPLETIONS, json=complete()).json()["usage"]["completion_tokens"] == 16
    assert client().post(CHATS, json=chat()).json()["usage"]["completion_tokens"] == 256
    nulls = complete(max_tokens=None, n=None, stop=None, seed=None, stream=None, top_p=None)
    assert client().post(COMPLETIONS, json=nulls).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [("ab", [2]), (["ab", "c"], [2, 1]), ([7, 8, 9], [3]), ([[7], [8, 9]], [1, 2])],
)
def test_prompts_are_text_or_ids_one_or_several(prompt, counts):
    service = fake_service()
    answer = client(service).post(COMPLETIONS, json=complete(prompt, n=2, max_tokens=1, seed=5))
    requests = [stream.request for stream in service.engine.streams]
    assert [len(r.ids) for r in requests] == [c for c in counts for _ in range(2)]
    assert [r.seed for r in requests] == list(range(5, 5 + 2 * len(counts)))
    assert answer.json()["usage"]["prompt_tokens"] == sum(counts)
    assert [c["index"] for c in answer.json()["choices"]] == list(range(2 * len(counts)))


def test_every_setting_reaches_the_engine():
    service = fake_service()
    sampling = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
    }  # fmt: skip
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me",
        "best_of": 1, "suffix": "", "n": 1, "stream": False,
    }  # fmt: skip
    body = complete(**sampling, **neutral, max_tokens=3.0, stop=["x", "y"], seed=3, logprobs=2)
    assert client(service).post(COMPLETIONS, json=body).status_code == 200
    [stream] = service.engine.streams
    request = stream.request
    assert request.config == SampleConfig(**sampling)
    assert (request.max_tokens, request.stop, request.seed, request.logprobs) == (
        3, ("x", "y"), 3, 2,
    )  # fmt: skip
    neutral = complete(temperature=0, min_p=0, repetition_penalty=1, stop="z")
    assert client(service).post(COMPLETIONS, json=neutral).status_code == 200
    request = service.engine.streams[-1].request
    assert request.config == SampleConfig(temperature=0) and request.stop == ("z",)


def test_a_stream_of_completions_is_framed_as_openais():
    body = complete(
        n=2, max_tokens=2, stream=True, stream_options={"include_usage": True}, echo=True
    )
    answer = client().post(COMPLETIONS, json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = events_of(answer.text)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert all(c["object"] == "text_completion" and c["usage"] is None for c in chunks)
    for index in range(2):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        text = "".join(c["text"] for c in choices)
        assert choices[0]["text"] == "Once" and text == "Onceab" and choices[-1]["text"] == ""
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_a_stream_of_a_chat_is_framed_as_openais():
    chunks = events_of(client().post(CHATS, json=chat(max_tokens=1, stream=True)).text)
    assert all(c["object"] == "chat.completion.chunk" and "usage" not in c for c in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in [
            ({"role": "assistant", "content": ""}, None), ({"content": "a"}, None), ({}, "length"),
        ]
    ]  # fmt: skip


def test_log_probabilities_stand_beside_the_text_they_belong_to():
    body = complete("hé", max_tokens=2, logprobs=2, echo=True)
    [choice] = client().post(COMPLETIONS, json=body).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "héab"
    assert told["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "a", "b"]
    assert told["text_offset"] == [0, 1, 1, 2, 3]
    assert told["token_logprobs"][0] is None and told["token_logprobs"][3:] == [-0.5, -0.5]
    assert told["top_logprobs"][3] == {"a": -0.5, "bytes:\\xff": -9999.0}
    assert len(told["top_logprobs"][1]) in (2, 3)  # the likeliest, and the one that stood there
    body = chat(max_tokens=1, logprobs=True, top_logprobs=1)
    [choice] = client().post(CHATS, json=body).json()["choices"]
    entry = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert choice["logprobs"] == {"content": [{**entry, "top_logprobs": [entry]}], "refusal": None}
    plain = client().post(COMPLETIONS, json=complete(max_tokens=1, logprobs=0)).json()
    assert plain["choices"][0]["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("together", [1, 2, 3])
def test_tokens_that_a_stop_string_cuts_off_are_not_told(together):
    pieces = [Piece(97, "a"), Piece(98, "", begins=1), Piece(99, "", begins=2)]  # stop: "bc"
    told, choice = taken(pieces, together)
    assert [t.token for t in told.tokens + choice.end("stop").tokens] == [97]


def test_tokens_of_half_a_character_are_told_with_the_whole():
    choice = Choice(0, Delta(), with_tokens=True)
    told = [choice.take([Piece(*each, -1.0)]).tokens for each in [(0xC3, ""), (0xA9, "é")]]
    assert [len(tokens) for tokens in told] == [0, 2]


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_brings_the_same_however_its_tokens_come(logprobs):
    text = "h\u00e9 \u8bd7\U0001f642!"
    sequence = Sequence(Request((1,), 99, SampleConfig(), logprobs=0 if logprobs else None))
    sequence.begin(ByteTokenizer())
    for byte in text.encode():
        sequence.advance(byte, np.zeros(256, np.float32))
    pieces = [piece for _, piece in sequence.outputs.take()]
    for together in range(1, len(pieces) + 1):
        delta, choice = taken(pieces, together, logprobs)
        assert delta.text == text and choice.count == len(pieces)
        assert not choice.end("length").tokens
        assert [t.token for t in delta.tokens] == (list(text.encode()) if logprobs else [])
        begins = [0, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 5]  # of each byte's character
        assert [t.begins for t in delta.tokens] == (begins if logprobs else [])


def taken(pieces, together, with_tokens=True):
    """What a choice makes of pieces that come so many at a time, and the choice."""
    choice, whole = Choice(0, Delta(), with_tokens), Delta()
    for i in range(0, len(pieces), together):
        whole += choice.take(pieces[i : i + together])
    return whole, choice


def test_tokens_that_are_there_together_are_one_event():
    service = fake_service()
    service.engine.go.clear()
    body = complete(max_tokens=3, stream=True, logprobs=0)
    with running(service) as address, connection(address) as sock:
        sock.sendall(post_bytes(body))
        until(lambda: service.engine.streams)
        [stream] = service.engine.streams
        until(lambda: stream.outputs._waiter is not None)  # from now on it looks when it is woken
        for i, letter in enumerate("xyz"):
            stream.outputs.put(stream, Piece(ord(letter), letter, -1.0, (), letter.encode(), i))
        wake([stream.outputs])
        content = b""
        while b"data: " not in content or not content.endswith(b"\n\n\r\n"):
            content += sock.recv(4096)
    [event] = re.findall(rb"data: (.*)\n\n", content)
    [choice] = json.loads(event)["choices"]
    assert choice["text"] == "xyz" and choice["finish_reason"] is None
    assert choice["logprobs"]["tokens"] == ["x", "y", "z"]


def test_a_chat_becomes_the_text_that_the_documentation_shows():
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "Ah."},
    ]
    assert plain_text(messages) == (
        "You are brief.\n\nUser: Who are you?\n\nAssistant: A model.\n\nUser: Ah.\n\nAssistant:"
    )
    service = fake_service(block_size=256)
    body = {"messages": messages, "stop": "x", "max_completion_tokens": 3}
    assert client(service).post(CHATS, json=body).status_code == 200
    [stream] = service.engine.streams
    assert bytes(stream.request.ids).decode() == plain_text(messages)
    assert stream.request.stop == ("x", "\nUser:") and stream.request.max_tokens == 3


def test_a_second_turn_is_the_first_answer_and_the_space_does_not_grow():
    messages = [{"role": "user", "content": "Hello"}]
    for turn in range(3):
        answer = " A model.\n" if turn else "  A model."  # what a model writes behind "Assistant:"
        messages.append({"role": "assistant", "content": answer, "refusal": None, "audio": None,
                         "tool_calls": None, "function_call": None, "annotations": []})  # fmt: skip
        messages.append({"role": "user", "content": "And?", "name": "me"})
    turn = "User: And?\n\nAssistant:"
    assert plain_text(messages) == (
        "User: Hello\n\n"
        + "Assistant: A model.\n\nUser: And?\n\n" * 2
        + f"Assistant: A model.\n\n{turn}"
    )
    assert client().post(CHATS, json={"messages": messages}).status_code == 200
    refused = [{"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant"}]
    assert plain_text(refused) == "Assistant: No.\n\nAssistant:\n\nAssistant:"


def test_a_text_is_cut_into_tokens_and_joined_as_vllm_and_llama_cpp_do():
    http, ids = client(), [104, 195, 169]
    whole = {"tokens": ids, "count": 3, "max_model_len": 64}
    assert http.post("/tokenize", json={"prompt": "h\u00e9", "model": "tiny"}).json() == whole
    assert http.post("/tokenize", json={"content": "h\u00e9", "add_special": False}).json() == whole
    strs = http.post("/tokenize", json={"prompt": "h\u00e9", "return_token_strs": True}).json()
    assert strs["token_strs"] == ["h", "\ufffd", "\ufffd"]
    pieces = http.post("/tokenize", json={"content": "h\u00e9", "with_pieces": True}).json()
    assert [token["piece"] for token in pieces["tokens"]] == ["h", [195], [169]]
    chatted = http.post("/tokenize", json=chat()).json()
    assert bytes(chatted["tokens"]).decode() == plain_text(chat()["messages"])
    assert http.post("/tokenize", json={"prompt": "a" * 9000}).json()["count"] == 9000
    joined = http.post("/detokenize", json={"tokens": ids}).json()
    assert joined == {"prompt": "h\u00e9", "content": "h\u00e9"}
    assert http.post("/detokenize", json={"tokens": []}).json()["content"] == ""
    assert http.get("/tokenizer_info").json()["vocab_size"] == 256
    assert error_of(http.post("/detokenize", json={"tokens": [256]}), 400)["param"] == "tokens[0]"
    assert error_of(http.post("/detokenize", json={}), 400)["param"] == "tokens"
    for body in ({}, {"prompt": "a", "content": "b"}, {"prompt": None}):
        assert error_of(http.post("/tokenize", json=body), 400)["param"] == "prompt"
    assert error_of(http.post("/tokenize", json={"prompt": 5}), 400)["param"] == "prompt"
    assert error_of(http.post("/tokenize", json={"prompt": "a", "model": "other"}), 404)


def test_an_access_log_has_a_line_for_each_answer_in_which_nothing_acts():
    lines = []
    http = client(log=lines.append)
    http.post(COMPLETIONS, json=complete(max_tokens=1))
    http.get("/v1/%1b[31m%0d%0aMARK?key=secret")
    assert re.search(r" testclient POST /v1/completions 200 \d+\.\d{3} s$", lines[0])
    assert lines[1].isprintable() and "secret" not in lines[1] and " 404 " in lines[1]


def test_the_model_is_listed_under_whatever_name_its_folder_has():
    for name in ("tiny", MARK, "模型 1", 'a"b\\c'):
        http = client(fake_service(name=name))
        [model] = http.get("/v1/models").json()["data"]
        assert model["id"] == name and model["object"] == "model"
        assert model["max_model_len"] == TINY.block_size
        assert http.get(f"/v1/models/{name}".replace("%", "%25")).json() == model
        assert http.get("/v1/models").headers["content-type"] == "application/json"
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html") and "MARK" not in page.text
        assert http.post(COMPLETIONS, json=complete(model=name)).json()["model"] == name
    error = error_of(client().get(f"/v1/models/{MARK}"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error_of(client().post(CHATS, json=chat(model=MARK)), 404)["code"] == "model_not_found"


def test_a_name_that_is_no_text_becomes_one(tmp_path):
    folder = tmp_path / "a\udcffb\nc"
    folder.mkdir()
    assert name_of(folder).encode() == "a\ufffdb c".encode()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt_5.safetensors").touch()
    assert name_of(tmp_path / "run") == "run"
    assert name_of(tmp_path / "run" / "ckpt_5.safetensors") == "run-ckpt_5"


# Refusals ---------------------------------------------------------------------------------------


WRONG = [
    ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", [""]), ("prompt", {}),
    ("prompt", [256]), ("prompt", [-1]), ("prompt", [1.5]), ("prompt", [True]), ("prompt", None),
    ("prompt", ["a", 1]), ("prompt", "\ud800"), ("prompt", ["a"] * 17), ("prompt", MARK * 50),
    ("max_tokens", -1), ("max_tokens", 1 << 63), ("max_tokens", "5"), ("max_tokens", True),
    ("max_tokens", 1.5), ("temperature", -0.1), ("temperature", 2.1), ("temperature", MARK),
    ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2), ("min_p", -1), ("repetition_penalty", 0),
    ("repetition_penalty", 11), ("n", 0), ("n", 17), ("best_of", 2), ("logprobs", 6),
    ("logprobs", True), ("echo", "yes"), ("stream", 1), ("stop", ""), ("stop", ["a"] * 65),
    ("stop", [""]), ("stop", "x" * 129), ("stop", [1]), ("seed", -(1 << 63) - 1), ("seed", 1 << 63),
    ("presence_penalty", 2.1), ("frequency_penalty", -3), ("presence_penalty", False),
    ("suffix", MARK), ("user", 5), ("user", "x" * 257), ("stream_options", 1), ("model", 5),
    ("logit_bias", {"5": 101}), ("logit_bias", {"-1": 0}), ("logit_bias", {"a": 0}),
    ("logit_bias", [5]), ("use_beam_search", True), ("min_tokens", 3), ("guided_json", {}),
    ("typical_p", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_value_is_a_400_that_names_its_field(name, value):
    service = fake_service(prompt_tokens=1000)
    body = json.dumps({**complete(), name: value})
    answer = client(service).post(
        COMPLETIONS, content=body, headers={"content-type": "application/json"}
    )
    assert error_of(answer, 400)["param"] == name
    assert not service.engine.streams


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {MARK: 5}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"n": 8, "prompt": ["a", "b", "c"]}, "n"),
    ],
)
def test_what_does_not_fit_and_too_much_at_once_is_refused(fields, param):
    assert error_of(client().post(COMPLETIONS, json=complete(**fields)), 400)["param"] == param


UNKNOWN = [
    (COMPLETIONS, complete(max_token=5), "max_token"),
    (COMPLETIONS, complete(stream_options={"continuous_usage_stats": True}, stream=True),
     "stream_options.continuous_usage_stats"),
    (CHATS, chat([{"type": "text", "text": "Hi", "cache_control": {}}]),
     "messages[].content[].cache_control"),
    (CHATS, {"messages": [{"role": "user", "content": "Hi", "mood": 1}]}, "messages[].mood"),
    (CHATS, chat(newest_field={"a": [1]}, **{MARK: 1}), "(other), newest_field"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "named"), UNKNOWN, ids=[named for *_, named in UNKNOWN])
def test_an_unknown_field_is_named_in_a_header_and_once_in_the_log(path, body, named, caplog):
    http = client()
    for _ in range(2):
        answer = http.post(path, json=body)
        assert answer.status_code == 200 and answer.headers["x-tinygpt-ignored-fields"] == named
    [record] = caplog.records
    assert named in record.getMessage() and "MARK" not in record.getMessage()
    plain = http.post(COMPLETIONS, json=complete())
    assert "x-tinygpt-ignored-fields" not in plain.headers


def test_a_null_asks_for_nothing_whatever_its_name():
    answer = client().post(CHATS, json=chat(newest_field=None, tools=None, model=None, n=None))
    assert answer.status_code == 200 and "x-tinygpt-ignored-fields" not in answer.headers


def test_a_strict_api_refuses_what_it_does_not_know():
    service = fake_service()
    service.strict = True
    answer = client(service).post(COMPLETIONS, json=complete(max_token=5))
    error = error_of(answer, 400)
    assert error["code"] == "unknown_parameter" and "'max_tokens'" in error["message"]
    assert error_of(client(service).post(CHATS, json=chat(**{MARK: 1})), 400)["param"] is None
    body = {"messages": [{"role": "user", "content": "Hi", "mood": 1}]}
    assert error_of(client(service).post(CHATS, json=body), 400)["param"] == "messages[0]"
    document = client(service).get("/openapi.json").json()
    body = document["paths"][CHATS]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["additionalProperties"] is False


NOTHING = {
    "top_k": -1, "top_p": 1.0, "min_p": 0, "seed": -1, "n": 1, "stop": [], "logit_bias": None,
    "presence_penalty": 0.0, "frequency_penalty": None, "user": "me", "store": True,
    "metadata": {"a": "b"}, "service_tier": "auto", "stream_options": {"include_usage": True},
    "safety_identifier": "x", "prompt_cache_key": "y", "stream": None, "repetition_penalty": 1.0,
    "use_beam_search": False, "length_penalty": 1.0, "stop_token_ids": [], "typical_p": 1.0,
}  # fmt: skip
NOTHING_IN_CHATS = {
    "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": None,
    "function_call": "auto", "response_format": {"type": "text"}, "modalities": ["text"],
    "audio": None, "prediction": None, "reasoning_effort": None, "verbosity": "medium",
    "logprobs": False, "top_logprobs": 0, "web_search_options": None,
}  # fmt: skip


def test_fields_that_ask_for_nothing_change_nothing():
    service = fake_service()
    http = client(service)
    bodies = [(COMPLETIONS, complete(**NOTHING, suffix="", echo=False, best_of=1, logprobs=None)),
              (CHATS, chat(**NOTHING, **NOTHING_IN_CHATS))]  # fmt: skip
    for path, body in bodies:
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert "x-tinygpt-ignored-fields" not in answer.headers
        request = service.engine.streams[-1].request
        assert request.config == SampleConfig(top_p=1.0)
        assert (request.seed, request.penalties) == (None, None)


def test_tools_that_are_not_to_be_used_are_none_and_negative_seeds_are_seeds():
    service = fake_service()
    tools = [{"type": "function", "function": {"name": "f"}}]
    http = client(service)
    assert http.post(CHATS, json=chat(tools=tools, tool_choice="none", seed=-2)).status_code == 200
    seed = service.engine.streams[-1].request.seed
    assert http.post(CHATS, json=chat(seed=-2)).status_code == 200
    assert service.engine.streams[-1].request.seed == seed > (1 << 63)
    assert error_of(http.post(CHATS, json=chat(tools=tools)), 400)["param"] == "tools"


def test_more_than_the_limit_is_as_much_as_the_limit():
    http = client(fake_service(max_tokens=7))
    for fields in ({"max_tokens": 8}, {"max_tokens": 10**9}, {}):
        answer = http.post(COMPLETIONS, json=complete(**fields)).json()
        assert answer["usage"]["completion_tokens"] == 7
    both = chat(max_tokens=5, max_completion_tokens=3)
    assert http.post(CHATS, json=both).json()["usage"]["completion_tokens"] == 3
    assert http.post(CHATS, json=chat(max_tokens=0)).json()["usage"]["completion_tokens"] == 0


def test_penalties_and_bias_reach_the_engine():
    service = fake_service()
    body = chat(presence_penalty=1, frequency_penalty=-0.5, logit_bias={"97": 5, "999999": -100})
    body |= {"top_p": 0, "stop": ["a"] * 20}
    assert client(service).post(CHATS, json=body).status_code == 200
    request = service.engine.streams[-1].request
    assert request.penalties == Penalties(1.0, -0.5, {97: 5.0, 999999: -100.0})
    assert 0 < request.config.top_p < 1e-300 and len(request.stop) == 21


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": MARK, "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"n": 17}, "n"),
    ],
)
def test_a_wrong_chat_is_a_400_that_names_the_place(fields, param):
    assert error_of(client().post(CHATS, json=chat() | fields), 400)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense MARK", b"\xff\xfe", b'{"prompt": "a", "prompt": "MARK"}',
        b'{"n": 1' + b"0" * 400 + b"}", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
    ids=lambda body: str(body[:12]),
)  # fmt: skip
def test_what_is_no_json_is_a_400(body):
    answer = client().post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"MARK"', b"true", b"NaN", b"{}"])
def test_json_that_is_no_request_is_a_400(body):
    for path in (COMPLETIONS, CHATS):
        answer = client().post(path, content=body, headers={"content-type": "application/json"})
        error_of(answer, 400)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_none_are_refused(number):
    body = b'{"prompt": "a", "temperature": ' + number + b"}"
    answer = client().post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["param"] == "temperature"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_does_not_say_it_is_json_is_a_415(kind):
    headers = {"content-type": kind} if kind else {}
    error_of(client().post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers), 415)


def test_paths_and_methods_that_are_not_there_are_told_in_the_same_shape():
    error_of(client().get("/v1/nothing"), 404)
    error_of(client().get("/v1/models/"), 404)
    error_of(client().post("/page/../../secret"), 404)
    answer = client().get(COMPLETIONS)
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_character_that_the_vocabulary_lacks_is_told_without_repeating_it():
    service = fake_service()
    service.tokenizer = CharTokenizer("abc")
    error = error_of(client(service).post(COMPLETIONS, json=complete("abMARK")), 400)
    assert error["param"] == "prompt" and "3 characters" in error["message"]
    assert "chat template" in error_of(client(service).post(CHATS, json=chat("a")), 400)["message"]


def test_a_body_is_counted_whatever_its_length_says():
    http = client(fake_service(body_bytes=1000))
    assert http.post(COMPLETIONS, json=complete("a" * 900)).status_code == 200
    assert error_of(http.post(COMPLETIONS, json=complete("a" * 1000)), 413)["code"]

    def pieces():
        for _ in range(100):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    answer = http.post(COMPLETIONS, content=pieces(), headers=headers)
    error_of(answer, 413)
    assert answer.headers["connection"] == "close"


def test_a_full_queue_is_a_429_and_leaves_nothing_behind():
    service = fake_service(FakeEngine(queue=2))
    service.engine.go.clear()
    answer = client(service).post(COMPLETIONS, json=complete(n=3))
    assert error_of(answer, 429)["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) > 0
    until(lambda: not service.engine.open())
    service.engine.go.set()
    assert client(service).post(COMPLETIONS, json=complete(n=2)).status_code == 200


def test_a_server_that_shuts_down_says_so():
    service = fake_service()
    service.engine.closed = True
    answer = client(service).post(COMPLETIONS, json=complete())
    assert error_of(answer, 503) and int(answer.headers["retry-after"]) > 0


def test_closing_under_load_is_a_503_for_whoever_was_not_answered():
    service = fake_service(shutdown_seconds=1)
    service.engine.go.clear()  # nobody's turn ever comes
    answers, asked = [], [(COMPLETIONS, complete()), (CHATS, chat())]

    def ask(path, body):
        answers.append(httpx.post(address + path, json=body, timeout=PATIENCE))

    with running(service) as address:
        threads = [threading.Thread(target=ask, args=each) for each in asked * 2]
        for thread in threads:
            thread.start()
        until(lambda: len(service.engine.streams) == len(threads))
    for thread in threads:
        thread.join()
    assert len(answers) == len(threads)
    for answer in answers:
        assert error_of(answer, 503)["code"] == "shutting_down"
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, complete(stream=True, n=2)),
        (CHATS, chat(stream=True)),
        ("/api/generate", {"text": "a"}),
    ],
)
def test_a_stream_that_the_end_of_the_server_cuts_off_is_told(path, body):
    service = fake_service(FakeEngine(pace=0.01), shutdown_seconds=0)
    body |= {"max_tokens": 4000}
    with httpx.Client(timeout=PATIENCE) as http, ExitStack() as closes:
        with running(service) as address:
            answer = closes.enter_context(http.stream("POST", address + path, json=body))
            lines = answer.iter_lines()
            seen = [next(lines) for _ in range(9)]
        seen += list(lines)  # ends as a whole answer does: httpx would raise otherwise
    assert seen[-2:] == ["data: [DONE]", ""]
    told = json.loads(seen[-4].removeprefix("data: "))["error"]
    assert told["code"] == "shutting_down" and told["type"] == "server_error"
    assert len([line for line in seen if '"error"' in line]) == 1
    until(lambda: not service.engine.open())


def test_a_client_that_reads_nothing_does_not_hold_up_the_end():
    service = fake_service(shutdown_seconds=0, write_seconds=1e6)
    with running(service) as address, connection(address, room=4096) as slow:
        much = chat(max_tokens=4000, n=4, logprobs=True, top_logprobs=2, stream=True)
        slow.sendall(post_bytes(much, CHATS))
        until(lambda: len(service.engine.streams) == 4 and not service.engine.open())


def test_a_text_that_an_ended_engine_cuts_off_does_not_look_whole():
    service = fake_service(FakeEngine(pace=0.01))

    def cut_off():
        until(lambda: service.engine.streams)
        service.engine.streams[0].cancel()

    thread = threading.Thread(target=cut_off)
    thread.start()
    answer = client(service).post(COMPLETIONS, json=complete(max_tokens=4000))
    thread.join()
    assert error_of(answer, 503)["code"] == "shutting_down"


def test_texts_and_looks_that_a_closing_engine_drops_are_503s(model):
    """The engine itself, closed while a request waits for its place and a look for its turn."""
    engine = Engine(model, ByteTokenizer(), slots=1)
    service = Service(engine, model, ByteTokenizer(), "tiny")
    held, entered = threading.Event(), threading.Event()
    answers = {}

    def ask(path, body):
        answers[path] = client(service).post(path, json=body)

    def hold():
        entered.set()
        held.wait(PATIENCE)

    with engine:
        engine.run(hold)
        entered.wait(PATIENCE)
        look = {"text": "Once"}
        asked = [(COMPLETIONS, complete(n=2)), ("/api/candidates", look)]
        asked += [("/api/attention", look | {"layer": 0})]
        threads = [threading.Thread(target=ask, args=each) for each in asked]
        for thread in threads:
            thread.start()
        until(lambda: engine.stats().waiting == 2 and len(engine._beside._waiting) == 2)
        threading.Timer(0.05, held.set).start()
        engine.close()
    for thread in threads:
        thread.join()
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(
        [path for path, _ in asked], 503
    )


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/api/tokens", "/api/model", "/api/generate"])
def test_a_client_that_leaves_in_its_body_is_no_failure(path, caplog):
    service = fake_service()
    with running(service) as address:
        with connection(address) as sock:
            sock.sendall(post_bytes(complete("x" * 100), path)[:-50])
        until(lambda: sum(service.counts.requests.values()))
    assert [status for _, status in service.counts.requests] == [499]
    assert not caplog.records


@pytest.mark.parametrize("error", [RuntimeError("MARK inside"), TinyGPTError("It diverged.")])
def test_what_fails_in_the_engine_is_a_500_that_says_no_more_than_it_should(error):
    service = fake_service(FakeEngine(error=error))
    told = error_of(client(service).post(COMPLETIONS, json=complete()), 500)
    assert told["type"] == "server_error"
    assert (told["message"] == "It diverged.") == isinstance(error, TinyGPTError)
    stream = client(service).post(COMPLETIONS, json=complete(stream=True))
    assert [event["error"] for event in events_of(stream.text)] == [told]


def test_a_mistake_of_ours_is_told_to_the_terminal_only(caplog):
    from starlette.routing import Route

    async def broken(request):
        raise RuntimeError("MARK: a secret")

    app = assemble([Route("/broken", broken)])
    http = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    answer = http.get("/broken")
    assert error_of(answer, 500)["type"] == "server_error"
    assert answer.headers["content-security-policy"] and "a secret" in caplog.text


def test_when_time_is_up_what_is_there_is_the_answer():
    service = fake_service(FakeEngine(pace=0.02), request_seconds=1)
    answer = client(service).post(COMPLETIONS, json=complete(max_tokens=4000)).json()
    [choice] = answer["choices"]
    assert 0 < answer["usage"]["completion_tokens"] < 1000
    assert choice["finish_reason"] == "length" and choice["text"].startswith("ab")
    stream = client(service).post(COMPLETIONS, json=complete(max_tokens=4000, stream=True))
    assert events_of(stream.text)[-1]["choices"][0]["finish_reason"] == "length"
    until(lambda: not service.engine.open())


def test_a_request_that_never_had_its_turn_is_a_504():
    service = fake_service(request_seconds=0.05)
    service.engine.go.clear()
    assert error_of(client(service).post(COMPLETIONS, json=complete()), 504)["code"] == "timeout"
    stream = client(service).post(COMPLETIONS, json=complete(stream=True))
    [event] = events_of(stream.text)
    assert event["error"]["code"] == "timeout"
    until(lambda: not service.engine.open())


# Who may ask ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.nip.io", "[::1",
     "localhost@evil.example", "evil.example#localhost", "a b", "localhost, evil.example",
     "evil.example@localhost"],
)  # fmt: skip
def test_another_host_is_refused(host):
    answer = client().get("/v1/models", headers={"host": host})
    assert error_of(answer, 403)["code"] == "wrong_host"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:81", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "box:9"]
)
def test_our_own_hosts_are_welcome(host):
    answer = client(hosts=["Box"]).get("/v1/models", headers={"host": host})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"origin": "file://localhost"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_origin_may_not_ask_for_work(headers):
    for path in (COMPLETIONS, CHATS, "/nowhere"):
        answer = client().post(path, json=complete(), headers=headers)
        assert error_of(answer, 403)["code"] == "wrong_origin"
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("name", "origin", "welcome"),
    [
        ("box.example", "https://box.example", True),
        ("box.example", "http://box.example", True),
        ("box.example", "https://box.example:8443", True),
        ("Box.Example", "https://BOX.example", True),
        ("https://box.example/", "https://box.example", True),
        ("192.0.2.7", "https://192.0.2.7", True),
        ("box.example:8443", "https://box.example:8443", True),
        ("box.example:8443", "https://box.example", False),
        ("box.example", "https://evil.example", False),
        ("box.example", "https://x.box.example", False),
        ("box.example", "file://box.example", False),
        ("box.example", "null", False),
    ],
)
def test_pages_of_allowed_hosts_may_ask_whatever_host_their_proxy_names(name, origin, welcome):
    http = client(hosts=[name], bound="127.0.0.1")
    for host in ("127.0.0.1:8000", "localhost"):  # nginx puts there what it connects to
        answer = http.post(COMPLETIONS, json=complete(), headers={"host": host, "origin": origin})
        assert answer.status_code == (200 if welcome else 403)
    elsewhere = {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9"}
    assert http.post(COMPLETIONS, json=complete(), headers=elsewhere).status_code == 403


def test_pages_of_cors_origins_may_ask_and_read(tmp_path):
    http = client(cors=["https://App.example/"], api_key=KEY)
    page, right = {"origin": "https://app.example"}, {"authorization": f"Bearer {KEY}"}
    wanted = {"access-control-request-method": "POST",
              "access-control-request-headers": "authorization,x-stainless-os"}  # fmt: skip
    preflight = http.options(CHATS, headers=page | wanted)  # browsers send no key with it
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == page["origin"]
    told = preflight.headers["access-control-allow-headers"]
    assert told == wanted["access-control-request-headers"]
    answer = http.post(CHATS, json=chat(), headers=page | right | {"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200 and answer.headers["vary"] == "origin"
    assert answer.headers["access-control-allow-origin"] == page["origin"]
    for origin in ("https://app.example.evil", "http://app.example", "https://app.example:1"):
        other = http.post(CHATS, json=chat(), headers=right | {"origin": origin})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
        assert http.options(CHATS, headers=wanted | {"origin": origin}).status_code == 405
    anybody = client(cors=["*"]).get("/v1/models", headers={"origin": "null"})
    assert anybody.headers["access-control-allow-origin"] == "null"


def test_our_own_page_may_ask():
    headers = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    assert client().post(COMPLETIONS, json=complete(), headers=headers).status_code == 200
    preflight = client().options(COMPLETIONS, headers={"origin": "http://evil.example"})
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY,
     "Bearer \xff\xfe", f"Bearer {KEY}, {KEY}"],
)  # fmt: skip
def test_without_the_key_nothing_is_told(given):
    headers = [] if given is None else [(b"authorization", given.encode("latin-1"))]
    http = client(api_key=KEY)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/v1/models/tiny"):
        answer = http.get(path, headers=headers)
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert http.post(COMPLETIONS, json=complete(), headers=headers).status_code == 401


def test_with_the_key_everything_is_told_and_without_it_the_page_is():
    http = client(api_key=KEY)
    right = {"authorization": f"Bearer {KEY}"}
    assert http.post(COMPLETIONS, json=complete(), headers=right).status_code == 200
    assert http.get("/metrics", headers={"authorization": f"bearer  {KEY}"}).status_code == 200
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/").status_code == 200 and "tiny" not in http.get("/").text


def test_a_server_whose_engine_has_ended_is_not_healthy():
    service = fake_service()
    http = client(service)
    assert http.get("/healthz").status_code == 200
    service.engine.closed = True
    assert error_of(http.get("/healthz"), 503)["code"] == "ended"


def test_every_answer_protects_the_page():
    http = client(api_key=KEY)
    answers = [
        http.get("/"), http.get("/healthz"), http.get("/v1/models"), http.get("/page/nothing.js"),
        http.get("/", headers={"host": "evil.example"}), http.put("/healthz"),
        http.post(COMPLETIONS, json={}, headers={"authorization": f"Bearer {KEY}"}),
        http.post(COMPLETIONS, json=complete(stream=True),
                  headers={"authorization": f"Bearer {KEY}"}),
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} == {200, 400, 401, 403, 404, 405}
    for answer in answers:
        for name in HEADERS.keys() - {"cache-control"}:
            assert answer.headers[name] == HEADERS[name]
        assert answer.headers["cache-control"] in ("no-store", "no-cache")


def test_the_files_of_the_pages_are_served_and_no_others():
    http = client()
    page = http.get("/")
    files = re.findall(r'(?:src|href)="/?(page/[^"]+)"', page.text)
    assert files
    for path in files:
        answer = http.get(f"/{path}")
        assert answer.status_code == 200 and answer.content
        again = http.get(f"/{path}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    others = (
        "",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "app.py",
        "local/ui.mjs",
        "shared/../../api.py",
        "%00",
    )
    for path in (f"/page/{name}" for name in others):
        assert http.get(path).status_code == 404


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("box", False), ("", False)],
)  # fmt: skip
def test_only_this_machine_itself_needs_no_key(host, local):
    assert is_loopback(host) == local


# Figures and the document -----------------------------------------------------------------------


def parse_metrics(text):
    """{name: {labels: value}} of Prometheus' text format, strictly."""
    found, kinds = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE") and rest
            if what == "TYPE":
                assert name not in kinds and rest in ("counter", "gauge", "histogram")
                kinds[name] = rest
            continue
        match = re.fullmatch(
            r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)', line
        )
        assert match, line
        name, labels, value = match.groups()
        family = re.sub("_(bucket|sum|count)$", "", name)
        assert family in kinds or name in kinds
        assert labels not in found.setdefault(name, {})
        found[name][labels] = float(value)
    return found


def test_the_figures_are_in_prometheus_format_and_count_what_happened():
    service = fake_service(name=MARK + '"\\\n')
    http = client(service)
    http.post(COMPLETIONS, json=complete(max_tokens=1))
    http.post(COMPLETIONS, json=complete(n=99))
    for i in range(20):
        http.get(f"/nowhere/{i}")
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = parse_metrics(answer.text)
    requests = found["tinygpt_http_requests_total"]
    assert requests['route="/v1/completions",status="200"'] == 1
    assert requests['route="/v1/completions",status="400"'] == 1
    assert requests['route="other",status="404"'] == 20
    assert found["tinygpt_generated_tokens_total"][None] == 12345678
    assert found["tinygpt_active"][None] == 0
    buckets = found["tinygpt_request_seconds_bucket"]
    assert buckets['route="other",le="+Inf"'] == 20 >= buckets['route="other",le="0.01"']


def test_the_document_describes_every_route_by_the_schemas_that_check_it():
    http = client()
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    served = {r.path.replace(":path", "") for r in http.app.routes if r.path.startswith("/v1")}
    assert served <= set(document["paths"])
    body = document["paths"][COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["prompt"]["anyOf"][2]["items"]["maximum"] == 255
    assert body["schema"]["additionalProperties"] is True


def test_the_documentation_names_every_limit_and_status():
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    told = {}
    for names, values in re.findall(r"^\| (`[^|]*`) \| ([\d, ]+) \|", page, re.M):
        told |= zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True)
    assert {name: float(value) for name, value in told.items()} == asdict(Limits())
    answers = client().get("/openapi.json").json()["paths"][COMPLETIONS]["post"]["responses"]
    table = page.partition("## Errors")[2].partition("## Limits")[0]
    assert {"200", *re.findall(r"\b[45]\d\d\b", table)} == set(answers)


# Connections ------------------------------------------------------------------------------------


def post_bytes(body, path=COMPLETIONS):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_all(sock):
    content = b""
    while chunk := sock.recv(65536):
        content += chunk
    return content


def test_64_at_once_all_get_their_own_text():
    service = fake_service(FakeEngine(pace=0.01))
    lengths, texts = range(1, 65), {}

    def ask(http, n):
        texts[n] = http.post(COMPLETIONS, json=complete(max_tokens=n)).json()["choices"][0]["text"]

    with running(service) as address, httpx.Client(base_url=address, timeout=PATIENCE) as http:
        threads = [threading.Thread(target=ask, args=(http, n)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {n: (ALPHABET * 3)[:n] for n in lengths}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_places(stream):
    service = fake_service(FakeEngine(pace=0.01))
    with running(service) as address:
        sock = connection(address)
        sock.sendall(post_bytes(complete(max_tokens=4000, n=3, stream=stream)))
        if stream:
            assert b"data: " in sock.recv(4096)
        until(lambda: len(service.engine.open()) == 3)
        sock.close()
        until(lambda: not service.engine.open())
        assert {s.finish_reason for s in service.engine.streams} == {"cancelled"}


def test_a_client_that_reads_nothing_is_cut_off_and_holds_up_nobody():
    service = fake_service(FakeEngine(), write_seconds=0.5)
    with running(service) as address, connection(address, room=4096) as slow:
        much = chat(max_tokens=4000, n=10, logprobs=True, top_logprobs=2, stream=True)
        slow.sendall(post_bytes(much, CHATS))
        until(lambda: len(service.engine.streams) == 10)
        quick = httpx.post(address + COMPLETIONS, json=complete(max_tokens=3), timeout=PATIENCE)
        assert quick.json()["choices"][0]["text"] == "abc"
        until(lambda: slow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "]
)
def test_a_head_that_never_ends_is_cut_off(sent):
    service = fake_service(header_seconds=0.3)
    with running(service) as address, connection(address) as sock:
        sock.sendall(sent)
        with pytest.raises(ConnectionResetError):
            sock.recv(4096)


def test_a_kept_connection_that_goes_on_slowly_is_cut_off():
    service = fake_service(header_seconds=0.3)
    with running(service) as address, connection(address) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        content = b""
        while not content.endswith(b'{"status":"ok"}'):
            content += sock.recv(4096)
        sock.sendall(b"GET /hea")
        with pytest.raises(ConnectionResetError):
            sock.recv(4096)


def test_a_body_that_never_ends_is_a_408():
    service = fake_service(body_seconds=0.3)
    with running(service) as address, connection(address) as sock:
        sock.sendall(post_bytes(complete())[:-5])
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"0.3 seconds" in answer


def test_a_body_that_is_too_large_is_heard_of_over_a_real_connection():
    with running(fake_service(body_bytes=10_000)) as address:
        answer = httpx.post(address + COMPLETIONS, json=complete("a" * 100_000), timeout=PATIENCE)
        assert error_of(answer, 413)["code"] == "body_too_large"
        assert httpx.get(address + "/healthz").status_code == 200


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"MARK\r\n\r\n", b"A" * 99999]
)
def test_what_is_no_http_is_refused(sent):
    with running(fake_service()) as address:
        with connection(address) as sock:
            sock.sendall(sent)
            assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert httpx.get(address + "/healthz").status_code == 200


def test_connections_have_a_limit_and_come_free_again():
    with running(fake_service(connections=3)) as address:
        held = [connection(address) for _ in range(3)]
        answers = []

        def refused():
            with connection(address) as sock:
                answers.append(read_all(sock))
            return answers[-1].startswith(b"HTTP/1.1 503 ")

        until(refused)
        assert "error" in json.loads(answers[-1].partition(b"\r\n\r\n")[2])
        for sock in held:
            sock.close()
        until(lambda: httpx.get(address + "/healthz").status_code == 200)


def test_a_taken_port_names_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"Port {port} is taken") as caught:
            listen("127.0.0.1", port)
        free = int(re.search(r"--port (\d+)", str(caught.value)).group(1))
        listen("127.0.0.1", free).close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("no.such.host.invalid", 0)])
def test_a_place_that_is_none_is_wrong_use(host, port):
    with pytest.raises(UsageError, match=r"--port 70000|--host no\.such"):
        listen(host, port)


# The real engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    made = GPT(TINY, seed=4)
    made.eval()
    return made


PROMPTS = ("Once upon", "Hello", "The quick brown fox jumps over the lazy dog. " * 2)


@pytest.fixture(scope="module")
def expected(model):
    """What generate_text writes, greedily and with seeds, before the engine has the model."""

    def text(prompt, seed=None, stop=(), **config):
        pieces = generate_text(
            model.decoder, ByteTokenizer(), prompt, 24, SampleConfig(**config), seed, stop
        )
        return "".join(pieces)

    greedy = {prompt: text(prompt, temperature=0) for prompt in PROMPTS}
    first = greedy[PROMPTS[0]]
    return {
        "greedy": greedy,
        "seeds": [text(PROMPTS[0], seed, top_k=9) for seed in (7, 8, 9)],
        "stop": (first[5], text(PROMPTS[0], stop=[first[5]], temperature=0)),
    }


@pytest.fixture(scope="module")
def real(model, expected):
    with Engine(model, ByteTokenizer(), slots=4) as engine:
        yield client(Service(engine, model, ByteTokenizer(), "tiny"))


def texts_of(answer):
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_greedy_text_is_generate_texts_alone_and_in_a_batch(real, expected):
    greedy = {"max_tokens": 24, "temperature": 0}
    for prompt in PROMPTS:
        assert texts_of(real.post(COMPLETIONS, json=complete(prompt, **greedy))) == [
            expected["greedy"][prompt]
        ]
    batch = real.post(COMPLETIONS, json=complete(list(PROMPTS), **greedy))
    assert texts_of(batch) == list(expected["greedy"].values())
    stream = events_of(
        real.post(COMPLETIONS, json=complete(PROMPTS[0], stream=True, **greedy)).text
    )
    written = "".join(event["choices"][0]["text"] for event in stream)
    assert written == expected["greedy"][PROMPTS[0]]


def test_seeds_are_those_of_generate_one_after_the_other(real, expected):
    body = complete(PROMPTS[0], n=3, seed=7, top_k=9, max_tokens=24)
    assert texts_of(real.post(COMPLETIONS, json=body)) == expected["seeds"]


def test_no_setting_that_is_let_through_breaks_the_engine(real):
    """One request that fails in a step would take its neighbours along."""
    extremes = {
        "temperature": [0, 5e-324, 2], "top_p": [0, 5e-324, 1],
        "top_k": [-1, 0, 1, (1 << 31) - 1], "min_p": [0, 5e-324, 1],
        "repetition_penalty": [0.1, 10], "seed": [-(1 << 63), -1, 0, (1 << 63) - 1],
        "presence_penalty": [-2, 2], "frequency_penalty": [-2, 2],
        "logit_bias": [{}, {"0": -100, "255": 100, "9999999999": 100}],
    }  # fmt: skip
    for name, values in extremes.items():
        for value in values:
            both = complete(max_tokens=3, n=2, **{name: value, "logprobs": 5})
            assert len(texts_of(real.post(COMPLETIONS, json=both))) == 2, (name, value)
    everything = {name: values[0] for name, values in extremes.items()}
    assert len(texts_of(real.post(COMPLETIONS, json=complete(max_tokens=3, **everything)))) == 1


def test_bias_and_penalties_steer_what_the_engine_writes(real):
    one = complete("Hello", max_tokens=6, temperature=0, logit_bias={"120": 100})
    assert texts_of(real.post(COMPLETIONS, json=one)) == ["xxxxxx"]
    other = one | {"frequency_penalty": 2, "logit_bias": {"120": 50, "121": 49}}
    assert texts_of(real.post(COMPLETIONS, json=other)) == ["xyxyxy"]


def test_a_stop_string_ends_the_text_before_it(real, expected):
    stop, text = expected["stop"]
    body = complete(PROMPTS[0], stop=stop, temperature=0, max_tokens=24)
    [choice] = real.post(COMPLETIONS, json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_a_prompts_log_probabilities_are_the_models(real, model, expected):
    """max_tokens=0 with echo scores a text: what programs that evaluate models ask for."""
    text = "Hello"
    body = complete(text, max_tokens=0, echo=True, logprobs=1)
    [choice] = real.post(COMPLETIONS, json=body).json()["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length"
    ids = ByteTokenizer().encode(text)
    logits = model(Tensor([ids], dtype="int32"))[0].numpy().astype(np.float64)
    wanted = [np.log(softmax(logits[i]))[ids[i + 1]] for i in range(len(ids) - 1)]
    first, *told = choice["logprobs"]["token_logprobs"]
    assert first is None and np.allclose(told, wanted, atol=1e-4)
    long = complete("x" * (TINY.block_size + 1), max_tokens=0, echo=True, logprobs=1)
    assert error_of(real.post(COMPLETIONS, json=long), 400)["param"] == "logprobs"


def test_generated_tokens_have_the_log_probabilities_that_scoring_gives_them(real):
    body = complete("Hello", max_tokens=6, temperature=0, logprobs=1, echo=True)
    [choice] = real.post(COMPLETIONS, json=body).json()["choices"]
    told = choice["logprobs"]["token_logprobs"]
    assert len(told) == 11
    written = complete([*b"Hello", *generated(choice)], max_tokens=0, logprobs=1, echo=True)
    [scored] = real.post(COMPLETIONS, json=written).json()["choices"]
    assert np.allclose(told[1:], scored["logprobs"]["token_logprobs"][1:], atol=1e-4)
    for top in choice["logprobs"]["top_logprobs"][5:]:
        assert len(top) == 1  # greedy: the likeliest is the one that was taken


def generated(choice):
    """The ids of the bytes behind "Hello"."""
    names = choice["logprobs"]["tokens"][5:]
    return [int(n[-2:], 16) if n.startswith("bytes:") else ord(n) for n in names]


def test_scores_of_a_model_that_diverged_are_an_error(model):
    broken = GPT(TINY)
    broken.ln_f.weight.assign(Tensor.full(broken.ln_f.weight.shape, float("nan"))).realize()
    with pytest.raises(TinyGPTError, match="diverged"):
        list(score_texts(Decoder(broken, 1), [([1, 2, 3], 1)], 256))


# The command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run <b>"
    GPT(TINY).save_checkpoint(0, folder=folder, tokenizer=ByteTokenizer())
    return folder


@pytest.fixture
def served(run, child_environment):
    """The program with a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tinygpt", "serve", str(run), "--port=0", "--max-tokens=100000",
         "--shutdown-seconds=250"],
        stderr=subprocess.PIPE, text=True, env=child_environment,
    )  # fmt: skip
    line = process.stderr.readline()
    address = re.search(r"serving a run <b> at (http://127\.0\.0\.1:\d+)", line)
    assert address, line + process.stderr.read()
    yield process, address.group(1)
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_a_running_stream_end(served, name):
    process, address = served
    body = complete("Hello", max_tokens=4000, stream=True)
    text = ""
    with httpx.stream("POST", address + COMPLETIONS, json=body, timeout=120) as answer:
        for chunk in answer.iter_text():
            if not text:
                process.send_signal(signal.Signals[name])
            text += chunk
    assert process.wait(60) == 128 + signal.Signals[name]
    assert events_of(text)[-1]["choices"][0]["finish_reason"] == "length"
    assert "finishing the answers" in process.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(address + "/healthz")


def test_the_second_signal_ends_it_at_once(served):
    process, address = served
    body = complete("Hello", max_tokens=100_000, n=16, stream=True)
    with (
        pytest.raises(httpx.HTTPError),
        httpx.stream("POST", address + COMPLETIONS, json=body, timeout=120) as answer,
    ):
        for number, _ in enumerate(answer.iter_text()):
            if number == 0:
                process.terminate()
                time.sleep(0.5)  # what comes sooner is taken for an echo of the first
                process.terminate()
    assert process.wait(60) == 143


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--api-key", "short"], "at least 12"),
        (["--api-key", "with a blank in it"], "visible ASCII"),
        (["--places", "0"], "--places 0"),
        (["--port", "-1"], "--port -1"),
        (["--allow-host", "no host"], "not the name of a host"),
        (["--cors-origin", "localhost:3000"], "is not an origin"),
        (["--model-name", " "], "--model-name"),
        (["--max-tokens", "0"], "max_tokens=0"),
    ],
)
def test_unsafe_or_impossible_options_are_wrong_use(run, arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TINYGPT_API_KEY", raising=False)
    assert main(["serve", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_names_and_limits_come_from_flags(run, capsys, monkeypatch):
    found = []

    def look(server, listeners):
        http = TestClient(server.config.app, base_url="http://box.example")
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        answer = http.post(COMPLETIONS, json=complete(max_tokens=99, model="mine/1"))
        known = http.post(COMPLETIONS, json=complete(newest=1)).status_code
        service_limits = http.get("/metrics").text
        found.extend([names, answer.json()["usage"]["completion_tokens"], known, service_limits])

    monkeypatch.setattr(Server, "run", look)
    flags = ["--model-name", "mine/1", "--max-tokens", "5", "--queue", "7", "--strict-api"]
    flags += ["--access-log", "--allow-host", "box.example", "--port", "0"]
    assert main(["serve", str(run), *flags]) == 0
    names, written, known, figures = found
    assert (names, written, known) == (["mine/1"], 5, 400)
    assert "tinygpt_queue 7\n" in figures
    assert " POST /v1/completions 400 " in capsys.readouterr().err


def test_serving_int8_weights_says_what_they_cost(run, tmp_path, capsys, monkeypatch):
    text = tmp_path / "more.txt"
    text.write_text("the cat sat on the mat.\n" * 20, encoding="utf-8")
    monkeypatch.setattr(Server, "run", lambda *_: None)
    flags = ["--port", "0", "--quantize", "int8", "--quantize-data", str(text)]
    assert main(["serve", str(run), *flags]) == 0
    told = capsys.readouterr().err
    assert "int8: the weights take" in told and re.search(r"more\.txt.* instead of .*\(", told)
    assert main(["serve", str(run), "--quantize-data", str(text)]) == 2
    assert "--quantize int8" in capsys.readouterr().err


def test_the_browser_gets_the_key_from_a_private_file_and_not_on_its_command_line(
    tmp_path, monkeypatch
):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    with browser("http://127.0.0.1:8001", KEY):
        until(lambda: opened)
        path = Path(unquote(opened[0].removeprefix("file://")))
        assert KEY not in opened[0] and f"url=http://127.0.0.1:8001/#key={KEY}" in path.read_text()
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not path.parent.exists()
    with browser("http://127.0.0.1:8000", None):
        until(lambda: len(opened) == 2)
    assert opened[1] == "http://127.0.0.1:8000"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with browser("http://127.0.0.1:8001", KEY):
        until(lambda: len(opened) == 3)
    assert opened[2] == "http://127.0.0.1:8001"


def test_a_run_that_is_missing_is_told(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_a_missing_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(run)]) == 1
    assert extras.cure("serve") in capsys.readouterr().err


def test_a_uvicorn_that_no_longer_calls_what_is_overridden_is_refused_with_the_cure():
    check_hooks(HOOKS)

    class Renamed:
        def __init__(self):
            self.transport = None

        def connection_made(self):
            """As before."""

    check_hooks({Renamed: ("connection_made", "transport")})
    for name in ("handle_events", "cycle"):
        with pytest.raises(MissingExtraError, match=rf"no Renamed\.{name}, .*install .*uvicorn"):
            check_hooks({Renamed: ("connection_made", name)})


def test_uvicorn_has_an_upper_bound_and_all_that_is_overridden_is_checked():
    [wanted] = [r for r in extras._in_clone()["serve"] if r.startswith("uvicorn")]
    assert "<" in wanted
    for base, names in HOOKS.items():
        own = listening.Server if base.__name__ == "Server" else listening._Connection
        overridden = {name for name in vars(own) if name in dir(base) and not name.startswith("__")}
        assert overridden <= set(names)
