"""GET /openapi.json: the API described in OpenAPI 3.1, for programs that write clients or tests.

The bodies of requests are described by the schemas that check them.
"""

from __future__ import annotations

from typing import Any

from tinygpt.config import __version__
from tinygpt.server.openai.fields import detokenize_schema, tokenize_schema
from tinygpt.server.openai.schema import Schema, object_schema
from tinygpt.server.openai.service import Service

Json = dict[str, Any]

INTEGER, NUMBER, STRING = {"type": "integer"}, {"type": "number"}, {"type": "string"}
NULL, ANY_OBJECT = {"type": "null"}, {"type": "object"}
REFUSALS = {
    "400": "Something in the request is wrong; error.param names it.",
    "401": "The API key is missing or wrong.",
    "403": "A Host or an Origin that is not this server's.",
}
BODY_REFUSALS = {
    "404": "Another model than the one that is served.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; Retry-After says when to come again.",
    "500": "The server or the model failed.",
    "503": "The server is shutting down.",
    "504": "The time for the request was over before it had its turn.",
}


def openapi(service: Service, completions: Schema, chats: Schema) -> Json:
    """The document for one service."""
    name, limits = service.name, service.limits
    models = _object(object={"enum": ["list"]}, data=_array(_model()))
    running = _object(status={"enum": ["ok"]})
    parameter = {"name": "id", "in": "path", "required": True, "schema": STRING, "example": name}
    ids = detokenize_schema(name, service.vocab_size, limits)
    joined = _object(prompt=STRING, content=STRING)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "TinyGPT",
            "version": __version__,
            "description": "A model served by an API like OpenAI's.",
        },
        "paths": {
            "/v1/models": _get("List the models: there is one.", models),
            "/v1/models/{id}": _get("Tell of one model.", _model(), "404", parameters=[parameter]),
            "/v1/completions": _post_texts("Continue prompts.", completions, *_completions()),
            "/v1/chat/completions": _post_texts("Answer in a chat.", chats, *_chats()),
            "/tokenize": _post(
                "Cut a text into tokens.", tokenize_schema(name, limits), "The tokens.", _tokens()
            ),
            "/detokenize": _post(
                "Join tokens to a text.", ids, "The text, under two names.", joined
            ),
            "/tokenizer_info": _get("What the tokenizer is.", ANY_OBJECT),
            "/healthz": _get("Whether it runs.", running, "503"),
            "/metrics": _get("Figures for Prometheus.", STRING, media_type="text/plain"),
            "/openapi.json": _get("This document.", ANY_OBJECT),
        },
        "components": {
            "schemas": {"Error": _error()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


# ---- operations ----


def _get(
    summary: str, schema: Schema, *statuses: str, media_type: str = "application/json", **more: Any
) -> Json:
    """A GET; ``statuses`` are refusals besides those of every request."""
    refusals = REFUSALS | {status: BODY_REFUSALS[status] for status in statuses}
    responses = _responses("As asked.", {media_type: {"schema": schema}}, refusals)
    return {"get": {"summary": summary, "responses": responses, **more}}


def _post_texts(summary: str, body: Schema, answer: Json, chunk: Json) -> Json:
    """A POST that generates texts, whole or as a stream of chunks."""
    part = {**STRING, "contentMediaType": "application/json", "contentSchema": chunk}
    data = {"anyOf": [{"enum": ["[DONE]"]}, part]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    description = "The texts; with stream, chunks of them, and at the end data: [DONE]."
    return _post(summary, body, description, answer, **{"text/event-stream": {"schema": event}})


def _post(summary: str, body: Schema, description: str, answer: Json, **more: Json) -> Json:
    content = {"application/json": {"schema": answer}, **more}
    operation = {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": _responses(description, content, REFUSALS | BODY_REFUSALS),
    }
    return {"post": operation}


def _responses(description: str, content: Json, refusals: dict[str, str]) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    good = {"description": description, "content": content}
    bad = {status: {"description": text, "content": error} for status, text in refusals.items()}
    return {"200": good, **bad}


# ---- answers ----


def _object(*, optional: tuple[str, ...] = (), **properties: Schema) -> Json:
    """An object that has all of these properties but the optional ones, and no others."""
    required = [name for name in properties if name not in optional]
    return dict(object_schema(properties, *required))


def _array(items: Schema) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Json:
    return {"anyOf": [schema, NULL]}


def _model() -> Json:
    head: Json = {"id": STRING, "object": {"enum": ["model"]}, "created": INTEGER}
    return _object(**head, owned_by=STRING, max_model_len=INTEGER)


def _error() -> Json:
    maybe = {"type": ["string", "null"]}
    return _object(error=_object(message=STRING, type=STRING, param=maybe, code=maybe))


def _tokens() -> Json:
    piece = _object(id=INTEGER, piece={"anyOf": [STRING, _array(INTEGER)]})
    return _object(
        optional=("token_strs",),
        tokens=_array({"anyOf": [INTEGER, piece]}),
        count=INTEGER,
        max_model_len=INTEGER,
        token_strs=_array(STRING),
    )


ENDS: Json = {"enum": ["stop", "length"]}
ENDS_OR_NOT: Json = {"enum": ["stop", "length", None]}
"""Why a text ended: a stop string, or its length or time. None in a chunk before the last."""


def _answer(kind: str, choice: Json, usage: Json, optional: tuple[str, ...] = ()) -> Json:
    head: Json = {"id": STRING, "created": INTEGER, "model": STRING, "object": {"enum": [kind]}}
    return _object(optional=optional, **head, choices=_array(choice), usage=usage)


def _answer_and_chunk(kind: str, chunk_kind: str, whole: Json, part: Json) -> tuple[Json, Json]:
    """A chunk has usage only where it was asked for, and then null but in the last."""
    usage = _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
    chunk = _answer(chunk_kind, part, _or_null(usage), optional=("usage",))
    return _answer(kind, whole, usage), chunk


def _completions() -> tuple[Json, Json]:
    top = {"type": ["object", "null"], "additionalProperties": NUMBER}
    logprobs = _object(
        tokens=_array(STRING),
        token_logprobs=_array({"type": ["number", "null"]}),
        top_logprobs=_or_null(_array(top)),
        text_offset=_array(INTEGER),
    )
    text: Json = {"text": STRING, "index": INTEGER, "logprobs": _or_null(logprobs)}
    texts = (_object(**text, finish_reason=ends) for ends in (ENDS, ENDS_OR_NOT))
    return _answer_and_chunk("text_completion", "text_completion", *texts)


def _chats() -> tuple[Json, Json]:
    said: Json = {"role": {"enum": ["assistant"]}, "content": STRING}
    number = {"type": ["number", "null"]}
    entry: Json = {"token": STRING, "logprob": number, "bytes": _array(INTEGER)}
    token = _object(**entry, top_logprobs=_array(_object(**entry)))
    logprobs = _or_null(_object(content=_array(token), refusal=NULL))
    more: Json = {"index": INTEGER, "logprobs": logprobs}
    whole = _object(**more, message=_object(**said, refusal=NULL), finish_reason=ENDS)
    delta = _object(optional=("role", "content"), **said)
    part = _object(**more, delta=delta, finish_reason=ENDS_OR_NOT)
    return _answer_and_chunk("chat.completion", "chat.completion.chunk", whole, part)
