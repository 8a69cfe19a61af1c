"""Sequences that are answered together, and that join and leave between tokens."""

import dataclasses

from telechat.generation.sampling import Sampler


@dataclasses.dataclass
class _Sequence:
    """A prompt being answered in a slot of the engine."""

    key: object  # the caller's name for it
    ids: list  # prompt and answer
    sampler: Sampler
    stop_ids: tuple
    room: int  # how many more tokens may come


class Batch:
    """Continuous batching over an `Engine` whose slots are reserved.

    What a sequence is given depends on its own prompt and settings alone, not on its neighbours, so it
    is the same as in a batch of one. All is decided by the calls: tensor-parallel ranks that make the
    same calls hold the same sequences.

    Every token comes as (token, reason): reason is None while there is more to come, "length" with the
    last token there was room for, and "stop" with token None where a stop token ended the answer.

    Args:
        engine (Engine): after ``reserve``.
    """

    def __init__(self, engine):
        self._engine = engine
        self._running = {}  # slot → _Sequence

    def __len__(self):
        return len(self._running)

    @property
    def free(self):
        """How many more sequences may join."""
        return self._engine.slots - len(self._running)

    def join(self, key, prompt, params, index=0):
        """Start answering a prompt in a free slot.

        Args:
            key: names the sequence in `leave` and `decode`.
            prompt (list of int): fewer ids than the engine's slots are long.
            params (SamplingParams): its settings.
            index (int): of the sampler, so that equal prompts get different draws.

        Returns:
            (key, token, reason): the first token, as `decode` gives all others.
        """
        slot = next(slot for slot in range(self._engine.slots) if slot not in self._running)
        self._enter(slot, key, prompt, params, index)
        return (key, *self._take(slot, self._engine.prefill([slot], [prompt])[0]))

    def fill(self, sequences):
        """Start answering in an empty batch as many prompts as there are slots, in one call where that is faster.

        Args:
            sequences (list): arguments of `join` for each.

        Yields:
            (key, token, reason) for each, in their order.
        """
        prompts = [prompt for _, prompt, *_ in sequences]
        if not self._engine.takes_together(prompts):
            for sequence in sequences:
                yield self.join(*sequence)
            return
        slots = range(len(prompts))
        for slot, sequence in zip(slots, sequences):
            self._enter(slot, *sequence)
        logits = self._engine.prefill(slots, prompts)
        for slot, (key, *_) in zip(slots, sequences):
            yield (key, *self._take(slot, logits[slot]))

    def _enter(self, slot, key, prompt, params, index):
        room = min(params.max_new_tokens, self._engine.length - len(prompt))
        self._running[slot] = _Sequence(key, list(prompt), Sampler(params, index, len(prompt)), params.stop_ids, room)

    def leave(self, key):
        """Give up a sequence; its slot is free at once. One that has ended already is no error."""
        for slot, sequence in list(self._running.items()):
            if sequence.key == key:
                del self._running[slot]

    def decode(self):
        """One more token for every sequence: a list of (key, token, reason)."""
        if not self._running:
            return []
        slots = self._engine.slots
        tokens, positions = [0] * slots, [0] * slots
        for slot, sequence in self._running.items():
            tokens[slot], positions[slot] = sequence.ids[-1], len(sequence.ids) - 1
        logits = self._engine.decode(tokens, positions)
        return [(sequence.key, *self._take(slot, logits[slot])) for slot, sequence in list(self._running.items())]

    def _take(self, slot, logits):
        sequence = self._running[slot]
        token = sequence.sampler(logits, sequence.ids)
        if token in sequence.stop_ids:
            del self._running[slot]
            return None, "stop"
        sequence.ids.append(token)
        sequence.room -= 1
        if sequence.room:
            return token, None
        del self._running[slot]
        return token, "length"
