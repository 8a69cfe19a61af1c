"""Tokens a second with and without guessing ahead, of answers that quote their prompt and of answers that do not.

    python -m benchmarks.speculation [--speculate 4 --rounds 5]

Model S with random weights computes all that it ever does; which token comes next is what the text says, as a model
that was trained on it would have it. So what is guessed right is what real text lets guess. Both ways take turns.
"""

import argparse
import json
import time

import numpy as np

from benchmarks.measure import ROOT
from benchmarks.workspace import SIZES
from telechat import SamplingParams, TeleChat, TeleChatConfig, Tokenizer
from telechat.data.conversation import read_conversations
from telechat.generation.batch import Batch
from telechat.generation.engine import Engine

LENGTH = 1024
CHANGED = 37  # of an answer that quotes, every so many-th character is another one


class TextEngine(Engine):
    """An engine whose most likely token is the one that ``text`` (list of ids) has there."""

    text = ()

    def prefill(self, slots, prompts, starts=None):
        """As of `Engine`."""
        logits = super().prefill(slots, prompts, starts)
        return self._lead(logits, [start + len(prompt) - 1 for start, prompt in zip(starts, prompts)])

    def decode(self, slots, tokens, positions):
        """As of `Engine`."""
        return self._lead(super().decode(slots, tokens, positions), positions)

    def _lead(self, logits, positions):
        logits = np.array(logits)
        for row, position in enumerate(positions):
            if position + 1 < len(self.text):
                logits[row, self.text[position + 1]] = 1e9
        return logits


def texts(tokenizer):
    """Name → (prompt, answer), lists of ids, of the sample conversations."""
    turns = [turn for turns in read_conversations(ROOT / "samples/conversations.jsonl") for turn in turns]
    answers = ["\n".join(answer for _, answer in turns[first:first + 12]) for first in (0, 24)]
    quoted = "".join("#" if place % CHANGED == CHANGED - 1 else letter for place, letter in enumerate(answers[0]))
    encode = tokenizer.encode
    questions = "\n".join(question for question, _ in turns[:24])
    return {"an answer that quotes its prompt": (encode("请改正：" + answers[0]), encode(quoted)),
            "an answer that does not": (encode(questions), encode(answers[1]))}


def seconds(engine, prompt, answer, speculate):
    """Of decoding an answer whose prompt is read, and how many tokens were guessed and how many of them were right."""
    engine.forget()
    engine.text = prompt + answer
    batch = Batch(engine, speculate=speculate)
    batch.add(0, prompt, SamplingParams(len(answer)))
    got = [step.token for step in batch.prefill()]
    begin = time.perf_counter()
    while len(batch):
        got += [step.token for step in batch.decode()]
    taken = time.perf_counter() - begin
    assert got == answer, "another answer"
    return taken, batch.guessed, batch.right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speculate", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(ROOT / "samples/tokenizer.model")
    engine = TextEngine(TeleChat(TeleChatConfig(**SIZES["S"])), LENGTH, guesses=arguments.speculate)
    engine.reserve(1, LENGTH)
    engine.warm_up(LENGTH)
    for name, (prompt, answer) in texts(tokenizer).items():
        rounds = [[seconds(engine, prompt, answer, speculate) for speculate in (0, arguments.speculate)]
                  for _ in range(arguments.rounds + 1)][1:]  # the first is not counted
        without, ahead = (np.median([one[side][0] for one in rounds]) for side in (0, 1))
        ratios = [one[0][0] / one[1][0] for one in rounds]
        _, guessed, right = rounds[0][1]
        print(json.dumps({
            "text": name, "prompt": len(prompt), "answer": len(answer), "tokens/s": round(len(answer) / without, 1),
            f"tokens/s with --speculate {arguments.speculate}": round(len(answer) / ahead, 1),
            "ratio": round(float(np.median(ratios)), 2), "of rounds": [round(min(ratios), 2), round(max(ratios), 2)],
            "guessed": guessed, "right": right}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
