"""The playground: its page, and what the page asks for.

Every endpoint takes POST with JSON. What stands before the place in question is told as ``ids``,
the tokens that are certain, and ``text``, which is encoded and comes after them: so a page can hand
back, token for token, what the model wrote, and leave what a person typed to the tokenizer. Of
what is too long the end is taken, which is all that the model sees.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinygpt.config import MAX_TOKENS
from tinygpt.errors import TinyGPTError, TokenizerError
from tinygpt.server.engine.scheduler import EngineClosed
from tinygpt.server.engine.sequence import Request as TextRequest
from tinygpt.server.http import static
from tinygpt.server.http.body import read_json, unless_gone
from tinygpt.server.http.json_answer import JSONResponse
from tinygpt.server.http.refusal import Refusal, timed_out
from tinygpt.server.openai.choices import Choice, Delta, finite
from tinygpt.server.openai.endpoints import generate
from tinygpt.server.openai.fields import completion_schema
from tinygpt.server.openai.jobs import Body, Job, sampling_of, seed_of, stops_of
from tinygpt.server.openai.prompts import Ids, encode
from tinygpt.server.openai.schema import Schema, check, object_schema
from tinygpt.server.openai.service import Service
from tinygpt.server.openai.shapes import CompletionShape, Json
from tinygpt.server.playground import introspection
from tinygpt.server.playground.introspection import AttentionLook
from tinygpt.server.playground.model_card import model_card
from tinygpt.text.tokenizers import Tokenizer

T = TypeVar("T")
Answer = Callable[[Body], Coroutine[Any, Any, Json]]

CANDIDATES = 50
"""Tokens that are told of a distribution at most."""
WINDOW = 128
"""Tokens of which attention is told at most."""
LOOKS = 16
"""Looks inside the model that may wait for the engine; each is a forward pass."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def routes(service: Service) -> list[Route]:
    """The page at /, and its endpoints below /api."""
    page = static.read_page_files()["playground/index.html"]
    card, looking = model_card(service), _Looking(service)

    async def index(request: Request) -> Response:
        return page.response(request)

    async def model(request: Request) -> Response:
        beside = any(getattr(route, "path", "") == "/dashboard" for route in request.app.routes)
        await read_json(request, service.limits)
        return JSONResponse(card | {"dashboard": beside})

    def post(path: str, schema: Schema, answer: Answer) -> Route:
        return Route(path, partial(_answer, service, schema, answer), methods=["POST"])

    schemas = _schemas(service)
    return [
        Route("/", index, methods=["GET"]),
        Route("/api/model", model, methods=["POST"]),
        Route(
            "/api/generate",
            partial(generate, service, schemas["generate"], _generation),
            methods=["POST"],
        ),
        post("/api/beginnings", object_schema({}), looking.beginnings),
        post("/api/tokens", schemas["tokens"], looking.tokens),
        post("/api/candidates", schemas["candidates"], looking.candidates),
        post("/api/attention", schemas["attention"], looking.attention),
    ]


def _schemas(service: Service) -> dict[str, Schema]:
    """What each endpoint takes; of a completion the same fields as there."""
    fields = completion_schema(service.name, service.vocab_size, service.limits)["properties"]
    # The page's own bounds: what stands for nothing in other servers' words is null here.
    sampling = {name: fields[name] for name in SAMPLING}
    sampling["top_p"] = {**fields["top_p"], "exclusiveMinimum": 0}
    token = {"type": "integer", "minimum": 0, "maximum": service.vocab_size - 1}
    text = {"type": "string"}
    ids = {"type": "array", "minItems": 0, "maxItems": service.limits.prompt_tokens, "items": token}
    context = {"ids": ids, "text": text}
    count = {"type": "integer", "minimum": 1, "maximum": CANDIDATES}
    last = {"type": "integer", "minimum": 1, "maximum": WINDOW}
    layer = {"type": "integer", "minimum": 0, "maximum": service.model.config.n_layer - 1}
    told = {**token, "type": ["integer", "null"]}
    writing = {
        "max_tokens": {**fields["max_tokens"], "maximum": service.limits.max_tokens},
        "seed": {**fields["seed"], "minimum": 0},
        "stop": fields["stop"],
        "ignore_eos": fields["ignore_eos"],
    }
    return {
        "tokens": object_schema({"text": text}, "text"),
        "generate": object_schema({**context, **sampling, **writing}),
        "candidates": object_schema({**context, **sampling, "token": told, "count": count}),
        "attention": object_schema({**context, "layer": layer, "last": last}, "layer"),
    }


