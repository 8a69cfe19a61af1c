"""What sharing beginnings and reading prompts in parts bring: python -m benchmarks.serving_latency [--rounds 3]

The server's batch without HTTP, on a random model of --width 512 × --layers 8, in turns with and without what is measured:
- the time to the first token of the first and the tenth turn of a chat (goal: at most 1.3 × as long);
- the tokens computed of 16 prompts that begin with the same 512 (goal: at most an eighth);
- the gaps between a stream's tokens while another's prompt of 4,096 tokens is read: the longest against the median of
  those with a part of the prompt in them (goal: at most 2.5 ×), and against a prompt that is read whole.

--chat measures the first of these alone, shared. A token of the tenth turn looks at ten times as many tokens as one of
the first: beside the products that weighs by length / width, and at a width of 512 over half as much; --width 4096
--layers 2 has the blocks of the published 7B.

--cpu_seconds measures the process's own time, for a machine that others use too; with one thread (OMP_NUM_THREADS=1),
since threads that wait for each other take time as well.
"""

import argparse
import sys
import time

import numpy as np

from telechat import SamplingParams, TeleChat, TeleChatConfig
from telechat.generation.batch import Batch
from telechat.generation.engine import Engine

LENGTH, LONG, SYSTEM, CHUNK = 4608, 4096, 512, 512
QUESTION, ANSWER, TURNS = 128, 64, 10  # tokens, and how often
VOCABULARY = 4096


def tokens(rng, count):
    return rng.integers(0, VOCABULARY, count).tolist()


def run(batch, clock, key):
    """Advance a batch until a sequence ends: when each of its tokens came, and the tokens."""
    times, ids = [], []
    while True:
        for step in batch.prefill() + batch.decode():
            if step.key == key:
                times.append(clock())
                ids.append(step.token)
                if step.reason:
                    return times, ids


def turns(engine, rng, clock):
    """Seconds to the first token of each turn of a chat."""
    prompt, waits = tokens(rng, QUESTION), []
    for turn in range(TURNS):
        batch, begin = Batch(engine, CHUNK), clock()
        batch.add(turn, prompt, SamplingParams(ANSWER))
        times, answer = run(batch, clock, turn)
        waits.append(times[0] - begin)
        prompt = prompt + answer + tokens(rng, QUESTION)
    return waits


def computed(engine, rng):
    """Tokens computed of 16 prompts that come at once and begin alike, and all of them."""
    system, before = tokens(rng, SYSTEM), engine.table.misses
    prompts = [system + tokens(rng, 8) for _ in range(16)]
    batch = Batch(engine, CHUNK)
    for key, prompt in enumerate(prompts):
        batch.add(key, prompt, SamplingParams(4))
    while len(batch):
        batch.prefill()
        batch.decode()
    return engine.table.misses - before, sum(map(len, prompts))


def gaps(engine, rng, clock, chunk):
    """Seconds between a stream's tokens: alone, and while a long prompt is read."""
    batch = Batch(engine, chunk)
    batch.add("stream", tokens(rng, 16), SamplingParams(60))
    alone, reading, last, added = [], [], None, False
    while len(batch):
        unread = batch.unread and added
        for step in batch.prefill() + batch.decode():
            if step.key == "stream":
                now = clock()
                if last is not None:
                    (reading if unread else alone).append(now - last)
                last = now
        if len(alone) == 20 and not added:
            batch.add("long", tokens(rng, LONG), SamplingParams(1))
            added = True
    return alone, reading


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--cpu_seconds", action="store_true")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    width = arguments.width
    model = TeleChat(TeleChatConfig(vocab_size=VOCABULARY, hidden_size=width, n_layer=arguments.layers,
                                    n_head=max(width // 128, 8), ffn_hidden_size=width * 11 // 4 if width < 4096 else 3 * width,
                                    training_seqlen=LENGTH))
    engines = {"with shared beginnings": Engine(model, LENGTH)}
    if not arguments.chat:
        engines["without"] = Engine(model, LENGTH, reuse=False)
    for engine in engines.values():
        engine.reserve(16, LENGTH, 2 * LENGTH // engine.block_size)
    waits, counts = {name: [] for name in engines}, {}
    for number in range(arguments.rounds):
        for name, engine in engines.items():
            waits[name].append(turns(engine, np.random.default_rng(number), clock))
            counts[name] = (0, 0) if arguments.chat else computed(engine, np.random.default_rng(100 + number))
    for name, rounds in waits.items():
        times = np.median(rounds, axis=0) * 1e3
        print(f"{name}: first token of turn 1 after {times[0]:.1f} ms, of turn {TURNS} after {times[-1]:.1f} ms "
              f"({times[-1] / times[0]:.2f} ×)"
              + ("" if arguments.chat else f"; {counts[name][0]} of {counts[name][1]} tokens computed"), flush=True)
    if arguments.chat:
        return
    found = {"in parts of 512": [], "whole": []}
    for number in range(arguments.rounds):
        for (name, rounds), chunk in zip(found.items(), (CHUNK, None)):
            rounds.append(gaps(engines["without"], np.random.default_rng(200 + number), clock, chunk))
    for name, rounds in found.items():
        alone = np.median([gap for one, _ in rounds for gap in one]) * 1e3
        part = np.median([gap for _, one in rounds for gap in one]) * 1e3
        longest = np.median([max(one) for _, one in rounds]) * 1e3
        print(f"a prompt of {LONG} tokens read {name}: a token after {alone:.1f} ms, with a part of it after {part:.1f} ms, "
              f"at the longest after {longest:.1f} ms ({longest / part:.2f} ×)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
