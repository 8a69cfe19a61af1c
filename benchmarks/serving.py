"""The same streamed requests to our server and to others of the same weights, in turns.

    python -m benchmarks.serving                      # beside transformers serve, its continuous batching
    python -m benchmarks.serving --peer llama.cpp     # beside llama-server; make bench-llama-cpp builds it
    python -m benchmarks.serving --quick              # to see that it works

64 requests (/v1/completions, greedy), prompts of 16 to 512 characters of the sample conversations and answers of 16 to 160
tokens, of which 16 are under way at a time: when one is answered the next is sent. Random float32 weights of size S with the
sample tokenizer, so that all know the same tokens; each server gets a cache for 16 sequences of 1,024 tokens. In each round
each server is started anew, answers four other requests that are not counted, and then these. Printed are medians of the
rounds: tokens a second, time to the first token and between two pieces of text of an answer, and peak memory. Answers of
transformers must be the same texts as ours; those of llama.cpp, whose attention rounds otherwise, may take another way where
two tokens are close, and are counted. Ends with status 1 where transformers' are others, or where a goal beside it is missed.
"""

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time

import numpy as np

from benchmarks.measure import ROOT, check_equal
from benchmarks.servers import LLAMA_SERVER, running, sides, write_models
from telechat.data.conversation import read_conversations

