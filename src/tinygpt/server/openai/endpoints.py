"""The routes of the API: completions and chats, models, health, metrics and the document."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tinygpt.server.http.answers import EventStream, JSONResponse, event
from tinygpt.server.http.body import unless_gone
from tinygpt.server.http.refusal import DOCUMENT, Refusal, closing, timed_out
from tinygpt.server.openai import tokenizing
from tinygpt.server.openai.answering import DONE, Answer
from tinygpt.server.openai.document import openapi
from tinygpt.server.openai.fields import chat_schema, completion_schema
from tinygpt.server.openai.jobs import Body, Job, chat_job, completion_job
from tinygpt.server.openai.metrics_page import CONTENT_TYPE, metrics_text
from tinygpt.server.openai.schema import Schema, given, unknown
from tinygpt.server.openai.service import Service

LEFT_OUT = "x-tinygpt-left-out-messages"
"""How many messages of a chat found no place in the model's window."""
MakeJob = Callable[[Service, Body], Awaitable[Job]]


def routes(service: Service) -> list[Route]:
    """All routes; each handler takes the service as its first argument."""
    limits, strict = service.limits, service.strict
    completions = completion_schema(service.name, service.vocab_size, limits, strict)
    chats = chat_schema(service.name, limits, strict)
    document = openapi(service, completions, chats)

    def get(path: str, handler: Callable[..., Awaitable[Response]], *given: object) -> Route:
        return Route(path, partial(handler, *given), methods=["GET"])

    def post(path: str, schema: Schema, make_job: MakeJob) -> Route:
        return Route(path, partial(generate, service, schema, make_job), methods=["POST"])

    return [
        post("/v1/completions", completions, completion_job),
        post("/v1/chat/completions", chats, chat_job),
        *tokenizing.routes(service),
        get("/v1/models", _models, service),
        get("/v1/models/{id:path}", _one_model, service),
        get("/healthz", _health, service),
        get("/metrics", _metrics, service),
        get(DOCUMENT, _document, document),
    ]


async def generate(
    service: Service, schema: Schema, make_job: MakeJob, request: Request
) -> Response:
    """Check the body, encode the prompts, and answer with what the engine generates."""
    deadline = asyncio.get_running_loop().time() + service.limits.request_seconds
    body = await service.body(request, schema)
    response = await unless_gone(request, _answer(service, make_job, given(body), deadline))
    response.headers.update(service.ignored(unknown(body, schema)))
    return response


async def _answer(service: Service, make_job: MakeJob, body: Body, deadline: float) -> Response:
    try:
        async with asyncio.timeout_at(deadline):
            job = await make_job(service, body)
    except TimeoutError:
        raise timed_out() from None
    answer = Answer(service, job, deadline)
    left_out = {LEFT_OUT: str(job.left_out)} if job.left_out else {}
    if job.stream:
        return _EventStream(answer, left_out)
    try:
        return JSONResponse(await answer.whole(), headers=left_out)
    finally:
        answer.close()


class _EventStream(EventStream):
    """Streams the texts. However the response ends, the engine's slots are freed."""

    last = event(closing().body()) + DONE

    def __init__(self, answer: Answer, headers: Mapping[str, str]) -> None:
        super().__init__(answer.events(), headers={"x-accel-buffering": "no", **headers})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service)]})


async def _one_model(service: Service, request: Request) -> Response:
    service.check_name(request.path_params["id"])
    return JSONResponse(_described(service))


def _described(service: Service) -> dict[str, object]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "tinygpt",
        "max_model_len": service.model.config.block_size,
    }


async def _health(service: Service, request: Request) -> Response:
    if not service.engine.alive:
        raise Refusal(503, "The engine has ended; the server's terminal says why.", code="ended")
    return JSONResponse({"status": "ok"})


async def _metrics(service: Service, request: Request) -> Response:
    text = metrics_text(service.counts, service.engine.stats(), service.name)
    return PlainTextResponse(text, headers={"content-type": CONTENT_TYPE})


async def _document(document: object, request: Request) -> Response:
    return JSONResponse(document)
