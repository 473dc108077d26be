"""The playground's page, and the JSON that the page asks for.

Every endpoint takes POST with JSON. The text so far is given as ``ids``, tokens that are certain,
and ``text``, which comes after them and is encoded here: so a page sends back, token for token,
what the model wrote, and leaves what a person typed to the tokenizer. Of a text that is too long
the end is taken, which is all that the model sees.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinygpt.config import MAX_CHAT_TOKENS, MAX_TOKENS
from tinygpt.errors import TinyGPTError, TokenizerError
from tinygpt.server.engine.scheduler import EngineClosed
from tinygpt.server.engine.sequence import Request as TextRequest
from tinygpt.server.http.answers import JSONResponse
from tinygpt.server.http.body import unless_gone
from tinygpt.server.http.refusal import Refusal, queue_full, timed_out
from tinygpt.server.http.static import page_files
from tinygpt.server.openai.choices import Choice, Delta, finite
from tinygpt.server.openai.endpoints import generate
from tinygpt.server.openai.fields import chat_schema, completion_schema
from tinygpt.server.openai.jobs import Body, Job, sampling_of, seed_of, stops_of
from tinygpt.server.openai.prompts import Ids, encode, encode_chat
from tinygpt.server.openai.schema import Schema, given, object_schema
from tinygpt.server.openai.service import Service
from tinygpt.server.openai.shapes import CompletionShape, Json
from tinygpt.server.playground import introspection
from tinygpt.server.playground.introspection import AttentionLook
from tinygpt.server.playground.model_card import model_card
from tinygpt.text.tokenizers import Tokenizer

T = TypeVar("T")
Answer = Callable[[Body], Coroutine[Any, Any, Json]]

CANDIDATES = 50
"""Tokens of a distribution in one answer, at most."""
WINDOW = 128
"""Tokens of an attention map, at most."""
LOOKS = 16
"""Requests for candidates or attention that may wait for the engine; each is a forward pass."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def routes(service: Service, dashboard: bool) -> list[Route]:
    """The page at /, with its endpoints below /api and, maybe, a link to the dashboard."""
    looking, schemas = _Looking(service, dashboard), _schemas(service)

    def post(name: str, endpoint: Callable[..., Awaitable[Response]], *args: object) -> Route:
        return Route(f"/api/{name}", partial(endpoint, service, *args), methods=["POST"])

    return [
        Route("/", page_files()["playground/index.html"], methods=["GET"]),
        post("generate", generate, schemas.pop("generate"), _generation),
        *(post(name, _answer, schema, getattr(looking, name)) for name, schema in schemas.items()),
    ]


def _schemas(service: Service) -> dict[str, Schema]:
    """The body of each endpoint; fields of a completion are as in /v1/completions."""
    fields = completion_schema(service.name, service.vocab_size, service.limits)["properties"]
    chats = chat_schema(service.name, service.limits)["properties"]
    sampling = {name: fields[name] for name in SAMPLING}
    sampling["top_p"] = {**fields["top_p"], "exclusiveMinimum": 0}  # the page sends null for none

    def whole(low: int, high: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": low, "maximum": high}

    token, text = whole(0, service.vocab_size - 1), {"type": "string"}
    ids = {"type": "array", "minItems": 0, "maxItems": service.limits.prompt_tokens, "items": token}
    context = {"ids": ids, "text": text}
    writing = {
        "max_tokens": {**fields["max_tokens"], "maximum": service.limits.max_tokens},
        "seed": {**fields["seed"], "minimum": 0},
        "stop": fields["stop"],
        "ignore_eos": fields["ignore_eos"],
        "stop_ids": {**ids, "maxItems": service.limits.stops},
    }
    looked_at = {"token": {**token, "type": ["integer", "null"]}, "count": whole(1, CANDIDATES)}
    layer = {"layer": whole(0, service.model.config.n_layer - 1), "last": whole(1, WINDOW)}
    return {
        "model": object_schema({}, strict=False),
        "beginnings": object_schema({}),
        "tokens": object_schema({"text": text}, "text"),
        "conversation": object_schema(
            {"messages": chats["messages"], "max_tokens": writing["max_tokens"]}, "messages"
        ),
        "generate": object_schema({**context, **sampling, **writing}),
        "candidates": object_schema({**context, **sampling, **looked_at}),
        "attention": object_schema({**context, **layer}, "layer"),
    }


async def _answer(service: Service, schema: Schema, answer: Answer, request: Request) -> Response:
    """Check the body and answer, unless the client disconnects meanwhile."""
    body = await service.body(request, schema)
    try:
        async with asyncio.timeout(service.limits.request_seconds):
            found = await unless_gone(request, answer(given(body)))
        return await asyncio.to_thread(JSONResponse, found)
    except TimeoutError:
        raise timed_out() from None


class _Looking:
    """Answers about the model, and about what it computes for a text: a method for an endpoint."""

    def __init__(self, service: Service, dashboard: bool) -> None:
        self.service = service
        self._card = model_card(service) | {"dashboard": dashboard}
        self._attention = AttentionLook(service.model)
        self._waiting = 0

    async def model(self, body: Body) -> Json:
        """The model's card."""
        return self._card

    async def beginnings(self, body: Body) -> Json:
        """Texts to begin with, from the run's own validation text."""
        return {"beginnings": await asyncio.to_thread(self.service.beginnings)}

    async def tokens(self, body: Body) -> Json:
        """The tokens of a text, or of the end of one that is too long."""
        ids = await _text_ids(self.service, body["text"])
        return {"tokens": pieces(self.service.tokenizer, ids)}

    async def conversation(self, body: Body) -> Json:
        """The prompt for an answer, where the answer ends, and what to know of the prompt."""
        asked = await encode_chat(
            self.service, body["messages"], body.get("max_tokens", MAX_CHAT_TOKENS)
        )
        return {
            "tokens": pieces(self.service.tokenizer, asked.ids),
            "remark": asked.remark,
            "stop": asked.stop,
            "stop_ids": asked.stop_ids,
        }

    async def candidates(self, body: Body) -> Json:
        """The likeliest tokens after a text; of ``token``, its rank as well."""
        (ids, _), config = await _ids_and_text(self.service, body), sampling_of(body)
        size, decoder = self.service.vocab_size, self.service.engine.decoder
        found = await self._look(lambda: introspection.next_token(decoder, ids, config, size))

        def shown(token: int) -> Json:
            own, sampled = float(found.model[token]), float(found.sampled[token])
            return {**piece(self.service.tokenizer, token), "probability": own, "sampled": sampled}

        token = body.get("token")
        return {
            "candidates": [shown(each) for each in found.likeliest(body.get("count", 10))],
            "chosen": None if token is None else {**shown(token), "rank": found.rank(token)},
            "kept": found.kept,
            "vocabulary": size,
        }

    async def attention(self, body: Body) -> Json:
        """Where the heads of a layer look: for each head a row of weights for each token.

        A row ends at its own token. ``start`` counts the tokens before the first one shown,
        ``position`` those that the model no longer sees, ``before`` sums the weights of the others
        in front of it.
        """
        (ids, _), layer = await _ids_and_text(self.service, body), body["layer"]
        last, look = body.get("last", WINDOW), self._attention
        weights = await self._look(lambda: look.weights(ids, layer, last))
        _, rows, columns = weights.shape
        weights = weights.astype(float).round(4)
        beyond = columns - rows
        return {
            "layer": layer,
            "start": len(ids) - rows,
            "position": len(ids) - columns,
            "tokens": pieces(self.service.tokenizer, ids[-rows:]),
            "weights": [
                [head[i, beyond : beyond + i + 1].tolist() for i in range(rows)] for head in weights
            ],
            "before": weights[:, :, :beyond].sum(-1).round(4).tolist(),
        }

    async def _look(self, work: Callable[[], T]) -> T:
        """The result of a function in the engine's thread, for which `LOOKS` requests may wait."""
        if self._waiting >= LOOKS:
            raise queue_full()
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self.service.engine.run(work))
        except EngineClosed:
            raise
        except TinyGPTError as error:
            raise Refusal(500, str(error), code="model_failed") from error
        finally:
            self._waiting -= 1


