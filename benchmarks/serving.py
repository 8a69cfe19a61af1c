"""Many clients at once against the same requests one after another, on a running tools/serve.py.

    python benchmarks/serving.py --url http://127.0.0.1:8000 [--clients 64 --max_tokens 64]

Prints tokens a second of both, the ratio, and p50 and p99 of the time to the first token; exits with
status 1 where an answer of the crowd differs from the same request's alone.
"""

import argparse
import concurrent.futures
import sys
import time

import numpy as np
import openai

QUESTIONS = ("生抽与老抽的区别？", "Why is the sky blue?", "What is 15 percent of 80?", "月亮自己会发光吗？")


def ask(client, model, number, max_tokens):
    """One streamed answer: its text, tokens, and seconds to its first token."""
    begin = time.perf_counter()
    first, text, tokens = None, "", 0
    question = f"{QUESTIONS[number % len(QUESTIONS)]} {number}"
    for chunk in client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens, stream=True,
            temperature=float(number % 2), seed=number, stream_options={"include_usage": True}):
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        elif chunk.choices[0].delta.content:
            first = first or time.perf_counter() - begin
            text += chunk.choices[0].delta.content
    return text, tokens, first or time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=64)
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key="none", max_retries=0, timeout=600)
    model = client.models.list().data[0].id

    def measure(workers):
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(lambda number: ask(client, model, number, arguments.max_tokens),
                                    range(arguments.clients)))
        return results, sum(tokens for _, tokens, _ in results) / (time.perf_counter() - begin)

    measure(1)  # compiles what is not compiled yet
    one, slow = measure(1)
    many, fast = measure(arguments.clients)
    waits = [np.percentile([first for _, _, first in results], (50, 99)) for results in (one, many)]
    print(f"one after another: {slow:.1f} tokens/s, first token p50 {waits[0][0]:.3f} s, p99 {waits[0][1]:.3f} s")
    print(f"{arguments.clients} at once: {fast:.1f} tokens/s, first token p50 {waits[1][0]:.3f} s, "
          f"p99 {waits[1][1]:.3f} s")
    wrong = [number for number, (a, b) in enumerate(zip(one, many)) if a[:2] != b[:2]]
    print(f"ratio {fast / slow:.2f}; {len(wrong)} answers differ{f': {wrong}' if wrong else ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
