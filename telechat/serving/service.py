"""The loop that answers: sequences wait in a queue, are added to the running batch between tokens, and leave it.

HTTP lives in a thread of its own and hands sequences over by `submit`; the loop runs in the main thread.
Under msrun each process runs the loop. The first one decides who is added and removed before every token and
shares the decision; sampling is the same everywhere, so all processes hold the same batch.
"""

import collections
import dataclasses
import itertools
import threading
import time
import typing

from telechat.data.answer_stream import AnswerParts
from telechat.generation.batch import Batch
from telechat.generation.sampling import SamplingParams
from telechat.parallel.collectives import gather_objects
from telechat.serving.answer_text import AnswerText
from telechat.serving.log import describe_failure, log
from telechat.serving.api_error import APIError

HEARTBEAT = 5.0  # seconds after which an idle loop says so to the other processes, which wait in a collective
GLANCE = 0.2  # seconds between an idle loop's looks at the stop flag
IDLE = 1.0  # seconds without a sequence after which a batch size is compiled that was not needed yet


@dataclasses.dataclass
class Choice:
    """One sequence to be answered, with who hears of it."""

    prompt: list  # token ids
    params: SamplingParams
    index: int  # among its request's choices
    text: AnswerText
    listener: object  # its `put_nowait` gets each `Event` in the HTTP thread
    adapter: str = None  # of the engine's, by name
    arrived: float = 0.0  # time.monotonic()
    deadline: float = 0.0
    key: int = -1
    tokens: int = 0  # of the answer so far


class Event(typing.NamedTuple):
    """What a choice's listener hears: text that is final, and why the answer ended, if it did.

    Reasons: "stop", "length", "timeout" (the time limit), "error" (something failed in this answer alone), "failure"
    (the server fails).
    """

    choice: Choice
    text: str
    reason: str = None
    chances: list = ()  # `TokenChance` of tokens, where the request asks for log-probabilities
    parts: AnswerParts = AnswerParts()  # a thought, calls of tools


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What happens before the next token."""

    remove: tuple = ()  # keys
    add: tuple = ()  # (key, prompt, params, index, adapter)
    compile: int = None  # a batch size, while the batch is empty
    over: bool = False


class Service:
    """Answers sequences with one engine.

    Whatever fails in one sequence (its tokens, its text, its client) ends that one alone; what fails in the
    device or in another process ends the service.

    Args:
        engine (Engine): slots reserved.
        world (Group): the processes that share the model.
        metrics (Metrics): counts.
        queue_limit (int): most sequences that wait.
        time_limit (float): seconds that an answer may take, waiting included.
        prefill_chunk (int): most tokens of prompts that are read between two tokens of the answers; None: whole prompts.
        speculate (int): how many tokens of an answer are guessed ahead at most.

    Attributes:
        stopping (bool): set it to end: what was accepted is answered, nothing new is taken.
        over (bool): whether the loop has ended, all answers handed over.
        deliver (callable): takes a list of `Event`; called in the loop's thread.
    """

    def __init__(self, engine, world, metrics, queue_limit=64, time_limit=600.0, prefill_chunk=None, speculate=0):
        self.engine = engine
        self.world = world
        self.metrics = metrics
        self.queue_limit = queue_limit
        self.time_limit = time_limit
        self.stopping = self.over = False
        self.deliver = lambda events: None
        self._batch = Batch(engine, prefill_chunk, speculate)
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

    @property
    def deserted(self):
        """Whether nobody waits for any answer."""
        with self._news:
            return not self._waiting and self._leaving.issuperset(self._running)

    def submit(self, choices):
        """Queue the sequences of one request, all or none.

        Raises:
            APIError: 429 where they do not fit into the queue now, 400 where they never will, 503 while the
                server is stopping.
        """
        most = self.queue_limit + self.engine.slots
        if len(choices) > most:
            raise APIError(400, f"{len(choices)} answers in one request are more than the {most} that this server "
                               "takes at a time", "n")
        with self._news:
            if self.stopping:
                raise APIError(503, "the server is stopping", code="stopping")
            # What the batch has room for is added before the next token, and does not wait.
            room = self.queue_limit + max(self.engine.slots - len(self._running), 0) - len(self._waiting)
            if len(choices) > room:
                raise APIError(429, f"{len(self._waiting)} requests are waiting, which is as many as this server lets; "
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
        self.engine.warm_up(longest)

    def compile(self, size):
        """Compile decoding for a batch of ``size``; the batch must be empty."""
        self.engine.compile(size)

    def run(self):
        """Answer until ``stopping`` is set and everything accepted has been answered."""
        try:
            while True:
                plan = gather_objects(self._plan() if self.world.rank == 0 else None, self.world)[0]
                if plan.over:
                    self.over = True
                    return
                if plan.compile is not None:
                    self.compile(plan.compile)
                for key in plan.remove:
                    self._batch.remove(key)
                for sequence in plan.add:
                    self._batch.add(*sequence)
                self._emit(self._batch.prefill())
                begin = time.monotonic()
                steps = self._batch.decode()
                if steps:
                    self.metrics.observe("batch_size", len({step.key for step in steps}))
                    self.metrics.observe("decode_seconds", time.monotonic() - begin)
                self._emit(steps)
                self.metrics.cache(self.engine, self._batch)
        except BaseException:
            self.stopping = True
            with self._news:
                self._tell([Event(choice, "", "failure") for choice in [*self._running.values(), *self._waiting]])
            raise

    def _plan(self):
        """Who is removed and who is added now; waits while there is nothing to do."""
        uncompiled = self.engine.uncompiled
        quiet_until = time.monotonic() + (IDLE if uncompiled else HEARTBEAT)
        with self._news:
            while not (self._waiting or self._running or self.stopping) and time.monotonic() < quiet_until:
                self._news.wait(GLANCE)
            self._expire()
            remove, self._leaving = tuple(self._leaving), set()
            for key in remove:
                self._running.pop(key, None)
            add = []
            while self._waiting and len(self._running) < self.engine.slots:
                choice = self._waiting.popleft()
                self._running[choice.key] = choice
                add.append((choice.key, choice.prompt, choice.params, choice.index, choice.adapter))
            idle = not self._running and not remove
            return _Plan(remove, tuple(add), uncompiled[0] if uncompiled and idle and not self.stopping else None,
                         self.stopping and idle)

    def _expire(self):
        now = time.monotonic()
        late = [choice for choice in [*self._running.values(), *self._waiting]
                if choice.deadline <= now or self._hurried]
        if late:
            keys = {choice.key for choice in late}
            self._waiting = collections.deque(choice for choice in self._waiting if choice.key not in keys)
            self._leaving |= keys & set(self._running)
            self._tell([Event(choice, "", "timeout") for choice in late])

    def _tell(self, events):
        try:
            self.deliver(events)
        except Exception as error:  # of a client; nobody else shall notice
            log(f"answers could not be delivered: {describe_failure(error)}")

    def _emit(self, steps):
        """Turn tokens into text for those who wait for it; the first process's work."""
        if self.world.rank:
            return
        events, count = [], 0
        with self._news:
            for step in steps:
                choice = self._running.get(step.key)
                if choice is None or step.key in self._leaving:
                    continue
                # As they come: those of an answer that is given up on the way were computed too.
                count += step.token is not None
                try:
                    event = self._event(choice, step)
                except Exception as error:
                    log(f"an answer failed: {describe_failure(error)}")
                    event = Event(choice, "", "error")
                if event.reason is not None:
                    if step.reason is None:  # the batch does not know that it has ended
                        self._leaving.add(step.key)
                    else:
                        del self._running[step.key]
                    self.metrics.observe("request_seconds", time.monotonic() - choice.arrived)
                events.append(event)
        self.metrics.tokens("completion", count)
        self._tell(events)

    def _event(self, choice, step):
        """What a `Step` of the batch is to the choice's listener; raises what failed."""
        if step.error is not None:
            raise step.error
        if choice.tokens == 0:
            self.metrics.observe("time_to_first_token_seconds", time.monotonic() - choice.arrived)
        text, reason = "", step.reason
        if step.token is not None:
            choice.tokens += 1
            text = choice.text.put(step.token, step.logprobs)
        if reason is not None or choice.text.stopped:
            text += choice.text.end()
            reason = "stop" if choice.text.stopped else reason
        parts = choice.text.take_parts()
        return Event(choice, text, reason, choice.text.take_chances(reason is not None), parts)
