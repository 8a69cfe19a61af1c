"""The HTTP interface: OpenAI's paths, the page, health and metrics."""

import asyncio
import pathlib
import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from telechat.errors import InputError
from telechat.serving.access import AccessMiddleware, page_headers
from telechat.serving.answer import FAILURES, GONE, Answer
from telechat.serving.api_error import APIError
from telechat.serving.log import describe_failure, log
from telechat.serving.protocol import parse_body, read_chat, read_completion

LARGEST_BODY = 1 << 20  # bytes
PATIENCE = 30.0  # seconds that a client may take to send a body


class App:
    """Made once for a server; `asgi` is what uvicorn runs.

    Args:
        service (Service): answers.
        model (Model): what is served.
        api_key (str): wanted with every request but /health; None: no key.
        origins (sequence of str): whose pages may use the server besides its own; of `read_origin`.
    """

    def __init__(self, service, model, api_key=None, origins=()):
        self.service = service
        self.model = model
        self.created = int(time.time())
        page = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self._page = HTMLResponse(page, headers=page_headers(page))
        service.deliver = self._deliver
        self._loop = None
        routes = [Route("/", self._get_page), Route("/health", self._get_health), Route("/metrics", self._get_metrics),
                  Route("/v1/models", self._get_models), Route("/v1/models/{name:path}", self._get_model),
                  Route("/v1/chat/completions", self._post_chat, methods=["POST"]),
                  Route("/v1/completions", self._post_completion, methods=["POST"])]
        starlette = Starlette(routes=routes, exception_handlers={
            APIError: _refused, InputError: _bad_input, HTTPException: _http_error, Exception: _failure})
        self.asgi = AccessMiddleware(starlette, api_key, service.metrics, {route.path for route in routes}, origins)

    def _deliver(self, events):
        """Called in the loop's thread: hand events to the requests, which live in the HTTP thread."""
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_hand_out, events)

    async def _get_page(self, request):
        return self._page

    async def _get_health(self, request):
        if self.service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _get_metrics(self, request):
        return PlainTextResponse(self.service.metrics.text(self.service.waiting, self.service.running),
                                 media_type="text/plain; version=0.0.4")

    def _card(self, name):
        return {"id": name, "object": "model", "created": self.created, "owned_by": "telechat",
                "max_length": self.model.max_length}

    async def _get_models(self, request):
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.model.names]})

    async def _get_model(self, request):
        if (name := request.path_params["name"]) not in self.model.names:
            raise APIError(404, f"this server has {self.model.listed()} alone", "model", "model_not_found")
        return JSONResponse(self._card(name))

    async def _post_chat(self, request):
        return await self._answer(request, read_chat)

    async def _post_completion(self, request):
        return await self._answer(request, read_completion)

    async def _answer(self, request, read):
        self._loop = asyncio.get_running_loop()
        data = await _read_body(request)
        # Parsing and tokenising a large body takes a while, which must not hold up the others.
        ask = await run_in_threadpool(lambda: read(parse_body(data), self.model))
        answer = Answer(ask, self.model, self.service)
        if ask.stream:
            return _EventStream(answer.stream(), media_type="text/event-stream",
                                headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        return await answer.whole(request.receive)


def _hand_out(events):
    for event in events:
        try:
            event.choice.listener.put_nowait(event)
        except Exception as error:  # of this client
            log(f"an answer could not be delivered: {describe_failure(error)}")


class _EventStream(StreamingResponse):
    """A stream that frees its places however it ends."""

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A generator that was never begun, or is cut off between two pieces, ends here.
            await self.body_iterator.aclose()


async def _read_body(request):
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise APIError(415, "the request needs the header Content-Type: application/json")
    too_large = APIError(413, f"the body is larger than {LARGEST_BODY} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > LARGEST_BODY:
        raise too_large

    async def read():
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > LARGEST_BODY:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), PATIENCE)
    except ClientDisconnect:
        raise APIError(GONE, "the client went away while it sent the body") from None  # nobody reads it; metrics count it
    except asyncio.TimeoutError:
        raise APIError(408, f"the body did not arrive within {PATIENCE:.0f} seconds") from None


async def _refused(request, error):
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _bad_input(request, error):
    return await _refused(request, APIError(400, str(error)))


async def _http_error(request, error):
    path = request.url.path[:80]
    hint = "" if path.startswith("/v1/") else "; the interface for programs begins with /v1/"
    words = {404: f"there is no {path} here{hint}", 405: f"{request.method[:20]} is not allowed here"}
    return JSONResponse(APIError(error.status_code, words.get(error.status_code, error.detail)).body(),
                        error.status_code, error.headers)


async def _failure(request, error):
    log(f"a request failed: {describe_failure(error)}")
    return await _refused(request, FAILURES["failure"])
