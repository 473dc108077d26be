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
MAYBE_NUMBER = {"type": ["number", "null"]}
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
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "TinyGPT",
            "version": __version__,
            "description": "A model served by an API like OpenAI's.",
        },
        "paths": {
            "/v1/models": {"get": _get("List the models: there is one.", _list_of(_model()))},
            "/v1/models/{id}": {"get": _get_model(service)},
            "/v1/completions": {
                "post": _post("Continue prompts.", completions, _completion(), _completion_chunk())
            },
            "/v1/chat/completions": {
                "post": _post("Answer in a chat.", chats, _chat(), _chat_chunk())
            },
            "/tokenize": {"post": _post_tokenize(service)},
            "/detokenize": {"post": _post_detokenize(service)},
            "/tokenizer_info": {"get": _get("What the tokenizer is.", {"type": "object"})},
            "/healthz": {"get": _get_health()},
            "/metrics": {"get": _get("Figures for Prometheus.", STRING, "text/plain")},
            "/openapi.json": {"get": _get("This document.", {"type": "object"})},
        },
        "components": {
            "schemas": {"Error": _error()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _get(summary: str, schema: Json, media_type: str = "application/json") -> Json:
    good = {"description": "As asked.", "content": {media_type: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": good, **_refusals(REFUSALS)}}


def _get_health() -> Json:
    operation = _get("Whether it runs.", _object(status={"enum": ["ok"]}))
    operation["responses"] |= _refusals({"503": BODY_REFUSALS["503"]})
    return operation


def _get_model(service: Service) -> Json:
    operation = _get("Tell of one model.", _model())
    operation["responses"] |= _refusals({"404": BODY_REFUSALS["404"]})
    name = {"name": "id", "in": "path", "required": True, "schema": STRING}
    return {**operation, "parameters": [{**name, "example": service.name}]}


def _post(summary: str, body: Schema, answer: Json, chunk: Json) -> Json:
    """An operation that writes texts, whole or as a stream."""
    part = {**STRING, "contentMediaType": "application/json", "contentSchema": chunk}
    data = {"anyOf": [{"enum": ["[DONE]"]}, part]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content = {"application/json": {"schema": answer}, "text/event-stream": {"schema": event}}
    description = "The texts; with stream, chunks of them, and at the end data: [DONE]."
    return _operation(summary, body, description, content)


def _post_tokenize(service: Service) -> Json:
    piece = _object(id=INTEGER, piece={"anyOf": [STRING, _array(INTEGER)]})
    told: Json = {"tokens": _array({"anyOf": [INTEGER, piece]}), "count": INTEGER}
    whole = _object(**told, max_model_len=INTEGER, token_strs=_array(STRING))
    answer = {**whole, "required": ["tokens", "count", "max_model_len"]}
    body = tokenize_schema(service.name, service.limits)
    content = {"application/json": {"schema": answer}}
    return _operation("Cut a text into tokens.", body, "The tokens.", content)


def _post_detokenize(service: Service) -> Json:
    body = detokenize_schema(service.name, service.vocab_size, service.limits)
    content = {"application/json": {"schema": _object(prompt=STRING, content=STRING)}}
    return _operation("Join tokens to a text.", body, "The text, under two names.", content)


def _operation(summary: str, body: Schema, description: str, content: Json) -> Json:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": description, "content": content},
            **_refusals({**REFUSALS, **BODY_REFUSALS}),
        },
    }


def _refusals(statuses: dict[str, str]) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {s: {"description": text, "content": error} for s, text in statuses.items()}


def _object(**properties: Schema) -> Json:
    """An object that has all of these and nothing else."""
    return dict(object_schema(properties, *properties))


def _array(items: Schema) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _list_of(item: Json) -> Json:
    return _object(object={"enum": ["list"]}, data=_array(item))


def _model() -> Json:
    head: Json = {"id": STRING, "object": {"enum": ["model"]}, "created": INTEGER}
    return _object(**head, owned_by=STRING, max_model_len=INTEGER)


def _error() -> Json:
    maybe = {"type": ["string", "null"]}
    return _object(error=_object(message=STRING, type=STRING, param=maybe, code=maybe))


def _usage() -> Json:
    return _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)


ENDS: Json = {"enum": ["stop", "length"]}
ENDS_OR_NOT: Json = {"enum": ["stop", "length", None]}
"""Why a text ended: a stop string, or its length or time."""


def _answer(kind: str, choice: Json) -> Json:
    head: Json = {"id": STRING, "created": INTEGER, "model": STRING, "object": {"enum": [kind]}}
    return _object(**head, choices=_array(choice), usage=_usage())


def _chunk(kind: str, choice: Json) -> Json:
    """A part of an answer: usage only where it was asked for, and then null but in the last."""
    whole = _answer(kind, choice)
    whole["properties"]["usage"] = _or_null(_usage())
    return {**whole, "required": [name for name in whole["required"] if name != "usage"]}


def _completion() -> Json:
    return _answer("text_completion", _text(ENDS))


def _completion_chunk() -> Json:
    return _chunk("text_completion", _text(ENDS_OR_NOT))


def _text(ends: Json) -> Json:
    """A text, or a part of one."""
    top = {"type": ["object", "null"], "additionalProperties": NUMBER}
    logprobs = _object(
        tokens=_array(STRING),
        token_logprobs=_array(MAYBE_NUMBER),
        top_logprobs=_or_null(_array(top)),
        text_offset=_array(INTEGER),
    )
    return _object(text=STRING, index=INTEGER, logprobs=_or_null(logprobs), finish_reason=ends)


def _chat() -> Json:
    message = _object(role={"enum": ["assistant"]}, content=STRING, refusal={"type": "null"})
    told = {"logprobs": _chat_logprobs(), "finish_reason": ENDS}
    return _answer("chat.completion", _object(index=INTEGER, message=message, **told))


def _chat_chunk() -> Json:
    delta = {**_object(role={"enum": ["assistant"]}, content=STRING), "required": []}
    told = {"logprobs": _chat_logprobs(), "finish_reason": ENDS_OR_NOT}
    return _chunk("chat.completion.chunk", _object(index=INTEGER, delta=delta, **told))


def _chat_logprobs() -> Json:
    entry: Json = {"token": STRING, "logprob": MAYBE_NUMBER, "bytes": _array(INTEGER)}
    token = _object(**entry, top_logprobs=_array(_object(**entry)))
    return _or_null(_object(content=_array(token), refusal={"type": "null"}))
