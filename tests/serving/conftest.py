"""A server of a tiny random model that all tests here share, and an engine whose answers are known."""

import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from telechat import Generator, TeleChat, Tokenizer
from telechat.data.answer_stream import AnswerParts
from telechat.generation.block_table import BlockTable
from telechat.generation.engine import Engine
from telechat.generation.sampling import SamplingParams
from telechat.parallel.mesh import Mesh
from telechat.serving.metrics import Metrics
from telechat.serving.service import Choice, Service
from tests.conftest import ROOT, save_small_model

KEY = "sk-test"
MAX_LENGTH = 1024


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model with the shipped tokenizer; greedy by default."""
    directory = tmp_path_factory.mktemp("serving") / "tiny"
    save_small_model(directory, training_seqlen=2048)
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return Tokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def generator(checkpoint):
    """The library's own answers to the same prompts, one at a time, from a cache as long as the server's."""
    return Generator(TeleChat.from_pretrained(checkpoint), MAX_LENGTH)


@dataclasses.dataclass
class Server:
    """A running tools/serve.py."""

    process: subprocess.Popen
    url: str

    def stop(self):
        """SIGTERM, and its exit status and the rest of its output."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def start(checkpoint, *flags, python=()):
    """Start tools/serve.py on a free port, with ``python``'s own arguments, and wait until it answers."""
    command = [sys.executable, *python, str(ROOT / "tools" / "serve.py"), "--load_checkpoint", str(checkpoint), "--port", "0",
               *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                               env={**os.environ, "GLOG_v": "3"})
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = re.search(r"at (http://\S+)/ ", line)
        if found:
            return Server(process, found[1].replace("0.0.0.0", "127.0.0.1")), "".join(lines)
    process.wait()
    pytest.fail("the server did not start:\n" + "".join(lines), pytrace=False)


@pytest.fixture(scope="session")
def server(checkpoint):
    running, _ = start(checkpoint, "--api_key", KEY, "--max_batch", 4, "--max_queue", 6, "--max_length", MAX_LENGTH)
    yield running
    assert running.stop()[0] == 0


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own client of the shared server."""
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


class TableEngine(Engine):
    """An Engine without a model: the blocks of the cache are handed out as ever, and hold nothing."""

    uncompiled = ()

    def __init__(self, slots, length, blocks=None, block_size=4, reuse=True):
        self.slots = slots
        self._cache = types.SimpleNamespace(table=BlockTable(slots, length, block_size, blocks, reuse))
        self.length = min(length, self.table.pool.count * block_size)
        self._prompts, self._fixed = [0] * slots, float("inf")
        self._adapters, self._adapter_of = None, [None] * slots

    def takes_together(self, counts):
        return True


class CountingEngine(TableEngine):
    """Stands in for an Engine: the most likely token is the one before it plus one."""

    def __init__(self, slots=2, length=32, vocabulary=64, **cache):
        super().__init__(slots, length, **cache)
        self.vocabulary = vocabulary
        self.decodes = 0
        self.fail_at = None

    def prefill(self, slots, prompts, starts=None):
        assert all(0 <= slot < self.slots for slot in slots)
        return np.stack([self._logits(prompt[-1]) for prompt in prompts])

    def decode(self, slots, tokens, positions):
        assert len(set(zip(slots, positions))) == len(tokens) == len(slots) and all(0 <= slot < self.slots for slot in slots)
        self.decodes += 1
        if self.decodes == self.fail_at:
            raise MemoryError("no more")
        return np.stack([self._logits(token) for token in tokens])

    def _logits(self, token):
        logits = np.zeros(self.vocabulary, np.float32)
        logits[(token + 1) % self.vocabulary] = 1
        return logits


@pytest.fixture
def engine():
    return CountingEngine()


class Spelling:
    """Stands in for AnswerText: token 7 is "7 "; stops at a token."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.stopped = False

    def put(self, token, logprobs=None):
        self.stopped = token == self.stop_at
        return "" if self.stopped else f"{token} "

    def end(self):
        return ""

    def take_chances(self, ended=False):
        return []

    def take_parts(self):
        return AnswerParts()


def choice(prompt, count, stop_at=None, **params):
    """A `Choice` of ``count`` tokens at most, whose events its listener, a queue, is put."""
    return Choice(prompt, SamplingParams(count, **params), 0, Spelling(stop_at), queue.Queue())


@pytest.fixture
def service(engine):
    """A `Service` of the engine, run by whoever asks for it."""
    made = Service(engine, Mesh.single().world, Metrics(), queue_limit=3)
    made.deliver = lambda events: [event.choice.listener.put(event) for event in events]
    return made


def finish(service):
    """Run the loop until all is answered."""
    service.stopping = True
    service.run()
