"""Guesses of the next tokens: what followed the newest ones where they last stood in the sequence.

Prompt lookup, a draft without a second model: Saxena, "Prompt Lookup Decoding" (2023); Yang et al., "Inference with
Reference" (arXiv:2304.04487). An answer that quotes its prompt, or itself, is guessed several tokens at a time.
"""

from telechat import fields

GRAMS = (3, 2)  # how many of the newest tokens have to stand before a guess, tried in this order
LONGEST_PAUSE = 64
MOST_GUESSES = 64  # tokens ahead


def check_speculation(name, value):
    """How many tokens are to be guessed ahead, called ``name``; InputError where that cannot be."""
    return fields.whole_number(name, value, 0, MOST_GUESSES)


class PromptLookup:
    """The guesses for one sequence; whether they were right decides how often there are more.

    Args:
        most (int): tokens of a guess, at most.
    """

    def __init__(self, most):
        self._most = most
        self._behind = {}  # tokens that stand in a row → the place behind them, where they stood last
        self._indexed = 0
        self._pause = self._misses = 0

    def guess(self, ids, room):
        """Tokens that may follow ``ids`` (list of int, which only grows between calls), at most ``room``: list of int."""
        for place in range(self._indexed, len(ids)):  # those that end at the last token are not behind anything yet
            for size in GRAMS:
                if place >= size:
                    self._behind[tuple(ids[place - size:place])] = place
        self._indexed = len(ids)
        if self._pause:
            self._pause -= 1
            return []
        found = next((place for size in GRAMS if (place := self._behind.get(tuple(ids[-size:]))) is not None), None)
        if found is None:
            return []
        guess = []
        for place in range(found, found + min(self._most, room)):
            guess.append(ids[place] if place < len(ids) else guess[place - len(ids)])
        return guess

    def judge(self, right):
        """How many tokens of the last guess, one that was not empty, were right.

        Guesses cost time: after each one of which nothing was right twice as many tokens go without.
        """
        self._misses = 0 if right else self._misses + 1
        self._pause = min(2 ** self._misses, LONGEST_PAUSE) if self._misses else 0
