"""The connections of a server: as many as there are file descriptors for, idle ones closed to make room for new ones.

asyncio's own listener, when descriptors run out, tries again two thousand times and logs a traceback each time.
"""

import asyncio
import os
import resource

from telechat.errors import InputError
from telechat.serving.log import describe_failure, log

MOST_CONNECTIONS = 16384
SPARE_DESCRIPTORS = 8  # for files that are opened later
FEWEST_CONNECTIONS = 4
BACKLOG = 1024  # connections that the system keeps for us until they are taken
AT_ONCE = 64  # taken before others have their turn
PAUSE = 0.5  # seconds after a connection could not be taken


def connection_limit():
    """How many connections the soft limit of file descriptors (``ulimit -n``) leaves room for.

    Raises:
        InputError: next to none.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    limit = min(MOST_CONNECTIONS, soft - used - SPARE_DESCRIPTORS)
    if limit < FEWEST_CONNECTIONS:
        raise InputError(f"ulimit -n {soft} leaves no file descriptors for connections; raise it to "
                         f"{used + SPARE_DESCRIPTORS + 64} or more")
    return limit


class Connections:
    """Takes the connections of a listening socket, in an event loop's thread.

    A protocol calls `closed` when its connection is, and `is_idle` or `is_busy` as it begins and ends to answer.

    Args:
        listener (socket.socket): bound.
        limit (int): most connections at a time.
    """

    def __init__(self, listener, limit):
        self.limit = limit
        self.count = 0
        self._listener = listener
        self._idle = {}  # protocols without a request, the one that is so for longest first
        self._loop = self._make = self._retry = None
        self._listening = False

    def start(self, make):
        """Listen; ``make()`` gives a connection's protocol."""
        self._loop, self._make = asyncio.get_running_loop(), make
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._resume()

    def stop(self):
        """Take no more."""
        self._pause()
        self._listener.close()
        self._make = None

    def is_idle(self, protocol):
        """There is no request under way."""
        self._idle.setdefault(protocol)

    def is_busy(self, protocol):
        """There is one now."""
        self._idle.pop(protocol, None)

    def closed(self, protocol):
        """The connection is gone."""
        self._idle.pop(protocol, None)
        self._gone()

    def _gone(self):
        self.count -= 1
        self._resume()

    def _resume(self):
        if self._make is not None and not self._listening and self._retry is None:
            self._listening = True
            self._loop.add_reader(self._listener.fileno(), self._take)

    def _pause(self):
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._listener.fileno())
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _take(self):
        for _ in range(AT_ONCE):
            if self.count >= self.limit:
                # Until one is gone; the one that has been idle for longest goes now.
                self._pause()
                for protocol in self._idle:
                    protocol.transport.abort()
                    del self._idle[protocol]
                    break
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log(f"a connection could not be taken: {describe_failure(error)}")
                self._pause()
                self._retry = self._loop.call_later(PAUSE, self._try_again)
                return
            self.count += 1
            connection.setblocking(False)
            self._loop.create_task(self._connect(connection))

    def _try_again(self):
        self._retry = None
        self._resume()

    async def _connect(self, connection):
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except Exception as error:  # it was closed meanwhile, or there is no memory for it
            log(f"a connection was lost: {describe_failure(error)}")
            connection.close()
            self._gone()
