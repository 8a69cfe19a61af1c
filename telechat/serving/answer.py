"""What an accepted request is answered with: one response or a stream of server-sent events."""

import asyncio
import json
import secrets
import time

from starlette.responses import JSONResponse, Response

from telechat.data.answer_stream import AnswerParts, AnswerStream
from telechat.serving.answer_message import deltas, finish_reason, message, together
from telechat.serving.answer_text import AnswerText
from telechat.serving.api_error import APIError
from telechat.serving.logprobs import chat_logprobs, completion_logprobs
from telechat.serving.service import Choice

GONE = 499  # the status, of nginx's making, that metrics count a request under whose client went away
FAILURES = {"timeout": APIError(504, "the answer took longer than this server's time limit", code="timeout"),
            "error": APIError(500, "this answer failed, and no other one; the server's operator finds the reason in its "
                                   "output", code="answer_failed"),
            "failure": APIError(500, "the server failed; its operator finds the reason in its output", code="failure")}


class Answer:
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
            if reason in FAILURES:
                raise FAILURES[reason]
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
                    if event.reason in FAILURES:
                        yield "".join([*pieces, server_sent_event(FAILURES[event.reason].body())])
                        return
                    pieces += self._pieces(head, event, parts)
                    open_choices -= event.reason is not None
                if pieces:
                    yield "".join(pieces)
            if self.ask.include_usage:
                yield server_sent_event({**head, "choices": [], "usage": self._usage()})
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
        return server_sent_event({**head, "choices": [{"index": choice.index, **content, "finish_reason": reason,
                                                       "logprobs": logprobs}]})

    def _head(self, kind):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}

    def _usage(self):
        prompt = sum(map(len, self.ask.prompts))
        completion = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# What JSON may hold as it is, and clients that cut a stream into lines as Python's str.splitlines does break at.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def server_sent_event(value):
    """What JSON can say, as one event of a stream (str)."""
    return f"data: {json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS)}\n\n"


async def _until_gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass
