"""The HTTP interface: OpenAI's paths, the page, health and metrics."""

import asyncio
import json
import pathlib
import secrets
import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from telechat.data.answer_stream import AnswerParts, AnswerStream
from telechat.errors import InputError
from telechat.serving.access import AccessMiddleware, page_headers
from telechat.serving.answer_message import deltas, finish_reason, message, together
from telechat.serving.answer_text import AnswerText
from telechat.serving.api_error import APIError
from telechat.serving.log import describe_failure, log
from telechat.serving.logprobs import chat_logprobs, completion_logprobs
from telechat.serving.protocol import parse_body, read_chat, read_completion
from telechat.serving.service import Choice

LARGEST_BODY = 1 << 20  # bytes
PATIENCE = 30.0  # seconds that a client may take to send a body
GONE = 499  # the status, of nginx's making, that metrics count a request under whose client went away


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
        answer = _Answer(ask, self.model, self.service)
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


class _Answer:
    """One accepted request and its choices."""

    def __init__(self, ask, model, service):
        self.ask = ask
        self.model = model
        self.service = service
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12)
        self.kind = "chat.completion" if ask.chat else "text_completion"
        self.created = int(time.time())
        self.events = asyncio.Queue()
        self.choices = [
            Choice(prompt, ask.params, place * ask.n + number, self._answer_text(), self.events, model.adapter_of(ask.model))
            for place, prompt in enumerate(ask.prompts) for number in range(ask.n)]
        service.submit(self.choices)
        service.metrics.tokens("prompt", sum(map(len, ask.prompts)))

    def _answer_text(self):
        settings, stream = self.model.settings, None
        if self.ask.chat and settings.chat_format.template is not None:
            stream = AnswerStream(settings.tokenizer, settings.chat_format.template, self.ask.thinking, self.ask.tools)
        return AnswerText(settings.tokenizer, self.ask.stops, stream)

    async def whole(self, receive):
        """The response in one piece; a client that goes away frees its places."""
        collected = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=GONE)  # nobody reads it
            texts, reasons, chances, parts = collected.result()
        finally:
            collected.cancel()
            gone.cancel()
            self.service.cancel(self.choices)
        choices = []
        for choice in self.choices:
            text = texts[choice.index]
            content = {"text": text}
            if self.ask.chat:
                content = {"message": {"role": "assistant", **message(text, parts[choice.index])}}
            choices.append({"index": choice.index, **content,
                            "finish_reason": finish_reason(reasons[choice.index], parts[choice.index]),
                            "logprobs": self._logprobs(chances[choice.index])})
        return JSONResponse({**self._head(self.kind), "choices": choices, "usage": self._usage()})

    async def _collect(self):
        texts = {choice.index: "" for choice in self.choices}
        chances = {choice.index: [] for choice in self.choices}
        parts = {choice.index: AnswerParts() for choice in self.choices}
        reasons = {}
        while len(reasons) < len(texts):
            choice, text, reason, more, part = await self.events.get()
            texts[choice.index] += text
            chances[choice.index] += more
            parts[choice.index] = together(parts[choice.index], part)
            if reason in _FAILURES:
                raise _FAILURES[reason]
            if reason is not None:
                reasons[choice.index] = reason
        return texts, reasons, chances, parts

    def _logprobs(self, chances):
        if self.ask.params.logprobs is None:
            return None
        return chat_logprobs(chances) if self.ask.chat else completion_logprobs(chances)

    async def stream(self):
        """Server-sent events."""
        kind = "chat.completion.chunk" if self.ask.chat else self.kind
        head = self._head(kind)
        if self.ask.include_usage:
            head["usage"] = None
        open_choices = len(self.choices)
        parts = {choice.index: AnswerParts() for choice in self.choices}
        try:
            if self.ask.chat:
                for choice in self.choices:
                    yield self._piece(head, choice, {"role": "assistant", "content": ""})
            while open_choices:
                pieces = []
                for event in await self._next_events():
                    if event.reason in _FAILURES:
                        yield "".join([*pieces, _event(_FAILURES[event.reason].body())])
                        return
                    pieces += self._pieces(head, event, parts)
                    open_choices -= event.reason is not None
                if pieces:
                    yield "".join(pieces)
            if self.ask.include_usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.service.cancel(self.choices)

    async def _next_events(self):
        """All that is there, once something is: what came while the client was written to goes in one write.

        A client that has gone away is known after one write to it, and asyncio complains about more of them.
        """
        events = [await self.events.get()]
        while not self.events.empty():
            events.append(self.events.get_nowait())
        return events

    def _pieces(self, head, event, parts):
        """What an `Event` is in a stream; ``parts`` are the `AnswerParts` of each choice so far."""
        choice, text, reason, chances, part = event
        for delta in deltas(part, len(parts[choice.index].calls)):
            yield self._piece(head, choice, delta)
        parts[choice.index] = together(parts[choice.index], part)
        if text or chances:
            yield self._piece(head, choice, {"content": text}, logprobs=self._logprobs(chances))
        if reason is not None:
            yield self._piece(head, choice, {}, finish_reason(reason, parts[choice.index]))

    def _piece(self, head, choice, delta, reason=None, logprobs=None):
        content = {"delta": delta} if self.ask.chat else {"text": delta.get("content", "")}
        return _event({**head, "choices": [{"index": choice.index, **content, "finish_reason": reason,
                                            "logprobs": logprobs}]})

    def _head(self, kind):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}

    def _usage(self):
        prompt = sum(map(len, self.ask.prompts))
        completion = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_FAILURES = {"timeout": APIError(504, "the answer took longer than this server's time limit", code="timeout"),
             "error": APIError(500, "this answer failed, and no other one; the server's operator finds the reason in its "
                                    "output", code="answer_failed"),
             "failure": APIError(500, "the server failed; its operator finds the reason in its output", code="failure")}


# What JSON may hold as it is, and clients that cut a stream into lines as Python's str.splitlines does break at.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def _event(value):
    return f"data: {json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS)}\n\n"


class _EventStream(StreamingResponse):
    """A stream that frees its places however it ends."""

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A generator that was never begun, or is cut off between two pieces, ends here.
            await self.body_iterator.aclose()


async def _until_gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


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
    return await _refused(request, _FAILURES["failure"])
