"""What programs send that speak OpenAI's API, as it was recorded, and second turns with their own
objects: none of it needs another server."""

import json
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx2", reason="the tests' HTTP client is not installed")

from starlette.testclient import TestClient

from tests.serving import PATIENCE, fake_service, running
from tinygpt.server.app import make_app
from tinygpt.text.tokenizers import ByteTokenizer

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def client(service=None):
    service = service or fake_service(max_tokens=40)
    return TestClient(make_app(service), base_url="http://localhost")


CONTINUE = {
    "chat": {
        "messages": [
            {"role": "system", "content": "Your are an AI assistant."},
            {"role": "user", "content": "Hello", "id": "b1", "contextItems": []},
            {"role": "assistant", "content": " Hi.", "toolCalls": None, "usage": None},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        "model": "tiny", "max_tokens": 4096, "temperature": 0.01, "stream": True,
        "stop": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>", "\n\n", "```"],
    },
    "autocomplete": {
        "model": "tiny", "max_tokens": 4096, "temperature": 0.01, "top_p": None,
        "frequency_penalty": None, "presence_penalty": None, "stream": True,
        "stop": ["<PRE>", "<SUF>", "<MID>", "<EOT>", "/src/", "#- coding: utf-8", "```", "\n\n\n"],
        "prompt": "<PRE> def f(x): <SUF> <MID>",
    },
    "title": {
        "messages": [{"role": "user", "content": "Give it a name: Hello"}], "model": "tiny",
        "max_tokens": 12, "max_completion_tokens": 16, "stream": False, "prediction": None,
    },
}  # fmt: skip
LANGCHAIN = {
    "a first turn": {
        "messages": [
            {"content": "Be brief.", "role": "system"}, {"content": "Hello", "role": "user"},
        ],
        "model": "tiny", "max_completion_tokens": 5, "stream": False, "temperature": 0.5,
    },
    "a second turn": {
        "messages": [
            {"content": "Hello", "role": "user"},
            {"content": "abc", "role": "assistant"},
            {"content": "And?", "role": "user"},
        ],
        "model": "tiny", "max_completion_tokens": 5, "stream": False, "temperature": 0.5,
    },
    "a stream": {
        "messages": [{"content": "Hello", "role": "user"}], "model": "tiny",
        "max_completion_tokens": 5, "stream": True, "temperature": 0.5,
    },
}  # fmt: skip
OPEN_WEBUI = {
    "a second turn": {
        "stream": True, "model": "tiny", "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "abc"},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "frequency_penalty": 0, "seed": 1,
        "stop": ["###"], "logit_bias": {"65": -100}, "max_tokens": 128,
    },
    "a title": {
        "model": "tiny", "stream": False, "max_tokens": 1000,
        "messages": [{"role": "user", "content": "### Task:\nGive a title as JSON.\n<chat_history>"
                      "\nUSER: Hello\nASSISTANT: abc\n</chat_history>"}],
    },
    "a continued answer": {
        "model": "tiny", "stream": True,
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "ab"}],
    },
}  # fmt: skip
RECORDED = {f"Continue, {name}": body for name, body in CONTINUE.items()}
RECORDED |= {f"LangChain, {name}": body for name, body in LANGCHAIN.items()}
RECORDED |= {f"open-webui, {name}": body for name, body in OPEN_WEBUI.items()}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_bodies_are_answered(name):
    body = RECORDED[name]
    answer = client().post(CHATS if "messages" in body else COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    if body["stream"]:
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"][0]["message"]["content"].startswith("abc")


def evaluated(prompt):
    """What lm-evaluation-harness sends for a text: its model local-completions."""
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True}  # fmt: skip


