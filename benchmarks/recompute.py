"""Activation memory of training with and without recomputation on CPU: python benchmarks/recompute.py

Trains a 6-layer model for three steps in a process of its own each: with all activations kept, with
`recompute`, and on a batch so small that it has next to none. What the last one takes (weights, gradients,
moments, MindSpore itself) is subtracted; the rest is the activations' share. Ends with status 1 where
recomputation does not lower that to under 45 %.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory import measure  # noqa: E402

GOAL = 0.45
MODEL = dict(vocab_size=4000, hidden_size=512, n_layer=6, n_head=8, ffn_hidden_size=1408, tie_word_embeddings=False)
RUN = {"model": MODEL, "sequence_length": 128, "batch_size": 32}


def main():
    base = measure({**RUN, "sequence_length": 32, "batch_size": 1})[0]
    kept = measure(RUN)[0] - base
    again = measure({**RUN, "parallel": {"recompute": True}})[0] - base
    print(f"without activations {base / 1e6:.0f} MB; activations kept {kept / 1e6:.0f} MB, "
          f"recomputed {again / 1e6:.0f} MB: {again / kept:.1%} (goal: under {GOAL:.0%})")
    return int(again / kept >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