async def _ids_and_text(service: Service, body: Body) -> tuple[Ids, Ids]:
    """The last ids before the place in question, at least one, and the ids of ``text`` alone."""
    text = await _text_ids(service, body.get("text", ""))
    ids = (*map(int, body.get("ids", ())), *text)[-service.limits.prompt_tokens :]
    if not ids:
        message = "There is no token to go on from: give ids, or text, such as a line break."
        raise Refusal(400, message, param="text", code="empty_prompt")
    return ids, text


async def _text_ids(service: Service, text: str) -> Ids:
    """The last ids of a text, as many as a prompt may have, from a whole character on."""
    ids = await encode(service, text, "text", most=sys.maxsize)
    start = max(0, len(ids) - service.limits.prompt_tokens)
    while 0 < start < len(ids) and _continues(service.tokenizer, ids[start]):
        start += 1
    return ids[start:]


def _continues(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token begins within a character: UTF-8's bytes 10xxxxxx continue one."""
    raw = piece(tokenizer, token)["bytes"]
    return bool(raw) and raw[0] & 0xC0 == 0x80


async def _generation(service: Service, body: Body) -> Job:
    """The engine's work for a body of /api/generate."""
    ids, text = await _ids_and_text(service, body)
    request = TextRequest(
        ids,
        body.get("max_tokens", MAX_TOKENS),
        sampling_of(body),
        seed_of(body),
        stops_of(body),
        logprobs=0,
        ignore_eos=bool(body.get("ignore_eos")),
        ends=tuple(map(int, body.get("stop_ids", ()))),
    )
    shape = _TokenShape(service, text)
    return Job(shape, (request,), (Delta(),), len(ids), stream=True, include_usage=False)


class _TokenShape(CompletionShape):
    """Answers of /api/generate: first how the prompt's text was cut, then token after token."""

    def __init__(self, service: Service, text: Ids) -> None:
        super().__init__(service.name, service.tokenizer, 0)
        self._text = text

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        return choices[0]

    def opening(self, choice: Choice) -> Json:
        return {"prompt": pieces(self.tokenizer, self._text)}

    def part(self, choice: Choice, delta: Delta, reason: str | None = None) -> Json:
        if reason is not None:
            return {"finish_reason": reason}
        tokens = [described(t.token, t.raw) | {"logprob": finite(t.logprob)} for t in delta.tokens]
        return {"tokens": tokens}


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Json]:
    return [piece(tokenizer, token) for token in ids]


def piece(tokenizer: Tokenizer, token: int) -> Json:
    """A token as pages get it; where its bytes are no characters, its text holds U+FFFD.

    >>> from tinygpt.text.tokenizers import ByteTokenizer
    >>> piece(ByteTokenizer(), 65)
    {'id': 65, 'text': 'A', 'bytes': [65]}
    """
    try:
        return described(token, tokenizer.decode_bytes([token]))
    except TokenizerError:  # an id that the vocabulary leaves out
        return described(token, b"")


def described(token: int, raw: bytes) -> Json:
    return {"id": token, "text": raw.decode(errors="replace"), "bytes": list(raw)}
