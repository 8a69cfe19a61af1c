"""A server as it is used, for half an hour (make soak-serve): nothing is lost or mixed up, memory and descriptors stay.

Sixteen clients come at random with short and long requests to the base model and two adapters, some with two answers, stop
strings or log-probabilities; some read slowly, some go away in between, and the cache holds a third of what eight of the longest
sequences need.
"""

import collections
import dataclasses
import http.client
import json
import random
import re
import socket
import threading
import time
import urllib.parse

import psutil
import pytest

from telechat import Generator, SamplingParams, TeleChat, TeleChatConfig, Tokenizer
from telechat.generation.memory import cache_bytes
from tests.adapter_files import write_adapter
from tests.conftest import save_small_model
from tests.serving.conftest import start
from tests.serving.test_server import STOP, wait_until

MAX_BATCH, MAX_LENGTH = 8, 512
CLIENTS = 16
ADAPTERS = ("one", "two")
WAYS = {"streamed": 5, "whole": 3, "slowly": 2, "given up": 2}  # how an answer is taken, and how often
FLAT = 1.02  # times the most memory that was resident in the first fifth


@dataclasses.dataclass(frozen=True)
class Request:
    """One of those that are asked over and over; ``answers`` are the texts that it gets alone."""

    model: str
    prompt: list
    params: SamplingParams
    stop: str  # or None
    logprobs: int  # or None
    answers: list

    @property
    def body(self):
        params = self.params
        return {"model": self.model, "prompt": self.prompt, "max_tokens": params.max_new_tokens, "n": len(self.answers),
                "temperature": params.temperature, "seed": params.seed, "stop": self.stop, "logprobs": self.logprobs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and two adapters."""
    folder = tmp_path_factory.mktemp("soak")
    save_small_model(folder / "base", training_seqlen=MAX_LENGTH)
    config = TeleChatConfig.from_pretrained(folder / "base")
    for number, name in enumerate(ADAPTERS):
        write_adapter(folder / name, config, 2 + number, seed=number, size=0.3)
    return folder


def make_requests(folder):
    """Short and long prompts and answers in all combinations, half of each with a common beginning, half greedy.

    Some prompts end with a block of the cache, one leaves room for a single token; of every five requests one has two answers,
    one a stop string, and one log-probabilities.
    """
    rng, tokenizer, requests = random.Random(5), Tokenizer.from_pretrained(folder / "base"), []
    system = [rng.randrange(300, 1600) for _ in range(90)]
    for model in ("base", *ADAPTERS):
        lora = None if model == "base" else folder / model
        generator = Generator(TeleChat.from_pretrained(folder / "base", lora=lora), MAX_LENGTH)
        for number in range(20):
            long_prompt, long_answer, shared, greedy = (number >> bit & 1 for bit in range(4))
            own = [rng.randrange(300, 1600) for _ in range(rng.randint(120, 220) if long_prompt else rng.randint(2, 30))]
            if number >= 16:
                length = (16, 32, 256, MAX_LENGTH - 1)[number - 16]
                own = [rng.randrange(300, 1600) for _ in range(length - 2)]
            prompt = [20, *(system if shared and number < 16 else []), *own, 21]
            count = rng.randint(100, 200) if long_answer else rng.randint(1, 16)
            params = SamplingParams(min(count, MAX_LENGTH - len(prompt)), stop_ids=STOP, temperature=float(not greedy),
                                    seed=number)
            tokens = generator.generate([prompt] * (1 + (number % 5 == 0)), params)
            texts, stop = [tokenizer.decode(ids, skip_control_tokens=True) for ids in tokens], None
            if number % 5 == 1:
                stop = next((text for text in re.findall("[^\ufffd]{3}", texts[0][len(texts[0]) // 2:])), "never there")
            requests.append(Request(model, prompt, params, stop, 2 if number % 5 == 2 else None,
                                    [text if stop is None else text.partition(stop)[0] for text in texts]))
    assert len({tuple(request.answers) for request in requests}) > 50
    assert sum(request.stop not in (None, "never there") for request in requests) > 4
    return requests


class Clients:
    """Threads that ask until ``end`` (of time.monotonic).

    Attributes:
        counts (Counter): how many answers were taken in each of `WAYS`.
        faults (list of str): what was not as it is alone.
    """

    def __init__(self, url, requests, end):
        self.address = urllib.parse.urlparse(url)
        self.requests = requests
        self.end = end
        self.counts, self.faults = collections.Counter(), []
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _run(self, number):
        rng = random.Random(number)
        while time.monotonic() < self.end and not self.faults:
            time.sleep(rng.expovariate(8))
            request, way = rng.choice(self.requests), rng.choices(list(WAYS), WAYS.values())[0]
            try:
                answer = self._ask(request, way, rng)
            except Exception as error:
                self.faults.append(f"{way}, {request.body}: {error!r}")
                return
            if answer is not None and answer != request.answers:
                self.faults.append(f"{way}, {request.body}: {answer!r} instead of {request.answers!r}")
            self.counts[way] += 1

    def _ask(self, request, way, rng):
        """The texts of an answer's choices, or None where it is given up."""
        connection = http.client.HTTPConnection(self.address.netloc, timeout=300)
        connection.sock = socket.socket()
        if way == "slowly":  # the little that the system takes ahead is soon full
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sock.settimeout(300)
        connection.sock.connect((self.address.hostname, self.address.port))
        try:
            connection.request("POST", "/v1/completions", json.dumps({**request.body, "stream": way != "whole"}),
                               {"Content-Type": "application/json"})
            if way == "given up" and rng.random() < 0.3:
                return None  # before anything has come
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read()}")
            if way == "whole":
                return [choice["text"] for choice in json.loads(response.read())["choices"]]
            return self._read(response, [""] * len(request.answers), way, rng)
        finally:
            connection.close()

    def _read(self, response, texts, way, rng):
        events = rng.randint(1, 60)
        for line in response:
            line = line.strip().removeprefix(b"data: ")
            if line == b"[DONE]":
                return texts
            if line:
                for choice in json.loads(line)["choices"]:
                    texts[choice["index"]] += choice["text"]
                events -= 1
            if way == "slowly":
                time.sleep(rng.uniform(0, 0.05))
            elif way == "given up" and events <= 0:
                return None
        raise RuntimeError("the stream ended without [DONE]")


