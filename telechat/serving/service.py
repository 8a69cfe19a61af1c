"""The loop that answers: sequences wait in a queue, join the running batch between tokens, and leave it.

HTTP lives in a thread of its own and hands sequences over by `submit`; the loop runs in the main thread.
Under msrun each process runs the loop. The first one decides who joins and leaves before every token and
shares the decision; sampling is the same everywhere, so all processes hold the same batch.
"""

import collections
import dataclasses
import itertools
import threading
import time

from telechat.generation.batch import Batch
from telechat.generation.engine import SMALLEST_PREFILL
from telechat.generation.sampling import SamplingParams
from telechat.parallel.collectives import gather_objects
from telechat.serving.answer_text import AnswerText
from telechat.serving.refusal import Refusal

HEARTBEAT = 5.0  # seconds after which an idle loop says so to the other processes, which wait in a collective
GLANCE = 0.2  # seconds between an idle loop's looks at the stop flag


@dataclasses.dataclass
class Choice:
    """One sequence to be answered, with who hears of it."""

    prompt: list  # token ids
    params: SamplingParams
    index: int  # among its request's choices
    text: AnswerText
    listener: object  # its `put_nowait` gets (choice, text, reason) in the HTTP thread
    arrived: float = 0.0  # time.monotonic()
    deadline: float = 0.0
    key: int = -1
    tokens: int = 0  # of the answer so far


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What happens before the next token."""

    leave: tuple = ()  # keys
    join: tuple = ()  # (key, prompt, params, index)
    over: bool = False


class Service:
    """Answers sequences with one engine.

    Reasons that an answer ends for: "stop", "length", "timeout" (the time limit), "failure".

    Args:
        engine (Engine): slots reserved.
        world (Group): the processes that share the model.
        metrics (Metrics): counts.
        queue_limit (int): most sequences that wait.
        time_limit (float): seconds that an answer may take, waiting included.

    Attributes:
        stopping (bool): set it to end: what was accepted is answered, nothing new is taken.
        deliver (callable): takes a list of (choice, text, reason); called in the loop's thread.
    """

    def __init__(self, engine, world, metrics, queue_limit=64, time_limit=600.0):
        self.engine = engine
        self.world = world
        self.metrics = metrics
        self.queue_limit = queue_limit
        self.time_limit = time_limit
        self.stopping = False
        self.deliver = lambda events: None
        self._batch = Batch(engine)
        self._news = threading.Condition()  # guards the three below
        self._waiting = collections.deque()
        self._leaving = set()  # keys
        self._running = {}  # key → Choice, on the first process only
        self._keys = itertools.count()
        self._hurried = False

    @property
    def waiting(self):
        """How many sequences wait."""
        return len(self._waiting)

    @property
    def running(self):
        """How many sequences are being answered."""
        return len(self._running)

    def submit(self, choices):
        """Queue the sequences of one request, all or none.

        Raises:
            Refusal: 429 where they do not fit into the queue now, 400 where they never will, 503 while the
                server is stopping.
        """
        most = self.queue_limit + self.engine.slots
        if len(choices) > most:
            raise Refusal(400, f"{len(choices)} answers in one request are more than the {most} that this server "
                               "takes at a time", "n")
        with self._news:
            if self.stopping:
                raise Refusal(503, "the server is stopping", code="stopping")
            # What the batch has room for joins before the next token, and does not wait.
            room = self.queue_limit + max(self.engine.slots - len(self._running), 0) - len(self._waiting)
            if len(choices) > room:
                raise Refusal(429, f"{len(self._waiting)} requests are waiting, which is as many as this server lets; "
                                   "try again later", code="queue_full")
            now = time.monotonic()
            for choice in choices:
                choice.key, choice.arrived, choice.deadline = next(self._keys), now, now + self.time_limit
                self._waiting.append(choice)
            self._news.notify()

    def cancel(self, choices):
        """Forget sequences whose client has gone; what has ended already is no error."""
        keys = {choice.key for choice in choices}
        with self._news:
            self._waiting = collections.deque(choice for choice in self._waiting if choice.key not in keys)
            self._leaving |= keys & set(self._running)

    def hurry(self):
        """End all answers where they are; for a second signal to stop."""
        self.stopping = self._hurried = True

    def warm_up(self, longest=512):
        """Compile what a first request would wait for: decoding, and prompts of up to ``longest`` tokens."""
        size = SMALLEST_PREFILL
        while size <= min(longest, self.engine.length):
            self.engine.prefill([0], [[0] * size])
            size *= 2
        for size in {1, self.engine.slots}:  # what is between follows while nobody waits
            self.compile(size)

    def compile(self, size):
        """Compile decoding for a batch of ``size``; the batch must be empty."""
        self.engine.decode(range(size), [0] * size, [0] * size)

    def run(self):
        """Answer until ``stopping`` is set and everything accepted has been answered."""
        try:
            while True:
                plan = gather_objects(self._plan() if self.world.rank == 0 else None, self.world)[0]
                if plan.over:
                    return
                for key in plan.leave:
                    self._batch.remove(key)
                for sequence in plan.join:
                    self._emit([self._batch.add(*sequence)])
                if len(self._batch):
                    self.metrics.observe("batch_size", len(self._batch))
                    begin = time.monotonic()
                    events = self._batch.decode()
                    self.metrics.observe("decode_seconds", time.monotonic() - begin)
                    self._emit(events)
        except BaseException:
            self.stopping = True
            with self._news:
                self.deliver([(choice, "", "failure") for choice in [*self._running.values(), *self._waiting]])
            raise

    def _plan(self):
        """Who leaves and who joins now; waits while there is nothing to do."""
        quiet_until = time.monotonic() + HEARTBEAT
        with self._news:
            while not (self._waiting or self._running or self.stopping) and time.monotonic() < quiet_until:
                self._news.wait(GLANCE)
            self._expire()
            leave, self._leaving = tuple(self._leaving), set()
            for key in leave:
                self._running.pop(key, None)
            join = []
            while self._waiting and len(self._running) < self.engine.slots:
                choice = self._waiting.popleft()
                self._running[choice.key] = choice
                join.append((choice.key, choice.prompt, choice.params, choice.index))
            return _Plan(leave, tuple(join), self.stopping and not self._running and not leave)

    def _expire(self):
        now = time.monotonic()
        late = [choice for choice in [*self._running.values(), *self._waiting]
                if choice.deadline <= now or self._hurried]
        if late:
            keys = {choice.key for choice in late}
            self._waiting = collections.deque(choice for choice in self._waiting if choice.key not in keys)
            self._leaving |= keys & set(self._running)
            self.deliver([(choice, choice.text.end(), "timeout") for choice in late])

    def _emit(self, events):
        """Turn tokens into text for those who wait for it; the first process's work."""
        if self.world.rank:
            return
        told, count = [], 0
        with self._news:
            for key, token, reason, *_ in events:
                reason = "failure" if reason == "error" else reason
                choice = self._running.get(key)
                if choice is None or key in self._leaving:
                    continue
                if choice.tokens == 0:
                    self.metrics.observe("time_to_first_token_seconds", time.monotonic() - choice.arrived)
                text = ""
                if token is not None:
                    choice.tokens += 1
                    count += 1
                    text = choice.text.put(token)
                    if choice.text.stopped and reason is None:
                        self._leaving.add(key)
                    if choice.text.stopped:
                        reason = "stop"
                if reason is not None:
                    text += choice.text.end()
                    reason = "stop" if choice.text.stopped else reason
                    if key not in self._leaving:
                        del self._running[key]
                    self.metrics.observe("request_seconds", time.monotonic() - choice.arrived)
                told.append((choice, text, reason))
        # As they come: those of an answer that is given up on the way were computed too.
        self.metrics.tokens("completion", count)
        self.deliver(told)
