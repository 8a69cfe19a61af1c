"""What follows prompts of which many begin alike, as the questions of a subject do with its worked examples."""

import numpy as np

from telechat.generation.engine import Engine


class PromptLogits:
    """Reads prompts into a key-value cache in which what several begin with is computed once.

    Args:
        model (TeleChat or TensorParallelModel): the model.
        tokens (int): that the cache holds; None: two of the longest prompt.
    """

    def __init__(self, model, tokens=None):
        self._engine = Engine(model, model.config.training_seqlen)
        self._tokens = tokens or 0

    def __call__(self, prompts):
        """The logits of the token after each prompt, of at most training_seqlen tokens: float32 (len(prompts), V)."""
        engine, length = self._engine, max(map(len, prompts))
        if length > engine.length:
            engine.reserve(1, length, max(self._tokens, 2 * length) // engine.block_size + 1)
        return np.stack([self._read(list(prompt)) for prompt in prompts])

    def _read(self, prompt):
        engine = self._engine
        known = engine.begin(0, prompt)
        engine.grow(0, len(prompt))
        logits = engine.prefill([0], [prompt[known:]], [known])[0]
        engine.remember(0, prompt, len(prompt))
        engine.end(0)
        return logits