def metrics(url):
    """{name with labels: value} of /metrics."""
    address = urllib.parse.urlparse(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    connection.request("GET", "/metrics", headers={"Connection": "close"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def soak(folder, minutes):
    """Ask for so long; the most memory of the first fifth and of the rest, bytes, every half a second."""
    requests = make_requests(folder)
    config = TeleChatConfig.from_pretrained(folder / "base")
    cache = cache_bytes(config, 1, MAX_BATCH * MAX_LENGTH // 3 + 1, 4)
    running, _ = start(folder / "base", *(flag for name in ADAPTERS for flag in ("--lora", f"{name}={folder / name}")),
                       "--max_batch", MAX_BATCH, "--max_length", MAX_LENGTH, "--cache_memory", f"{cache / 1e6:.6f}MB")
    try:
        process = psutil.Process(running.process.pid)
        metrics(running.url)  # what a first request opens
        descriptors = process.num_fds()
        begin = time.monotonic()
        clients = Clients(running.url, requests, begin + 60 * minutes)
        memory = []
        while any(thread.is_alive() for thread in clients.threads):
            memory.append((time.monotonic() - begin, process.memory_info().rss))
            time.sleep(0.5)
        assert not clients.faults, clients.faults[:3]
        wait_until(lambda: metrics(running.url)["telechat_running_sequences"] == 0)
        wait_until(lambda: process.num_fds() <= descriptors)
        found = metrics(running.url)
        early, late = (max(size for when, size in memory if (when < 12 * minutes) == first) for first in (True, False))
        print(f"\n{minutes:g} minutes: {sum(clients.counts.values())} requests ({dict(clients.counts)}), "
              f"{found['telechat_completion_tokens_total']:.0f} tokens; {found['telechat_preemptions_total']:.0f} sequences put "
              f"back, {found['telechat_prefix_cache_hit_tokens_total']:.0f} tokens of prompts shared, "
              f"{found['telechat_prefilled_tokens_total']:.0f} computed, "
              f"{found['telechat_prefix_cache_evictions_total']:.0f} blocks given up; memory at most {early / 1e6:.1f} MB in "
              f"the first fifth and {late / 1e6:.1f} MB later; {descriptors} descriptors before and after")
    finally:
        status, output = running.stop()
    assert (status, output.strip()) == (0, "stopped")
    assert set(clients.counts) == set(WAYS)
    statuses = {re.search(r'status="(\d+)"', name)[1] for name in found if name.startswith("telechat_requests_total")}
    assert statuses <= {"200", "499"}, statuses  # 499: of a client that went away
    assert found["telechat_waiting_sequences"] == 0
    assert found["telechat_cache_blocks_free"] == found["telechat_cache_blocks"]
    for name in ("preemptions", "prefix_cache_hit_tokens", "prefix_cache_evictions"):
        assert found[f"telechat_{name}_total"] > 0, name
    return early, late


@pytest.mark.soak_serve
def test_half_an_hour(folder, request):
    early, late = soak(folder, request.config.getoption("--soak_minutes"))
    assert late <= FLAT * early


@pytest.mark.wide
def test_half_a_minute(folder):
    soak(folder, 0.5)