def test_what_lm_eval_sends_is_scored_whether_it_sends_text_or_ids():
    http, text = client(), "A stream of tokens"
    ids = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert http.get("/tokenizer_info").status_code == 200
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"] == text
    answers = [http.post(COMPLETIONS, json=evaluated(prompt)).json()
               for prompt in (text, [ids["tokens"]], [text])]  # fmt: skip
    told = [answer["choices"][0]["logprobs"] for answer in answers]
    assert told[0] == told[1] == told[2]
    # What the harness reads: it leaves out the last one, which the model has written.
    logprobs, tops = told[0]["token_logprobs"][:-1], told[0]["top_logprobs"][:-1]
    assert len(logprobs) == len(tops) == len(ByteTokenizer().encode(text))
    assert logprobs[0] is None and np.isfinite(logprobs[1:]).all()
    assert all(max(top.values()) >= own for top, own in zip(tops[1:], logprobs[1:], strict=True))
    several = http.post(COMPLETIONS, json=evaluated([text, "Another text"])).json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1]


def test_a_second_turn_with_openais_own_message():
    openai = pytest.importorskip("openai", reason="needs the extra 'test'")
    service = fake_service(block_size=256)
    with running(service) as address:
        http = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "Hello"}]
        for _ in range(2):
            answer = http.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
            messages += [answer.choices[0].message, {"role": "user", "content": "And?"}]
        dumped = [m if isinstance(m, dict) else m.model_dump() for m in messages]  # nulls and all
        http.chat.completions.create(model="tiny", messages=dumped, max_tokens=3)
        http.close()
    sent = bytes(service.engine.streams[-1].request.ids).decode()
    assert sent.count("Assistant: abc\n\nUser: And?") == 2 and sent.endswith("Assistant:")


def test_five_turns_with_langchain():
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    service = fake_service(block_size=256)
    with running(service) as address:
        model = langchain.ChatOpenAI(
            model="tiny", base_url=f"{address}/v1", api_key="none", max_tokens=3
        )
        talk = [("system", "Be brief.")]
        for turn in range(5):
            talk.append(("human", f"{turn}?"))
            answer = model.invoke(talk)
            assert "".join(chunk.content for chunk in model.stream(talk)) == answer.content
            talk.append(answer)
    sent = bytes(service.engine.streams[-1].request.ids).decode()
    assert sent.count("Assistant: abc") == 4 and "User: 4?" in sent


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
for (let turn = 0; turn < 2; turn += 1) {
  const answer = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 3 });
  messages.push(answer.choices[0].message, { role: "user", content: "And?" });
}
const last = { model: "tiny", messages, max_tokens: 3, stream: true };
const stream = await client.chat.completions.create(last);
let text = "";
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify({ text, turns: messages.length }));
"""


@pytest.fixture(scope="module")
def npm_openai(tmp_path_factory):
    """A temporary folder with OpenAI's client for JavaScript, if there is a way to it."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("openai-js")
    (folder / "package.json").write_text('{"type": "module"}')
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0",
               "--fetch-timeout=5000", "openai@6"]  # fmt: skip
    try:
        subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm's registry does not answer: {type(error).__name__}")
    return folder


@pytest.mark.slow
def test_a_second_turn_with_openais_client_for_javascript(npm_openai):
    (npm_openai / "turns.js").write_text(SCRIPT, encoding="utf-8")
    service = fake_service(block_size=256)
    with running(service) as address:
        command = ["node", "turns.js", f"{address}/v1"]
        done = subprocess.run(
            command, cwd=npm_openai, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"text": "abc", "turns": 5}
    sent = bytes(service.engine.streams[-1].request.ids).decode()
    assert sent.count("Assistant: abc\n\nUser: And?") == 2


def test_what_javascripts_client_sends_back_is_a_turn():
    """Its message objects are the answers' own, with every field."""
    http, messages = client(), [{"role": "user", "content": "Hello"}]
    for _ in range(2):
        answer = http.post(CHATS, json={"messages": messages, "max_tokens": 3}).json()
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "And?"}]
    assert http.post(CHATS, json={"messages": messages}).status_code == 200
