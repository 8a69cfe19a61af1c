"""Many clients at once against the same requests one after another, on a running tools/serve.py.

    python benchmarks/serving_crowd.py --url http://127.0.0.1:8000 [--clients 64 --max_tokens 64 --rounds 3]

Both ways take turns for some rounds. Prints tokens a second of both, the ratio (goal: at least 3), and p50 and p99 of
the time to the first token, each the median of the rounds; exits with status 1 where an answer is lost or one of the
crowd differs from the same request's alone.
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
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key="none", max_retries=0, timeout=600)
    model = client.models.list().data[0].id

    def measure(workers):
        """Texts and numbers of tokens, tokens a second, p50 and p99 of the seconds to the first token."""
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(lambda number: ask(client, model, number, arguments.max_tokens),
                                    range(arguments.clients)))
        speed = sum(tokens for _, tokens, _ in results) / (time.perf_counter() - begin)
        waits = np.percentile([first for _, _, first in results], (50, 99))
        return [(text, tokens) for text, tokens, _ in results], speed, *waits

    measure(1)  # compiles what is not compiled yet
    alone, crowd = zip(*[(measure(1), measure(arguments.clients)) for _ in range(arguments.rounds)])
    for name, rounds in (("one after another", alone), (f"{arguments.clients} at once", crowd)):
        print(f"{name}: {median(rounds, 1):.1f} tokens/s, first token p50 {median(rounds, 2):.3f} s, "
              f"p99 {median(rounds, 3):.3f} s")
    ratios = [together[1] / single[1] for single, together in zip(alone, crowd)]
    print(f"ratio {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    answers = alone[0][0]
    lost = [number for number, (_, tokens) in enumerate(answers) if not tokens]
    wrong = [number for number, answer in enumerate(answers)
             if any(answer != results[0][number] for results in [*alone, *crowd])]
    print(f"{len(lost)} answers lost, {len(wrong)} differ{f': {lost + wrong}' if lost + wrong else ''}")
    return 1 if lost or wrong else 0


def median(rounds, place):
    """The median over the rounds of a figure of `measure`."""
    return np.median([one[place] for one in rounds])


if __name__ == "__main__":
    sys.exit(main())
