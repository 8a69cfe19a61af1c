"""uvicorn in a thread of its own: the main thread belongs to the engine."""

import asyncio
import json
import logging
import socket
import threading
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from telechat.errors import InputError
from telechat.serving.api_error import APIError
from telechat.serving.connections import Connections, connection_limit
from telechat.serving.log import log

HEAD_SECONDS = 15.0  # that a client may take to send a request's head
TAKE_SECONDS = 30.0  # that a client may leave what was sent to it untaken
SEND_BUFFER = 1 << 16  # bytes that the system takes for a client that does not; it would take megabytes by itself


class _Protocol(H11Protocol):
    """Ends connections whose client sends no head or takes no answer, both of which uvicorn waits for for ever."""

    _timer = _sending = None
    _untaken = 0  # bytes, when `_sending` was set

    def __init__(self, held, **arguments):
        super().__init__(**arguments)
        self._held = held  # Connections

    def connection_made(self, transport):
        # Writing pauses while anything is left to send, so that until it is resumed what is left only shrinks.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._watch()

    def pause_writing(self):
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self):
        self._sending.cancel()
        super().resume_writing()

    def _watch_sending(self):
        self._untaken = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(TAKE_SECONDS, self._give_up_sending)

    def _give_up_sending(self):
        if self.transport.get_write_buffer_size() < self._untaken:
            self._watch_sending()  # slow, but it goes on
        else:
            self.transport.abort()  # close() would wait until all is sent

    def data_received(self, data):
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg):
        """What is no HTTP is refused in OpenAI's form; uvicorn's own is plain text, and fails where an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(APIError(400, "this is not an HTTP request that can be read").body()).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body),
                          h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def on_response_complete(self):
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc):
        self._held.closed(self)
        for timer in (self._timer, self._sending):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def _watch(self):
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing():
            return
        if answering:
            self._held.is_busy(self)
        else:
            self._held.is_idle(self)
        if answering and self._timer:
            self._timer.cancel()
            self._timer = None
        elif not answering and not self._timer:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self):
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    """Has its connections from `Connections`."""

    def __init__(self, config, connections):
        super().__init__(config)
        self._connections = connections
        self.listens = False  # `started` is true before that

    async def startup(self, sockets=None):
        asyncio.get_running_loop().set_exception_handler(_report)
        logger = logging.getLogger("asyncio")
        logger.handlers, logger.propagate = [_Lines()], False
        await super().startup(sockets=[])
        self._connections.start(lambda: _Protocol(self._connections, config=self.config, server_state=self.server_state,
                                                  app_state=self.lifespan.state))
        self.listens = True

    async def shutdown(self, sockets=None):
        self._connections.stop()
        await super().shutdown()


class _Lines(logging.Handler):
    """Brings what asyncio says to `log`."""

    def emit(self, record):
        log(f"{record.name}: {record.getMessage()}")


def _report(loop, context):
    """A line where asyncio would print a traceback."""
    error = context.get("exception")
    log(f"{context['message']}{'' if error is None else f': {type(error).__name__}: {error}'}")


class HttpServer:
    """Binds at once, answers between `start` and `stop`.

    Args:
        host (str), port (int): where to listen; port 0 takes a free one.

    Raises:
        InputError: the address cannot be bound, or there are no file descriptors for connections.
    """

    def __init__(self, host, port):
        connection_limit()
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                          flags=socket.AI_PASSIVE)[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
            self._socket.bind(address)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--host {host} --port {port}: {reason}; give another address or port") from None
        self.port = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._server = self._thread = None

    def start(self, app):
        """Serve an ASGI application in a daemon thread; returns when connections are taken."""
        config = uvicorn.Config(app, http=_Protocol, ws="none", lifespan="off", log_level="critical", access_log=False,
                                server_header=False, timeout_keep_alive=HEAD_SECONDS, timeout_graceful_shutdown=10)
        self._server = _Server(config, Connections(self._socket, connection_limit()))
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self._server.listens:
            time.sleep(0.01)

    def stop(self):
        """Stop listening and return when the answers that are under way have been sent."""
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(15)
        self._socket.close()