async def _answer(service: Service, schema: Schema, answer: Answer, request: Request) -> Response:
    """Check what was asked, and answer unless the client has gone meanwhile."""
    body = await read_json(request, service.limits)
    check(body, schema)
    try:
        async with asyncio.timeout(service.limits.request_seconds):
            found = await unless_gone(request, answer(body))
        return await asyncio.to_thread(JSONResponse, found)
    except TimeoutError:
        raise timed_out() from None


class _Looking:
    """Answers about the model and what it makes of a text."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._attention = AttentionLook(service.model)
        self._waiting = 0

    async def beginnings(self, body: Body) -> Json:
        """Texts to begin with, from the run's own validation text."""
        return {"beginnings": await asyncio.to_thread(self.service.beginnings)}

    async def tokens(self, body: Body) -> Json:
        """How the tokenizer cuts a text, or the end of one that is too long."""
        ids = await _text_ids(self.service, body["text"])
        return {"tokens": pieces(self.service.tokenizer, ids)}

    async def candidates(self, body: Body) -> Json:
        """The likeliest tokens after a text; of one token, its rank as well."""
        ids, config = await _context(self.service, body), sampling_of(body)
        size, decoder = self.service.vocab_size, self.service.engine.decoder
        found = await self._look(lambda: introspection.next_token(decoder, ids, config, size))

        def told(token: int) -> Json:
            own, sampled = float(found.model[token]), float(found.sampled[token])
            return {
                **piece(self.service.tokenizer, token),
                "probability": own,
                "sampled": sampled,
            }

        token = body.get("token")
        return {
            "candidates": [told(each) for each in found.likeliest(int(body.get("count", 10)))],
            "chosen": None
            if token is None
            else told(int(token)) | {"rank": found.rank(int(token))},
            "kept": found.kept,
            "vocabulary": size,
        }

    async def attention(self, body: Body) -> Json:
        """Where the heads of a layer look: for each head a row of weights for each token.

        A row ends at its own token. ``start`` is the number of tokens before the first one told,
        ``position`` of those that the model no longer sees, ``before`` what goes to those between.
        """
        ids, layer = await _context(self.service, body), int(body["layer"])
        last, look = int(body.get("last", WINDOW)), self._attention
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
        """What a function finds in the engine's thread; only so many may wait for that."""
        if self._waiting >= LOOKS:
            message = "More looks inside the model are waiting than this server takes. Try again."
            raise Refusal(429, message, code="queue_full")
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self.service.engine.run(work))
        except TinyGPTError as error:
            if isinstance(error, EngineClosed):
                raise
            raise Refusal(500, str(error), code="model_failed") from error
        finally:
            self._waiting -= 1


async def _context(service: Service, body: Body) -> Ids:
    """The ids of what stands before, at least one."""
    ids, _ = await _ids_and_text(service, body)
    return ids


async def _ids_and_text(service: Service, body: Body) -> tuple[Ids, Ids]:
    """The last ids of what stands before, so many as are taken, and those of its text alone."""
    text = await _text_ids(service, body.get("text", ""))
    ids = (*map(int, body.get("ids", ())), *text)[-service.limits.prompt_tokens :]
    if not ids:
        message = "There is no token to go on from: give ids, or text, such as a line break."
        raise Refusal(400, message, param="text", code="empty_prompt")
    return ids, text


async def _text_ids(service: Service, text: str) -> Ids:
    """The last ids of a text, as many as a prompt may have, from a whole character on.

    The model sees the end of a text only, so a page need not know how long one may be.
    """
    ids = await encode(service, text, "text", most=sys.maxsize)
    kept = ids[-service.limits.prompt_tokens :]
    if len(kept) < len(ids):
        first = (i for i, token in enumerate(kept) if _begins(service.tokenizer, token))
        kept = kept[next(first, len(kept)) :]
    return kept


def _begins(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token's first byte is not one from within a character."""
    raw = bytes(piece(tokenizer, token)["bytes"][:1])
    return not 0x80 <= int.from_bytes(raw) <= 0xBF


async def _generation(service: Service, body: Body) -> Job:
    """The engine's work for a body of /api/generate."""
    ids, text = await _ids_and_text(service, body)
    asked = body.get("max_tokens")
    max_tokens = MAX_TOKENS if asked is None else int(asked)
    request = TextRequest(
        ids,
        max_tokens,
        sampling_of(body),
        seed_of(body),
        stops_of(body),
        logprobs=0,
        ignore_eos=bool(body.get("ignore_eos")),
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
        return {
            "tokens": [
                described(token.token, token.raw) | {"logprob": finite(token.logprob)}
                for token in delta.tokens
            ]
        }


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Json]:
    return [piece(tokenizer, token) for token in ids]


def piece(tokenizer: Tokenizer, token: int) -> Json:
    """A token as pages get it. Its bytes say what it is; its text, where they are no characters,
    holds U+FFFD.

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
