"""Sequences that are answered together: they wait, come, and go between tokens."""

import bisect
import dataclasses
import itertools
import typing

from telechat.generation.prompt_lookup import PromptLookup
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
    """A prompt being answered."""

    key: object  # the caller's name for it
    ids: list  # prompt and answer
    sampler: Sampler
    params: object  # SamplingParams
    room: int  # how many more tokens may come
    arrival: int
    lookup: PromptLookup  # guesses its next tokens; None: nobody does
    adapter: str = None  # of the engine's, by name
    slot: int = None  # of the engine; None: it waits
    computed: int = 0  # tokens whose keys and values the cache holds

    @property
    def prompt_length(self):
        return self.sampler.prompt_length


class Batch:
    """Continuous batching over an `Engine` that is reserved.

    Sequences wait for a slot and for blocks of the cache, first come, first served. When a running one needs a block
    and there is none, the newest is put back to wait; it is computed again later, and goes on where it was. One alone
    always has room, so all come to their end.

    What a sequence is given depends on its own prompt and settings alone, not on its neighbours, so it
    is the same as in a batch of one. All is decided by the calls: tensor-parallel ranks that make the
    same calls hold the same sequences.

    What fails in the choice of a token ends that sequence alone. So does a prompt that the engine cannot take,
    unless it is the device that fails (RuntimeError, MemoryError): that is raised.

    Args:
        engine (Engine): after ``reserve``.
        chunk (int): how many tokens of prompts `prefill` reads at most; None: whole prompts.
        speculate (int): how many tokens are guessed ahead at most, so that `decode` may bring several at once.

    Attributes:
        preemptions (int): how often a sequence was put back.
        guessed, right (int): tokens that were computed as guesses, and those of them that came to be.
    """

    def __init__(self, engine, chunk=None, speculate=0):
        self._engine = engine
        self._chunk = chunk
        self._speculate = speculate
        self._waiting = []  # in the order of arrival
        self._slots = {}  # slot → _Sequence
        self._arrivals = itertools.count()
        self.preemptions = self.guessed = self.right = 0

    def __len__(self):
        return len(self._waiting) + len(self._slots)

    @property
    def unread(self):
        """Whether there is a prompt that is not read to its end."""
        return bool(self._waiting) or any(_is_unread(sequence) for sequence in self._slots.values())

    def add(self, key, prompt, params, index=0, adapter=None):
        """Let a prompt wait to be answered.

        Args:
            key: names the sequence in `remove` and in every `Step`.
            prompt (list of int): fewer ids than the engine's sequences may be long.
            params (SamplingParams): its settings.
            index (int): of the sampler, so that equal prompts get different draws.
            adapter (str): name of one of the engine's; None: the model as it is.
        """
        room = min(params.max_new_tokens, self._engine.length - len(prompt))
        lookup = PromptLookup(self._speculate) if self._speculate else None
        self._waiting.append(_Sequence(key, list(prompt), Sampler(params, index, len(prompt)), params, room,
                                       next(self._arrivals), lookup, adapter))

    def remove(self, key):
        """Give up a sequence; its slot and blocks are free at once. One that has ended already is no error."""
        self._waiting = [sequence for sequence in self._waiting if sequence.key != key]
        for sequence in list(self._slots.values()):
            if sequence.key == key:
                self._leave(sequence)

    def prefill(self):
        """Read on in the prompts, `chunk` tokens at most, or as many as are best read together.

        Returns:
            list of Step: for each prompt that is read to its end.
        """
        parts = self._parts()
        if not parts:
            return []
        try:
            return self._read(parts)
        except (RuntimeError, MemoryError):
            raise
        except Exception:
            return [step for part in parts for step in self._read_alone(part)]

    def decode(self):
        """One more token for every sequence whose prompt is read, or as many as were guessed right and one more.

        Returns:
            list of Step: those of a sequence in their order.
        """
        running = [sequence for sequence in self._by_arrival() if not _is_unread(sequence)]
        running = [sequence for sequence in running if self._make_room(sequence)]
        running = [sequence for sequence in running if sequence.slot is not None]  # a later one may have had to go
        if not running:
            return []
        running.sort(key=lambda sequence: sequence.slot)
        guesses = self._guesses(running)
        logits = self._engine.extend([sequence.slot for sequence in running],
                                     [[sequence.ids[-1], *guess] for sequence, guess in zip(running, guesses)],
                                     [len(sequence.ids) - 1 for sequence in running])
        return [step for taken in map(self._take_guessed, running, guesses, logits) for step in taken]

    def _guesses(self, running):
        """What may follow each sequence's newest token: nothing where the blocks that their next tokens need do not allow it."""
        if not self._speculate:
            return [[] for _ in running]
        table, guesses = self._engine.table, []
        next_blocks = [table.missing(sequence.slot, len(sequence.ids) + 1) for sequence in running]
        spare = self._engine.available - sum(next_blocks)
        for sequence, own in zip(running, next_blocks):
            guess = sequence.lookup.guess(sequence.ids, sequence.room - 1)
            missing = table.missing(sequence.slot, len(sequence.ids) + len(guess))
            if missing > 0 and missing - own > spare:
                guess = []
            elif missing > 0:
                spare -= missing - own
                self._engine.grow(sequence.slot, len(sequence.ids) + len(guess))
            guesses.append(guess)
        return guesses

    def _take_guessed(self, sequence, guess, logits):
        """The next tokens of a sequence, from the logits behind its newest token and behind each guess.

        Each is drawn as ever; those behind a guess count as long as what was drawn is what was guessed. So the answer
        is drawn from the same distribution, and with the same logits it is the same. (It is what rejection sampling
        comes to where a guess is one token for certain: Leviathan et al., arXiv:2211.17192.)
        """
        steps = []
        for row, following in zip(logits, [*guess, None]):
            steps.append(self._take(sequence, row))
            if steps[-1].reason is not None or steps[-1].token != following:
                break
        if guess:
            right = sum(step.token == token for step, token in zip(steps, guess))
            self.guessed, self.right = self.guessed + len(guess), self.right + right
            sequence.lookup.judge(right)
        return steps

    def _by_arrival(self):
        return sorted(self._slots.values(), key=lambda sequence: sequence.arrival)

    def _make_room(self, sequence):
        """Room for the newest token, if need be of sequences that came later; False: it had to go itself."""
        while sequence.slot is not None and not self._engine.grow(sequence.slot, len(sequence.ids)):
            newest = self._by_arrival()[-1]
            self._leave(newest)
            newest.computed = 0
            bisect.insort(self._waiting, newest, key=lambda other: other.arrival)
            self.preemptions += 1
        return sequence.slot is not None

    def _parts(self):
        """What to read now: [(sequence, number of tokens), …]; sequences that can start get their slots."""
        parts, coming = [], set()
        for sequence in self._by_arrival():
            if _is_unread(sequence):
                coming.add(self._engine.next_block(sequence.slot, sequence.ids))
                if not self._add_part(parts, sequence):
                    return parts
        for sequence in list(self._waiting):
            if len(self._slots) == self._engine.slots:
                break
            blocks, known, beginning = self._engine.needed(sequence.ids, sequence.prompt_length, sequence.adapter)
            if beginning is not None and beginning in coming:
                continue  # another one is just reading this: it will be shared
            # A block for each that will grow is left, so that a newcomer does not have to go again at once.
            growing = sum(self._engine.table.lacks(slot, len(other.ids) + other.room) for slot, other in self._slots.items())
            full = self._slots and blocks + growing > self._engine.available
            if full or not self._count(parts, len(sequence.ids) - known):
                break
            self._start(sequence)
            coming.add(beginning)
            self._add_part(parts, sequence)
        return parts

    def _start(self, sequence):
        self._waiting.remove(sequence)
        slot = next(slot for slot in range(self._engine.slots) if slot not in self._slots)
        self._slots[slot], sequence.slot = sequence, slot
        sequence.computed = self._engine.begin(slot, sequence.ids, sequence.prompt_length, sequence.adapter)
        self._engine.grow(slot, len(sequence.ids))

    def _add_part(self, parts, sequence):
        """Add what is to be read of a sequence; False where there is no more room for it."""
        count = self._count(parts, len(sequence.ids) - sequence.computed)
        if count:
            parts.append((sequence, count))
        return count > 0

    def _count(self, parts, unread):
        """How many of a sequence's unread tokens can be read in one call with other parts."""
        counts = [count for _, count in parts]
        if self._chunk is not None:
            unread = min(unread, self._chunk - sum(counts))
        return unread if unread > 0 and (not parts or self._engine.takes_together([*counts, unread])) else 0

    def _read(self, parts):
        starts = [sequence.computed for sequence, _ in parts]
        logits = self._engine.prefill(
            [sequence.slot for sequence, _ in parts],
            [sequence.ids[start:start + count] for (sequence, count), start in zip(parts, starts)], starts)
        steps = []
        for (sequence, count), row in zip(parts, logits):
            sequence.computed += count
            if sequence.computed < len(sequence.ids):
                self._engine.remember(sequence.slot, sequence.ids, sequence.computed)
            else:
                steps.append(self._take(sequence, row))
        return steps

    def _read_alone(self, part):
        """After a failure of several: each by itself, and what fails ends."""
        try:
            return self._read([part])
        except (RuntimeError, MemoryError):
            raise
        except Exception as error:
            self._leave(part[0])
            return [Step(part[0].key, None, "error", error)]

    def _leave(self, sequence):
        self._engine.end(sequence.slot)
        del self._slots[sequence.slot]
        sequence.slot = None

    def _take(self, sequence, logits):
        """The next token of a sequence, all of whose tokens are computed."""
        sequence.computed, logprobs = len(sequence.ids), None
        self._engine.remember(sequence.slot, sequence.ids, sequence.computed)
        try:
            token = sequence.sampler(logits, sequence.ids)
            if token not in sequence.params.stop_ids and sequence.params.logprobs is not None:
                logprobs = token_logprobs(logits, token, sequence.params.logprobs, sequence.params.excluded_ids)
        except Exception as error:
            self._leave(sequence)
            return Step(sequence.key, None, "error", error)
        if token in sequence.params.stop_ids:
            self._leave(sequence)
            return Step(sequence.key, None, "stop")
        sequence.ids.append(token)
        sequence.room -= 1
        if not sequence.room:
            self._leave(sequence)
        return Step(sequence.key, token, None if sequence.room else "length", logprobs=logprobs)


def _is_unread(sequence):
    """Whether there is more to be computed of a sequence than its newest token."""
    return sequence.computed < len(sequence.ids) - 1 or sequence.computed < sequence.prompt_length