REQUESTS, AT_ONCE, LENGTH = 64, 16, 1024
PROMPTS, ANSWERS = (16, 512), (16, 160)  # characters and tokens, shortest and longest
WARMING = 4  # requests
FASTER = 2.0  # the goal beside transformers
FIGURES = {  # what is shown: (unit, its number of a `Round`)
    "tokens a second": ("tokens/s", lambda found: found.speed),
    "first token, p50": ("s", lambda found: np.percentile(found.firsts, 50)),
    "first token, p99": ("s", lambda found: np.percentile(found.firsts, 99)),
    "between tokens, p50": ("ms", lambda found: 1e3 * np.percentile(found.gaps, 50)),
    "between tokens, p99": ("ms", lambda found: 1e3 * np.percentile(found.gaps, 99)),
    "peak memory": ("MB", lambda found: found.memory / 1e6),
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one request."""

    text: str
    prompt_tokens: int
    tokens: int
    first: float  # seconds from the request to the first text
    gaps: list  # seconds between one piece of text and the next


@dataclasses.dataclass(frozen=True)
class Round:
    """All requests once."""

    answers: list
    seconds: float
    memory: int  # bytes

    @property
    def speed(self):
        """Tokens of answers a second."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def firsts(self):
        """Seconds to the first token of each."""
        return [answer.first for answer in self.answers]

    @property
    def gaps(self):
        """Seconds between two tokens, of all."""
        return [gap for answer in self.answers for gap in answer.gaps]


def make_requests(count, seed):
    """[(prompt text, most tokens of the answer), …] of mixed lengths, the same ones for a seed."""
    text = "".join(part for turns in read_conversations(ROOT / "samples" / "conversations.jsonl") for turn in turns for part in turn)
    rng = random.Random(seed)

    def between(bounds):
        return round(bounds[0] * (bounds[1] / bounds[0]) ** rng.random())  # as many short ones as long ones, by halves

    requests = []
    for _ in range(count):
        place = rng.randrange(len(text))
        # Without a digit in front, before which transformers' tokenizer leaves out the leading space: it is a piece of its own.
        prompt = (text + text)[place:place + between(PROMPTS)].strip().lstrip("0123456789")
        requests.append((prompt, between(ANSWERS)))
    return requests


async def ask(server, prompt, max_tokens):
    """`Answer` of one streamed request."""
    body = json.dumps({"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
                       "stream_options": {"include_usage": True}}).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b"transfer-encoding: chunked" not in head.lower():
        raise RuntimeError(f"no stream: {head + await reader.read(1000)}")
    received = []  # (when, bytes): what it means is read when nothing is measured any more
    while size := int(await reader.readuntil(b"\r\n"), 16):
        received.append((time.perf_counter() - began, (await reader.readexactly(size + 2))[:-2]))
    writer.close()
    return _read(received)


def _read(received):
    """`Answer` of a body's parts with their times."""
    text, usage, times, rest = "", None, [], b""
    for when, data in received:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            line = line.strip().removeprefix(b"data: ")
            if not line or line == b"[DONE]":
                continue
            if line.startswith(b'{"error"'):  # which need not be JSON
                raise RuntimeError(f"an answer failed: {line.decode()}")
            event = json.loads(line)
            usage = event.get("usage") or usage
            if event.get("choices") and event["choices"][0].get("text"):
                text += event["choices"][0]["text"]
                times.append(when)
    return Answer(text, usage["prompt_tokens"], usage["completion_tokens"], times[0] if times else received[-1][0],
                  [later - earlier for earlier, later in zip(times, times[1:])])


async def crowd(server, requests, at_once):
    """[`Answer`, …] of requests in their order, so many under way at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(request):
        async with places:
            return await ask(server, *request)

    return await asyncio.gather(*map(one, requests))


def measure(side, requests, at_once, folder):
    """`Round` of a server that is started for it."""
    with running(side, folder) as server:
        asyncio.run(crowd(server, make_requests(WARMING, seed=1), at_once))
        began = time.perf_counter()
        answers = asyncio.run(crowd(server, requests, at_once))
        return Round(answers, time.perf_counter() - began, server.peak_memory())


def check_same(rounds, peer):
    """How many answers of ``peer``, in the round where it is most, are another text or other tokens than ours.

    Raises:
        NumbersDiffer: our own rounds differ, or prompts are not the same tokens to both.
    """
    def answers(found):
        return [(answer.tokens, answer.text.replace("\ufffd", "")) for answer in found.answers]

    first, *others = rounds["telechat"]
    for found in others:
        check_equal("answers of two rounds", answers(found), answers(first))
    for found in rounds[peer]:
        check_equal("tokens of prompts", *([answer.prompt_tokens for answer in side.answers] for side in (first, found)))
    return max(sum(one != two for one, two in zip(answers(first), answers(found))) for found in rounds[peer])


def table(rounds):
    """Lines of Markdown, and {figure: {name of the side: median}}."""
    names = list(rounds)
    lines = [f"| | unit | {' | '.join(names)} | {names[0]} / {names[1]}, median of the rounds |", "|---" * (len(names) + 3) + "|"]
    medians = {}
    for figure, (unit, number) in FIGURES.items():
        found = {name: [number(one) for one in rounds[name]] for name in names}
        ratios = [ours / theirs for ours, theirs in zip(*(found[name] for name in names[:2]))]
        medians[figure] = {name: statistics.median(values) for name, values in found.items()}
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        lines.append(f"| {figure} | {unit} | {' | '.join(f'{medians[figure][name]:,.4g}' for name in names)} | "
                     f"{statistics.median(ratios):.2f}{spread} |")
    return lines, medians


def missed(medians, peer):
    """Sentences on goals that were not reached."""
    found, ratio = [], medians["tokens a second"]["telechat"] / medians["tokens a second"][peer]
    if ratio < FASTER:
        found.append(f"{ratio:.2f} times the tokens a second of {peer}, not {FASTER}")
    for figure in ("first token, p99", "between tokens, p99"):
        if medians[figure]["telechat"] >= medians[figure][peer]:
            found.append(f"{figure}: {medians[figure]['telechat']:.4g}, not below {medians[figure][peer]:.4g}")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("transformers", "llama.cpp"), default="transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=("S", "M"), default="S", help="of the model")
    parser.add_argument("--quick", action="store_true", help="16 requests, one round, no goals")
    parser.add_argument("--scratch", type=pathlib.Path, help="a folder for weights and logs, which stay there")
    arguments = parser.parse_args(argv)
    if arguments.peer == "llama.cpp" and not LLAMA_SERVER.exists():
        parser.error(f"{LLAMA_SERVER.relative_to(ROOT)} is not there; make bench-llama-cpp builds it")
    if arguments.peer == "transformers" and importlib.util.find_spec("fastapi") is None:
        parser.error("transformers serve needs more packages; pip install 'transformers[serving]'")
    requests = make_requests(AT_ONCE if arguments.quick else REQUESTS, seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.scratch or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = write_models(folder, arguments.size)
        names = ("telechat", arguments.peer)
        chosen, rounds = sides(models, AT_ONCE, LENGTH), {name: [] for name in names}
        for number in range(1 if arguments.quick else arguments.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                found = measure(chosen[name], requests, AT_ONCE, folder)
                rounds[name].append(found)
                shown = ", ".join(f"{figure} {value(found):.4g} {unit}" for figure, (unit, value) in FIGURES.items())
                print(f"round {number + 1}, {name}: {shown}", flush=True)
    differing = check_same(rounds, arguments.peer)
    lines, medians = table(rounds)
    answers = rounds["telechat"][0].answers
    print(f"\n{len(answers)} requests, {sum(answer.prompt_tokens for answer in answers):,} tokens of prompts and "
          f"{sum(answer.tokens for answer in answers):,} of answers, {differing} of them "
          f"another text from {arguments.peer}\n", *lines, sep="\n")
    faults = []
    if arguments.peer == "transformers":
        faults += [f"{differing} answers differ"] if differing else []
        faults += [] if arguments.quick else missed(medians, arguments.peer)
    print(*(f"goal missed: {fault}" for fault in faults), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
