"""Sequences that are answered together, and that come and go between tokens."""

import dataclasses
import typing

from telechat.generation.sampling import Sampler, TokenLogprobs, token_logprobs


class Step(typing.NamedTuple):
    """What one step brought one sequence.

    ``reason`` is None while there is more to come, "length" with the last token there was room for, "stop" where a
    stop token ended the answer, "error" where something failed in this sequence alone; the last two come without a
    token. After a reason the sequence is no longer in the batch.
    """

    key: object
    token: int
    reason: str
    error: Exception = None
    logprobs: TokenLogprobs = None  # where the sequence's `SamplingParams` ask for them


@dataclasses.dataclass
class _Sequence:
    """A prompt being answered in a slot of the engine."""

    key: object  # the caller's name for it
    ids: list  # prompt and answer
    sampler: Sampler
    params: object  # SamplingParams
    room: int  # how many more tokens may come


class Batch:
    """Continuous batching over an `Engine` whose slots are reserved.

    What a sequence is given depends on its own prompt and settings alone, not on its neighbours, so it
    is the same as in a batch of one. All is decided by the calls: tensor-parallel ranks that make the
    same calls hold the same sequences.

    What fails in the choice of a token ends that sequence alone. So does a prompt that the engine cannot take,
    unless it is the device that fails (RuntimeError, MemoryError): that is raised, here and in `decode`.

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
        """How many more sequences may be added."""
        return self._engine.slots - len(self._running)

    def add(self, key, prompt, params, index=0):
        """Start answering a prompt in a free slot.

        Args:
            key: names the sequence in `remove` and in every `Step`.
            prompt (list of int): fewer ids than the engine's slots are long.
            params (SamplingParams): its settings.
            index (int): of the sampler, so that equal prompts get different draws.

        Returns:
            Step: with the first token; `decode` gives all others.
        """
        slot = next(slot for slot in range(self._engine.slots) if slot not in self._running)
        try:
            logits = self._engine.prefill([slot], [prompt])[0]
        except (RuntimeError, MemoryError):
            raise
        except Exception as error:
            return Step(key, None, "error", error)
        return self._start(slot, logits, key, prompt, params, index)

    def add_all(self, sequences):
        """Start answering in an empty batch as many prompts as there are slots, in one call where that is faster.

        Args:
            sequences (list): arguments of `add` for each.

        Yields:
            Step: for each, in their order.
        """
        prompts = [prompt for _, prompt, *_ in sequences]
        if not self._engine.takes_together(prompts):
            for sequence in sequences:
                yield self.add(*sequence)
            return
        logits = self._engine.prefill(range(len(prompts)), prompts)
        for slot, sequence in enumerate(sequences):
            yield self._start(slot, logits[slot], *sequence)

    def remove(self, key):
        """Give up a sequence; its slot is free at once. One that has ended already is no error."""
        for slot, sequence in list(self._running.items()):
            if sequence.key == key:
                del self._running[slot]

    def decode(self):
        """One more token for every sequence: a list of `Step`."""
        if not self._running:
            return []
        running = list(self._running.items())
        logits = self._engine.decode([slot for slot, _ in running], [sequence.ids[-1] for _, sequence in running],
                                     [len(sequence.ids) - 1 for _, sequence in running])
        return [self._take(slot, row) for (slot, _), row in zip(running, logits)]

    def _start(self, slot, logits, key, prompt, params, index=0):
        room = min(params.max_new_tokens, self._engine.length - len(prompt))
        self._running[slot] = _Sequence(key, list(prompt), Sampler(params, index, len(prompt)), params, room)
        return self._take(slot, logits)

    def _take(self, slot, logits):
        sequence, logprobs = self._running[slot], None
        try:
            token = sequence.sampler(logits, sequence.ids)
            if token not in sequence.params.stop_ids and sequence.params.logprobs is not None:
                logprobs = token_logprobs(logits, token, sequence.params.logprobs, sequence.params.excluded_ids)
        except Exception as error:
            del self._running[slot]
            return Step(sequence.key, None, "error", error)
        if token in sequence.params.stop_ids:
            del self._running[slot]
            return Step(sequence.key, None, "stop")
        sequence.ids.append(token)
        sequence.room -= 1
        if not sequence.room:
            del self._running[slot]
        return Step(sequence.key, token, None if sequence.room else "length", logprobs=logprobs)
