"""The text of one answer while its tokens arrive, up to the first stop string."""

from telechat.data.text_stream import TextStream


class AnswerText:
    """Text that is final: whole characters, and nothing that a stop string may yet take back.

    Args:
        tokenizer (Tokenizer): decodes.
        stops (sequence of str): none empty; the answer ends before the first of them.

    Attributes:
        stopped (bool): whether a stop string has come; nothing more is returned then.
    """

    def __init__(self, tokenizer, stops=()):
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def put(self, token):
        """Take a token id; return the text that is final now, possibly ""."""
        return self._take(self._stream.put(token))

    def end(self):
        """Return what was held back."""
        text = self._take(self._stream.end())
        rest, self._held = self._held, ""
        return text + rest

    def _take(self, text):
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)]
        held = next((size for size in range(min(len(text), self._longest - 1), 0, -1)
                     if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
        self._held = text[len(text) - held:]
        return text[:len(text) - held]
