"""The text of one answer while its tokens arrive, up to the first stop string."""

from telechat.data.answer_stream import AnswerParts
from telechat.data.text_stream import TextStream
from telechat.serving.logprobs import TokenChance


class AnswerText:
    """Text that is final: whole characters, and nothing that a stop string may yet take back.

    Args:
        tokenizer (Tokenizer): decodes.
        stops (sequence of str): none empty; the answer ends before the first of them.
        stream (AnswerStream): takes thoughts and calls of tools out of the text; None where there are none.

    Attributes:
        stopped (bool): whether a stop string has come; nothing more is returned then.
    """

    def __init__(self, tokenizer, stops=(), stream=None):
        self._tokenizer = tokenizer
        self._parts = stream
        self._stream = stream or TextStream(tokenizer)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # what may be the beginning of a stop string
        self._final = 0  # characters returned
        self._chances = []  # of tokens whose text is not final yet
        self.stopped = False

    def put(self, token, logprobs=None):
        """Take a token id, and its `TokenLogprobs` if wanted; return the text that is final now, possibly ""."""
        if logprobs is not None and (self._parts is None or self._parts.is_content(token)):
            offset = self._final + len(self._held)
            self._chances.append(TokenChance.of(self._tokenizer, logprobs, self._stream.drops_space, offset))
        return self._take(self._stream.put(token))

    def end(self):
        """Return what was held back."""
        text = self._take(self._stream.end())
        rest, self._held = self._held, ""
        self._final += len(rest)
        return text + rest

    def take_parts(self):
        """The `AnswerParts` that have come since the last call."""
        return AnswerParts() if self._parts is None or self.stopped else self._parts.take()

    def take_chances(self, ended=False):
        """The `TokenChance` of tokens whose text is final and that were not taken before; of all when it ``ended``.

        Tokens that lie in a stop string or behind it never come.
        """
        taken = [chance for chance in self._chances if chance.offset < self._final or (ended and not self.stopped)]
        self._chances = [] if ended else self._chances[len(taken):]
        return taken

    def _take(self, text):
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            final = text[:min(found)]
        else:
            held = next((size for size in range(min(len(text), self._longest - 1), 0, -1)
                         if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
            self._held = text[len(text) - held:]
            final = text[:len(text) - held]
        self._final += len(final)
        return final
